"""Convert a Hub repository into a checkpoint at step 0: fp32 masters without optimizer state.

python conversions/hub_to_sharded.py SRC DST [--revision REV] [--max-shard-size 1GB] [--no-weights] [--overwrite]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from hf_nanotron.convert.sharded_arguments import add_hub_to_sharded_arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Run the conversion that the command line `argv` describes (default: `sys.argv`)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_hub_to_sharded_arguments(parser)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except (FileNotFoundError, ValueError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
