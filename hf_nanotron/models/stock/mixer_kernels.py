"""Kernels of state-space models and delta rules that transformers takes from other packages where they are installed.

Its modeling files decorate plain functions with the name of a kernel and of the package that has it
(`integrations/hub_kernels.py` of transformers). Which of both runs is decided when the file is imported.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from .anatomy import Anatomy

# Package -> what to install, and the extra that does. fla-core is flash-linear-attention without its models, which
# would take the place of transformers' own of the same types ("mamba").
PACKAGES = {
    "fla": ("fla-core", "linear-attention"),
    "mamba_ssm": ("mamba-ssm", "mamba"),
    "causal_conv1d": ("causal-conv1d", "mamba"),
}


class Choice(NamedTuple):
    """`name`: of the kernel. `fallback`: the plain function. `installed`: whether the kernel runs in its place."""

    name: str
    package: str
    fallback: Callable[..., Any]
    installed: bool


def choice_of(function: Any) -> Choice | None:
    """What stands behind a function that may have a kernel; None for any other."""
    code = getattr(function, "__code__", None)
    closure = getattr(function, "__closure__", None)
    if code is None or not closure:
        return None
    cells = dict(zip(code.co_freevars, closure, strict=True))
    if not {"torch_function", "implementation", "package", "func_name"} <= cells.keys():
        return None
    held = {name: cell.cell_contents for name, cell in cells.items()}
    plain = held["torch_function"]
    return Choice(held["func_name"], held["package"], plain, held["implementation"] is not plain)


def kernels_of(anatomy: Anatomy) -> list[str]:
    """A sentence for the log for each kernel that the layers of a model could use: which one runs, and what to
    install for a faster one.
    """
    files = {type(module).__module__ for _, block in anatomy.blocks() for module in block.modules()}
    sentences = set()
    for file in files:
        for function in vars(sys.modules.get(file, object)).values():
            choice = choice_of(function)
            if choice is None or choice.name.endswith(("_update", "_step")) or "recurrent" in choice.name:
                continue  # of generation, which trains nothing
            package, extra = PACKAGES.get(choice.package, (choice.package, None))
            if choice.installed:
                sentences.add(f"{choice.name}: the kernel of {package}")
            else:
                how = f"pip install hf-nanotron[{extra}]" if extra else f"pip install {package}"
                sentences.add(f"{choice.name}: plain torch; {package} has a faster kernel ({how})")
    return sorted(sentences)
