"""`hf-nanotron torchrun`: torchrun, whose ranks need not import torch and transformers."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from typing import Any

DESCRIPTION = """\
Run a script on several processes as torchrun does, with torchrun's options, but without the seconds that each process
needs to import torch, transformers, datasets and hf_nanotron: one process of each host imports them, and ranks are
copies of it, in every restart.

  hf-nanotron torchrun --standalone --nproc-per-node 8 --max-restarts 10 train.py --lr 3e-4
  hf-nanotron torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint node0:29500 \\
      -m hf_nanotron.cli train run.yaml

--preload MODULE, repeatable, names another module to import once, such as hf_nanotron.trl.
All options: hf-nanotron torchrun --help."""

# What a run of ours has imported at its first step, but for the model's own module.
MODULES = ("hf_nanotron.trainer", "hf_nanotron.cli.train", "transformers.models.auto.modeling_auto", "datasets")


def add_torchrun_arguments(parser: argparse.ArgumentParser) -> None:
    """All arguments are torchrun's: the parsed ones get `run`, which takes them."""
    parser.add_argument(
        "torchrun",
        nargs=argparse.REMAINDER,
        metavar="torchrun's arguments",
        help="options, script.py or -m MODULE, ...",
    )
    parser.set_defaults(run=_torchrun)


def _torchrun(args: argparse.Namespace) -> None:
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.errors import record

    from ..launch.preloaded import ForkServer

    parser = torchrun.get_args_parser()
    parser.prog, parser.description = "hf-nanotron torchrun", DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--preload", action="append", default=[], metavar="MODULE",
        help="Module to import once, beside hf_nanotron's trainer and what it needs; repeatable.",
    )  # fmt: skip
    given = parser.parse_args(args.torchrun)
    check_options(given)
    python = os.getenv("PYTHON_EXEC", sys.executable)  # as torchrun finds it
    server = ForkServer(python, (*MODULES, *given.preload), server_environment(given, os.environ))
    with server:
        program = ["-u", *(["-m"] if given.module else []), given.training_script, *given.training_script_args]
        given.module, given.no_python = False, True
        given.training_script, given.training_script_args = python, server.stand_in(program)
        record(torchrun.run)(given)


def check_options(given: Any) -> None:
    """Refuse what would not run as under torchrun.

    Raises:
        ValueError: for a program that is not Python's, `--run-path`, and modules that are not there.
    """
    from ..launch.preloaded import why_not_importable

    if given.no_python:
        raise ValueError(f"--no-python: {given.training_script} imports nothing that could be preloaded; use torchrun.")
    if given.run_path:
        raise ValueError("--run-path starts no Python of a rank's own, so nothing can be preloaded; leave it out.")
    for name in given.preload:
        if (reason := why_not_importable(name)) is not None:
            raise ValueError(f"--preload {name}: {reason}.")


def server_environment(given: Any, environment: Mapping[str, str]) -> dict[str, str]:
    """The environment to import modules in. Ranks get their own.

    Libraries of threads read their number when they are loaded. Modules ask whether there is a GPU when they are
    imported (transformers does where flash-attention is installed): torch then starts CUDA, of which no copy of a
    process has a part, unless it is told to ask the driver's library instead.
    """
    from torch.distributed.run import determine_local_world_size

    alone = determine_local_world_size(given.nproc_per_node) <= 1
    threads = {} if alone else {"OMP_NUM_THREADS": "1"}  # torchrun's default
    return {**threads, **environment, "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
