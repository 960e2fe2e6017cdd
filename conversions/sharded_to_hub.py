"""Convert a checkpoint's training state into a Hub repository.

python conversions/sharded_to_hub.py SRC DST [--dtype auto] [--max-shard-size 5GB] [--frozen-from DIR] [--overwrite]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from hf_nanotron.convert.sharded_arguments import add_sharded_to_hub_arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Run the conversion that the command line `argv` describes (default: `sys.argv`)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sharded_to_hub_arguments(parser)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except (FileNotFoundError, ValueError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
