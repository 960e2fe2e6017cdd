"""Which modules loop over tokens in Python: a compiler would unroll the loop, into a graph that grows with the row.

The source of a module's `forward` is read, and that of the functions that it calls. Families are not known by name: a
delta rule or a scan whose kernel is installed has no loop (`models/stock/mixer_kernels.py`), and code of a user's own
is read as transformers' is.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterable
from types import FunctionType, MethodType
from typing import Any, NamedTuple

from torch import nn

from ..models.stock.mixer_kernels import choice_of

LONG = 32  # turns of a loop of a fixed length (chunks of 64 tokens, say) from which on it counts
DEPTH = 8  # of calls that are followed
SIZES = ("shape", "size", "numel")  # what asks a tensor for a number that depends on the row


def token_loop(module: nn.Module) -> str | None:
    """Where `module`, without the modules inside it, loops over tokens, such as
    `"torch_chunk_delta_rule, line 484 of modeling_x.py"`; None if it does not, or if its source is not at hand.
    """
    if type(module).__module__.partition(".")[0] == "torch":
        return None
    return _loop_in(type(module).forward, module, frozenset(), DEPTH, set())


def modules_with_loops(module: nn.Module) -> dict[nn.Module, str]:
    """Those among `module` and the modules in it that loop over tokens, and where."""
    found = ((part, token_loop(part)) for part in module.modules())
    return {part: where for part, where in found if where is not None}


def _loop_in(
    called: Any, module: nn.Module | None, row_sizes: frozenset[str], depth: int, seen: set[tuple[Any, ...]]
) -> str | None:
    """The first loop in a function and what it calls. `row_sizes`: its parameters that hold sizes of the row."""
    function = _written_function(called)
    if function is None or depth == 0 or (function.__code__, row_sizes) in seen:
        return None
    seen.add((function.__code__, row_sizes))
    source = _read(function.__code__)
    if source is None:
        return None
    names = _row_sizes(source.assignments, row_sizes)
    for stop in source.ends:
        if _of_the_row(stop, names) or _known_number(stop, function, module) >= LONG:
            line = function.__code__.co_firstlineno - 1 + stop.lineno
            file = function.__code__.co_filename.rpartition("/")[2]
            return f"{function.__name__}, line {line} of {file}"
    for call in source.calls:
        inner = _resolve(call.func, function, module)
        if inner is not None:
            found = _loop_in(inner, module, _handed_on(call, inner, names), depth - 1, seen)
            if found is not None:
                return found
    return None


class Source(NamedTuple):
    """What is read of a function: its assignments in their order, what its loops over ranges end at, its calls."""

    assignments: tuple[ast.Assign | ast.AnnAssign | ast.NamedExpr, ...]
    ends: tuple[ast.expr, ...]
    calls: tuple[ast.Call, ...]


def _written_function(called: Any) -> FunctionType | None:
    """The function whose source runs when `called` is: below decorators, and the one of two that is chosen."""
    while True:
        called = called.__func__ if isinstance(called, MethodType) else called
        choice = choice_of(called)
        if choice is not None:
            if choice.installed:
                return None
            called = choice.fallback
        elif isinstance(called, FunctionType) and hasattr(called, "__wrapped__"):
            called = called.__wrapped__
        else:
            break
    if not isinstance(called, FunctionType) or (called.__module__ or "").partition(".")[0] == "torch":
        return None
    return called


@functools.cache
def _read(code: Any) -> Source | None:
    try:
        nodes = list(ast.walk(ast.parse(textwrap.dedent(inspect.getsource(code)))))
    except (OSError, SyntaxError, TypeError):
        return None
    assignments = [node for node in nodes if isinstance(node, ast.Assign | ast.AnnAssign | ast.NamedExpr)]
    ends = [end for end in map(_end_of_range, nodes) if end is not None]
    calls = tuple(node for node in nodes if isinstance(node, ast.Call))
    return Source(tuple(sorted(assignments, key=lambda node: node.lineno)), tuple(ends), calls)


def _row_sizes(assignments: Iterable[Any], parameters: Iterable[str]) -> frozenset[str]:
    """Names that are given sizes of tensors, or numbers made of them."""
    names = set(parameters)
    for node in assignments:
        if node.value is None or not _of_the_row(node.value, names):
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        names |= {part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)}
    return frozenset(names)


def _of_the_row(node: ast.AST, names: Iterable[str]) -> bool:
    """Whether an expression is a number that is made of sizes of tensors: by arithmetic alone, or by min and max."""
    if isinstance(node, ast.Name):
        return node.id in names
    if isinstance(node, ast.Attribute):
        return node.attr == "shape"
    if isinstance(node, ast.Subscript):
        return _of_the_row(node.value, names)
    if isinstance(node, ast.BinOp):
        return _of_the_row(node.left, names) or _of_the_row(node.right, names)
    if isinstance(node, ast.Tuple):
        return any(_of_the_row(part, names) for part in node.elts)
    if isinstance(node, ast.IfExp):
        return _of_the_row(node.body, names) or _of_the_row(node.orelse, names)
    if isinstance(node, ast.Call):
        if isinstance(node.func, ast.Attribute):
            return node.func.attr in SIZES or (node.func.attr == "ceil" and _any_of_the_row(node.args, names))
        return (
            isinstance(node.func, ast.Name)
            and node.func.id in ("min", "max", "int")
            and _any_of_the_row(node.args, names)
        )
    return False


def _any_of_the_row(nodes: Iterable[ast.AST], names: Iterable[str]) -> bool:
    return any(_of_the_row(node, names) for node in nodes)


def _end_of_range(node: ast.AST) -> ast.expr | None:
    """What a loop over a `range` ends at."""
    if not isinstance(node, ast.For | ast.comprehension):
        return None
    of = node.iter
    if not (isinstance(of, ast.Call) and isinstance(of.func, ast.Name) and of.func.id == "range" and of.args):
        return None
    return of.args[0] if len(of.args) == 1 else of.args[1]


def _known_number(node: ast.AST, function: FunctionType, module: nn.Module | None) -> int:
    """What an expression is, if it is a literal, a parameter's default or a field of the module; else 0."""
    found: Any = 0
    if isinstance(node, ast.Constant):
        found = node.value
    elif isinstance(node, ast.Name):
        parameter = inspect.signature(function).parameters.get(node.id)
        found = None if parameter is None else parameter.default
    elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
        found = getattr(module, node.attr, 0)
    return found if isinstance(found, int) else 0


def _resolve(node: ast.AST, function: FunctionType, module: nn.Module | None) -> Any:
    """The function of a call `name(...)` or `self.name(...)`; None for modules, classes and what is not known."""
    found: Any = None
    if isinstance(node, ast.Name):
        found = function.__globals__.get(node.id)
    elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
        found = getattr(module, node.attr, None)
    return found if isinstance(found, FunctionType | MethodType) else None


def _handed_on(call: ast.Call, inner: Any, names: frozenset[str]) -> frozenset[str]:
    """The parameters of `inner` that get sizes of the row in this call."""
    function = _written_function(inner)
    if function is None or not _any_of_the_row((*call.args, *(word.value for word in call.keywords)), names):
        return frozenset()
    parameters = list(inspect.signature(function).parameters)
    if isinstance(inner, MethodType):
        parameters = parameters[1:]
    given = [*zip(parameters, call.args, strict=False), *((word.arg, word.value) for word in call.keywords)]
    return frozenset(name for name, value in given if name in parameters and _of_the_row(value, names))
