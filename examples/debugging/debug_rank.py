"""Under torchrun: one rank runs under debugpy and waits for a debugger to attach; the others run as they would.

    torchrun --standalone --nproc-per-node 2 examples/debugging/debug_rank.py --rank 1 -m hf_nanotron.cli train run.yaml

What follows the options is a module with `-m`, or a script, and its arguments, as for `python`. The others wait for the
rank at their next collective, so give the run a long `ddp_timeout`.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=0, help="of the whole job (default: %(default)s)")
    parser.add_argument("--port", type=int, default=5678, help="where it waits (default: %(default)s)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this machine alone)")
    parser.add_argument("-m", dest="module", nargs=argparse.REMAINDER, default=[], help="module and its arguments")
    parser.add_argument("script", nargs=argparse.REMAINDER, help="script and its arguments")
    args = parser.parse_args()
    program = ["-m", *args.module] if args.module else args.script
    if not program:
        parser.error("give a program: -m MODULE or SCRIPT, and its arguments")
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if not 0 <= args.rank < size:
        parser.error(f"--rank {args.rank} is none of the {size} ranks of this job")
    command = [sys.executable, *program]
    if int(os.environ.get("RANK", "0")) == args.rank:
        if importlib.util.find_spec("debugpy") is None:
            parser.error("debugpy is not installed: pip install debugpy")
        print(f"rank {args.rank} waits for a debugger at {args.host}:{args.port}", file=sys.stderr, flush=True)
        listen = ["-m", "debugpy", "--listen", f"{args.host}:{args.port}", "--wait-for-client"]
        command = [sys.executable, "-Xfrozen_modules=off", *listen, *program]
    os.execv(sys.executable, command)


if __name__ == "__main__":
    main()
