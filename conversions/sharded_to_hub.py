"""Convert a checkpoint's training state into a Hub repository.

python conversions/sharded_to_hub.py SRC DST [--dtype auto] [--max-shard-size 5GB] [--frozen-from DIR] [--overwrite]
"""

from __future__ import annotations

from collections.abc import Sequence

from hf_nanotron.convert.arguments import run_script


def main(argv: Sequence[str] | None = None) -> None:
    """Run the conversion that the command line `argv` describes (default: `sys.argv`)."""
    run_script("sharded-to-hub", __doc__, argv)


if __name__ == "__main__":
    main()
