"""Convert a huggingface/nanotron checkpoint of Llama or Qwen2 into a Hub repository.

python conversions/nanotron_to_hub.py SRC DST [--master-weights] [--max-shard-size 5GB]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from hf_nanotron.checkpoint.nanotron_convert import nanotron_to_hub


def main(argv: Sequence[str] | None = None) -> None:
    """Run the conversion that the command line `argv` describes (default: `sys.argv`)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="checkpoint folder with latest.txt, or one of its step folders")
    parser.add_argument("destination", type=Path, help="Hub folder to write; new or empty")
    parser.add_argument(
        "--master-weights", action="store_true", help="write the optimizer's fp32 masters instead of the weights"
    )
    parser.add_argument("--max-shard-size", default="5GB", help="tensors per safetensors file (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        nanotron_to_hub(
            args.source, args.destination, master_weights=args.master_weights, max_shard_size=args.max_shard_size
        )
    except (FileNotFoundError, ValueError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
