"""Convert a huggingface/nanotron checkpoint of Llama or Qwen2 into a Hub repository.

python conversions/nanotron_to_hub.py SRC DST [--master-weights] [--max-shard-size 5GB]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from hf_nanotron.convert.nanotron.arguments import add_nanotron_to_hub_arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Run the conversion that the command line `argv` describes (default: `sys.argv`)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_nanotron_to_hub_arguments(parser)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except (FileNotFoundError, ValueError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
