"""A copy of the fork server becomes what `python -u PROGRAM` would be: `__main__`, `sys.argv`, `sys.path`.

Where it cannot be the same, because of what is imported already, it is replaced by a Python of its own.
"""

from __future__ import annotations

import ast
import builtins
import importlib.util
import io
import os
import runpy
import sys
from collections.abc import Iterator, Sequence
from importlib.machinery import SourceFileLoader
from types import ModuleType

# Of environment variables that torch, its threads, Triton, transformers, datasets and the Hub's client read when they
# are imported. A script that sets one must be there first.
READ_EARLY = (
    "ACCELERATE_", "DATASETS_", "DISABLE_SAFETENSORS", "GOTO_", "HF_", "HUGGINGFACE_", "KMP_", "LD_", "MKL_",
    "NUMEXPR_", "OMP_", "OPENBLAS_", "PYTORCH_", "TORCH", "TRANSFORMERS_", "TRITON_", "TRL_", "USE_", "XDG_",
)  # fmt: skip


def become(program: Sequence[str]) -> None:
    """Run `program`, the arguments of a `python`: `-u SCRIPT ...` or `-u -m MODULE ...`. Raises what it raises."""
    arguments = list(program)
    while arguments and arguments[0] == "-u":
        del arguments[0]
    is_module = arguments[0] == "-m"
    if is_module:
        del arguments[0]
    name = arguments[0]
    sys.orig_argv = [sys.executable, *program]
    first = os.getcwd() if is_module else os.path.dirname(os.path.realpath(name))
    if not sys.flags.safe_path:
        sys.path.insert(0, first)
    sys.argv = ["-m", *arguments[1:]] if is_module else arguments
    sys.modules["__main__"] = main = ModuleType("__main__")
    vars(main).update(__builtins__=builtins, __annotations__={})
    if (reason := why_not(name, is_module, first)) is not None:
        if os.environ.get("RANK", "0") == "0":
            print(f"Ranks start without preloaded modules: {reason}.", file=sys.stderr, flush=True)
        _start_over(program)
    if is_module:
        runpy._run_module_as_main(name)  # type: ignore[attr-defined]  # what `python -m` calls
        return
    path = os.path.abspath(name)
    vars(main).update(__file__=path, __cached__=None)
    main.__loader__ = SourceFileLoader("__main__", path)
    with io.open_code(path) as file:
        code = compile(file.read(), path, "exec")
    exec(code, vars(main))


def why_not(name: str, is_module: bool, first: str) -> str | None:
    """Why the script or module `name` must not run where modules are imported already. None if it may.

    Args:
        first: the folder that comes first on its `sys.path`.
    """
    if not is_module and not (name.endswith(".py") and os.path.isfile(name)):
        return f"{name} is not a file that ends in .py"
    torch = sys.modules.get("torch")
    if torch is not None and (torch.cuda.is_initialized() or torch.cuda._is_in_bad_fork()):
        return "one of these modules has used a GPU"
    if (hidden := next(_hidden(first), None)) is not None:
        return f"{hidden} would be imported in the place of the one that is installed"
    if (variable := _set_early(name, is_module)) is not None:
        return (
            f"{name} sets {variable}, which is read when these modules are imported; set it in the command's "
            "environment instead"
        )
    return None


def _start_over(program: Sequence[str]) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *program])


def _hidden(folder: str) -> Iterator[str]:
    """Files of `folder` that would have been imported by a name that is taken."""
    try:
        names = os.listdir(folder)
    except OSError:
        return
    for entry in sorted(names):
        path = os.path.join(folder, entry)
        name, suffix = os.path.splitext(entry)
        if suffix != ".py" and not (suffix == "" and os.path.isfile(os.path.join(path, "__init__.py"))):
            continue
        module = sys.modules.get(name)
        if module is None or name == "__main__" or name in sys.builtin_module_names:
            continue
        source = getattr(module, "__file__", None) or ""
        own = path if suffix else os.path.join(path, "__init__.py")
        if os.path.realpath(source) != os.path.realpath(own):
            yield path


def _set_early(name: str, is_module: bool) -> str | None:
    """The first environment variable of `READ_EARLY` that the program's own file sets."""
    path: str | None = name
    if is_module:
        try:
            spec = importlib.util.find_spec(name)
            if spec is not None and spec.submodule_search_locations is not None:
                spec = importlib.util.find_spec(f"{name}.__main__")
        except (ImportError, ValueError):
            return None  # which says Python itself
        path = spec.origin if spec is not None else None
    if path is None or not path.endswith(".py"):
        return None
    try:
        with open(path, "rb") as file:
            tree = ast.parse(file.read())
    except (OSError, SyntaxError, ValueError):
        return None
    return next((each for each in _variables_set(tree) if each.startswith(READ_EARLY)), None)


def _variables_set(tree: ast.AST) -> Iterator[str]:
    """Names in `os.environ[NAME] = ...`, its `setdefault(NAME, ...)` and `update(...)`, and `os.putenv(NAME, ...)`."""
    for node in ast.walk(tree):
        found: list[ast.expr | None] = []
        if isinstance(node, ast.Assign | ast.AugAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found += [each.slice for each in targets if isinstance(each, ast.Subscript) and _is_environ(each.value)]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            method, owner = node.func.attr, node.func.value
            if method == "putenv" or method == "setdefault" and _is_environ(owner):
                found += node.args[:1]
            elif method == "update" and _is_environ(owner):
                found += [key for each in node.args if isinstance(each, ast.Dict) for key in each.keys]
                yield from (each.arg for each in node.keywords if each.arg is not None)
        for each in found:
            if isinstance(each, ast.Constant) and isinstance(each.value, str):
                yield each.value


def _is_environ(node: ast.expr) -> bool:
    return getattr(node, "attr", getattr(node, "id", None)) == "environ"
