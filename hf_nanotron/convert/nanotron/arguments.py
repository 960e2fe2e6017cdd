"""Command-line arguments of the two conversions, for `hf-nanotron convert` and `conversions/*.py`. Loads no torch."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_nanotron_to_hub_arguments(parser: argparse.ArgumentParser) -> None:
    """Make `parser` one of `nanotron_to_hub`; the parsed arguments get `run`, which takes them."""
    parser.add_argument("source", type=Path, help="checkpoint folder with latest.txt, or one of its step folders")
    parser.add_argument("destination", type=Path, help="Hub folder to write; new or empty")
    parser.add_argument(
        "--master-weights", action="store_true", help="write the optimizer's fp32 masters instead of the weights"
    )
    parser.add_argument("--max-shard-size", default="5GB", help="tensors per safetensors file (default: %(default)s)")
    parser.set_defaults(run=_run_nanotron_to_hub)


def _run_nanotron_to_hub(args: argparse.Namespace) -> None:
    from .convert import nanotron_to_hub

    nanotron_to_hub(
        args.source, args.destination, master_weights=args.master_weights, max_shard_size=args.max_shard_size
    )


def add_hub_to_nanotron_arguments(parser: argparse.ArgumentParser) -> None:
    """Make `parser` one of `hub_to_nanotron`; the parsed arguments get `run`, which takes them."""
    parser.add_argument("source", type=Path, help="local Hub folder with config.json and safetensors")
    parser.add_argument("destination", type=Path, help="nanotron checkpoint folder to write; new or empty")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks (default: %(default)s)")
    parser.add_argument("--pp", type=int, default=1, help="pipeline ranks (default: %(default)s)")
    parser.add_argument("--step", type=int, default=0, help="name of the step folder (default: %(default)s)")
    parser.set_defaults(run=_run_hub_to_nanotron)


def _run_hub_to_nanotron(args: argparse.Namespace) -> None:
    from .convert import hub_to_nanotron

    hub_to_nanotron(args.source, args.destination, tp=args.tp, pp=args.pp, step=args.step)
