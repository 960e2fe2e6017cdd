"""Convert a Hub checkpoint of Llama or Qwen2 into a huggingface/nanotron checkpoint, weights only.

python conversions/hub_to_nanotron.py SRC DST [--tp 1] [--pp 1] [--step 0] [--overwrite]
"""

from __future__ import annotations

from collections.abc import Sequence

from hf_nanotron.convert.arguments import run_script


def main(argv: Sequence[str] | None = None) -> None:
    """Run the conversion that the command line `argv` describes (default: `sys.argv`)."""
    run_script("hub-to-nanotron", __doc__, argv)


if __name__ == "__main__":
    main()
