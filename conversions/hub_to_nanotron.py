"""Convert a Hub checkpoint of Llama or Qwen2 into a huggingface/nanotron checkpoint, weights only.

python conversions/hub_to_nanotron.py SRC DST [--tp 1] [--pp 1] [--step 0]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from hf_nanotron.convert.nanotron.arguments import add_hub_to_nanotron_arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Run the conversion that the command line `argv` describes (default: `sys.argv`)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_hub_to_nanotron_arguments(parser)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except (FileNotFoundError, ValueError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
