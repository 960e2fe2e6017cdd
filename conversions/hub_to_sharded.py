"""Convert a Hub repository into a checkpoint at step 0: fp32 masters without optimizer state.

python conversions/hub_to_sharded.py SRC DST [--revision REV] [--max-shard-size 1GB] [--no-weights] [--overwrite]
"""

from __future__ import annotations

from collections.abc import Sequence

from hf_nanotron.convert.arguments import run_script


def main(argv: Sequence[str] | None = None) -> None:
    """Run the conversion that the command line `argv` describes (default: `sys.argv`)."""
    run_script("hub-to-sharded", __doc__, argv)


if __name__ == "__main__":
    main()
