"""The conversions' command lines, for `hf-nanotron convert` and `conversions/*.py`. Loads no torch."""

from __future__ import annotations

import argparse
import importlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_HUB_FOLDER: dict[str, Any] = {"type": Path, "help": "Hub folder to write; new or empty"}
_FILE_SIZE: dict[str, Any] = {"default": "5GB", "help": "tensors per safetensors file (default: %(default)s)"}
_OVERWRITE: dict[str, Any] = {"action": "store_true", "help": "replace an earlier conversion in the destination"}


@dataclass(frozen=True)
class Conversion:
    """A direction: `module` has a function of its name, whose parameters are those of `arguments`."""

    summary: str
    module: str
    arguments: dict[str, dict[str, Any]]
    what: str = "checkpoint"  # is converted


CONVERSIONS = {
    "sharded-to-hub": Conversion(
        "convert the training state of a checkpoint to a Hub repository",
        ".sharded",
        {
            "source": {"type": Path, "help": "checkpoint-N of a run, with its training_state/"},
            "destination": _HUB_FOLDER,
            "--dtype": {
                "choices": ("auto", "float32", "bfloat16", "float16"),
                "default": "auto",
                "help": "float32 writes the exact masters (default: the dtype in the checkpoint's config)",
            },
            "--max-shard-size": _FILE_SIZE,
            "--frozen-from": {
                "type": Path,
                "metavar": "DIR",
                "help": "Hub folder with the tensors that were not trained (default: the checkpoint)",
            },
            "--overwrite": _OVERWRITE,
        },
    ),
    "hub-to-sharded": Conversion(
        "convert a Hub repository to a checkpoint at step 0, for any layout",
        ".sharded",
        {
            "source": {"help": "folder with config.json and safetensors, or a Hub id"},
            "destination": {"type": Path, "help": "checkpoint to write, such as out/checkpoint-0; new or empty"},
            "--revision": {"help": "branch, tag or commit of a Hub id"},
            "--max-shard-size": {"default": "1GB", "help": "masters per file of the state (default: %(default)s)"},
            "--no-weights": {
                "dest": "copy_weights",
                "action": "store_false",
                "help": "do not copy the repository's own safetensors into the checkpoint",
            },
            "--overwrite": _OVERWRITE,
        },
    ),
    "nanotron-to-hub": Conversion(
        "convert a nanotron checkpoint of any tp and pp to a Hub repository",
        ".nanotron.convert",
        {
            "source": {"type": Path, "help": "checkpoint folder with latest.txt, or one of its step folders"},
            "destination": _HUB_FOLDER,
            "--master-weights": {
                "action": "store_true",
                "help": "write the optimizer's fp32 masters instead of the weights",
            },
            "--max-shard-size": _FILE_SIZE,
            "--overwrite": _OVERWRITE,
        },
    ),
    "hub-to-nanotron": Conversion(
        "convert a Hub checkpoint to a nanotron checkpoint, weights only",
        ".nanotron.convert",
        {
            "source": {"type": Path, "help": "local Hub folder with config.json and safetensors"},
            "destination": {"type": Path, "help": "nanotron checkpoint folder to write; new or empty"},
            "--tp": {"type": int, "default": 1, "help": "tensor-parallel ranks (default: %(default)s)"},
            "--pp": {"type": int, "default": 1, "help": "pipeline ranks (default: %(default)s)"},
            "--step": {"type": int, "default": 0, "help": "name of the step folder (default: %(default)s)"},
            "--overwrite": _OVERWRITE,
        },
    ),
    "nanotron-config": Conversion(
        "convert a run's configuration of nanotron to a YAML file for hf-nanotron train",
        ".nanotron.run.config",
        {
            "source": {"type": Path, "help": "nanotron's YAML file"},
            "destination": {"type": Path, "help": "YAML file to write"},
            "--overwrite": {"action": "store_true", "help": "replace the destination"},
        },
        what="configuration",
    ),
}


def add_arguments(parser: argparse.ArgumentParser, direction: str) -> None:
    """Make `parser` that of a conversion; the parsed arguments get `run`, which takes them."""
    conversion = CONVERSIONS[direction]

    def run(args: argparse.Namespace) -> None:
        convert = getattr(importlib.import_module(conversion.module, __package__), direction.replace("-", "_"))
        convert(**{name: getattr(args, name) for name in inspect.signature(convert).parameters})

    for name, options in conversion.arguments.items():
        parser.add_argument(name, **options)
    parser.set_defaults(run=run)


def run_script(direction: str, description: str | None, argv: Sequence[str] | None = None) -> None:
    """A conversion as a script of its own. Exits with 1 after a refusal."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, direction)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except (FileNotFoundError, ValueError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
