"""A user's own parts of a run, in a Python file beside the YAML file: model, loss, collator, optimizer, callbacks."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

FUNCTIONS = {"make_model": ("config",), "trainer_arguments": ("model", "args")}
OURS = ("model", "args", "train_dataset", "eval_dataset", "processing_class", "doremi", "teacher", "model_init")


def load_script(path: Path) -> ModuleType:
    """The module of a script.

    Raises:
        ValueError: for a file that is not there or has none of `FUNCTIONS`, or one with other arguments.
    """
    wanted = " or ".join(f"{name}({', '.join(arguments)})" for name, arguments in FUNCTIONS.items())
    if not path.is_file():
        raise ValueError(f"--script {path}: file not found; it is a Python file with {wanted}.")
    sys.path.insert(0, str(path.resolve().parent))  # as for a script that is run
    name = path.stem
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"--script {path} is not a Python file; it is one with {wanted}.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ValueError(f"--script {path} cannot be imported: {type(error).__name__}: {error}") from error
    found = [name for name in FUNCTIONS if callable(getattr(module, name, None))]
    if not found:
        raise ValueError(f"--script {path} has no function {wanted}.")
    for name in found:
        arguments = list(inspect.signature(getattr(module, name)).parameters)
        if len(arguments) != len(FUNCTIONS[name]):
            raise ValueError(
                f"--script {path}: {name} takes ({', '.join(arguments)}); it must take ({', '.join(FUNCTIONS[name])})."
            )
    return module


def function(module: ModuleType | None, name: str) -> Callable[..., Any] | None:
    return None if module is None else getattr(module, name, None)


def keywords(module: ModuleType | None, model: Any, args: Any) -> dict[str, Any]:
    """What `trainer_arguments(model, args)` of a script returns: keywords of a Trainer.

    Raises:
        ValueError: for something else than a mapping, and keywords that the check fills itself.
    """
    make = function(module, "trainer_arguments")
    if make is None:
        return {}
    given = make(model, args)
    if not isinstance(given, dict):
        raise ValueError(f"--script: trainer_arguments returned a {type(given).__name__}, not a dict of keywords.")
    if taken := [name for name in given if name in OURS]:
        raise ValueError(f"--script: trainer_arguments returned {taken[0]!r}, which check fills itself; leave it out.")
    return given
