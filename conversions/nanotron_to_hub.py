"""Convert a huggingface/nanotron checkpoint of Llama or Qwen2 into a Hub repository.

python conversions/nanotron_to_hub.py SRC DST [--master-weights] [--max-shard-size 5GB] [--overwrite]
"""

from __future__ import annotations

from collections.abc import Sequence

from hf_nanotron.convert.arguments import run_script


def main(argv: Sequence[str] | None = None) -> None:
    """Run the conversion that the command line `argv` describes (default: `sys.argv`)."""
    run_script("nanotron-to-hub", __doc__, argv)


if __name__ == "__main__":
    main()
