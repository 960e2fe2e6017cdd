"""Command-line arguments of the training state's conversions, for `hf-nanotron convert` and `conversions/*.py`.

Loads no torch.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_sharded_to_hub_arguments(parser: argparse.ArgumentParser) -> None:
    """Make `parser` one of `sharded_to_hub`; the parsed arguments get `run`, which takes them."""
    parser.add_argument("source", type=Path, help="checkpoint-N of a run, with its training_state/")
    parser.add_argument("destination", type=Path, help="Hub folder to write; new or empty")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="float32 is the exact masters (default: what the checkpoint's config states)",
    )
    parser.add_argument("--max-shard-size", default="5GB", help="tensors per safetensors file (default: %(default)s)")
    parser.add_argument(
        "--frozen-from",
        type=Path,
        metavar="DIR",
        help="Hub folder with the tensors that were not trained (default: the checkpoint)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier repository in the destination")
    parser.set_defaults(run=_run_sharded_to_hub)


def _run_sharded_to_hub(args: argparse.Namespace) -> None:
    from .sharded import sharded_to_hub

    sharded_to_hub(
        args.source,
        args.destination,
        dtype=args.dtype,
        max_shard_size=args.max_shard_size,
        frozen_from=args.frozen_from,
        overwrite=args.overwrite,
    )


def add_hub_to_sharded_arguments(parser: argparse.ArgumentParser) -> None:
    """Make `parser` one of `hub_to_sharded`; the parsed arguments get `run`, which takes them."""
    parser.add_argument("source", help="folder with config.json and safetensors, or a Hub id")
    parser.add_argument("destination", type=Path, help="checkpoint to write, such as out/checkpoint-0; new or empty")
    parser.add_argument("--revision", help="of a Hub id")
    parser.add_argument("--max-shard-size", default="1GB", help="masters per file of the state (default: %(default)s)")
    parser.add_argument(
        "--no-weights", action="store_true", help="leave the repository's own safetensors out of the checkpoint"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier conversion in the destination")
    parser.set_defaults(run=_run_hub_to_sharded)


def _run_hub_to_sharded(args: argparse.Namespace) -> None:
    from .sharded import hub_to_sharded

    hub_to_sharded(
        args.source,
        args.destination,
        revision=args.revision,
        max_shard_size=args.max_shard_size,
        copy_weights=not args.no_weights,
        overwrite=args.overwrite,
    )
