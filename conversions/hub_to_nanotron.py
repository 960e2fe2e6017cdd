"""Convert a Hub checkpoint of Llama or Qwen2 into a huggingface/nanotron checkpoint, weights only.

python conversions/hub_to_nanotron.py SRC DST [--tp 1] [--pp 1] [--step 0]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from hf_nanotron.checkpoint.nanotron_convert import hub_to_nanotron


def main(argv: Sequence[str] | None = None) -> None:
    """Run the conversion that the command line `argv` describes (default: `sys.argv`)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="local Hub folder with config.json and safetensors")
    parser.add_argument("destination", type=Path, help="nanotron checkpoint folder to write; new or empty")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks (default: %(default)s)")
    parser.add_argument("--pp", type=int, default=1, help="pipeline ranks (default: %(default)s)")
    parser.add_argument("--step", type=int, default=0, help="name of the step folder (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        hub_to_nanotron(args.source, args.destination, tp=args.tp, pp=args.pp, step=args.step)
    except (FileNotFoundError, ValueError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
