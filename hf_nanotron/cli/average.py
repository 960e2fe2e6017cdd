"""`hf-nanotron average`: the mean of several Hub repositories of one model."""

from __future__ import annotations

import argparse
from pathlib import Path

DESCRIPTION = """\
Write the mean of the weights of several Hub repositories of one model, such as the last checkpoints of a run:

  hf-nanotron average out/checkpoint-800 out/checkpoint-900 out/checkpoint-1000 out/average

Tensors are read block by block and summed in float64; each keeps its dtype. Config and tokenizer are those of the
first folder."""


def add_average_arguments(parser: argparse.ArgumentParser) -> None:
    """The parsed arguments get `run`, which takes them."""
    parser.add_argument(
        "sources", nargs="+", type=Path, metavar="FOLDER", help="folders with config.json and safetensors; two or more"
    )
    parser.add_argument("destination", type=Path, metavar="OUT", help="folder to write; new or empty")
    parser.add_argument(
        "--weights",
        type=_numbers,
        metavar="W,W,...",
        help="weight of each folder, divided by their sum (default: all alike)",
    )
    parser.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="tensors per safetensors file (default: %(default)s)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier average in OUT")
    parser.set_defaults(run=_average, explains="the repositories cannot be averaged")


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be numbers with commas between them, such as 1,3") from None


def _average(args: argparse.Namespace) -> None:
    from ..convert.average import average

    average(
        args.sources,
        args.destination,
        weights=args.weights,
        max_shard_size=args.max_shard_size,
        overwrite=args.overwrite,
    )
    print(f"{args.destination} is the average of {len(args.sources)} repositories.")
