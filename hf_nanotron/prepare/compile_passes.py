"""What is changed in the graph of a compiled block before it is compiled further."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

Backend = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]


def rewriting(backend: Backend) -> Backend:
    """A backend of `torch.compile` that hands rewritten graphs to `backend`."""

    def compile(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        for module in graph_module.modules():  # what is recomputed has a graph of its own
            if isinstance(module, fx.GraphModule):
                roll_halves(module)
        return backend(graph_module, inputs)

    return compile


def roll_halves(graph_module: fx.GraphModule) -> None:
    """Compute `cat(-x[..., h:], x[..., :h])` of rotary embeddings as a rotation of `x` times signs, in place.

    The same numbers. Its gradient is one read at another place, where that of the slices is a sum of filled-up halves.
    Torch's own functions alone are put in: a graph with others is not taken from the cache of compiled code.
    """
    graph = graph_module.graph
    for node in graph.nodes:
        x = _rotated(node)
        if x is None:
            continue
        example = x.meta["example_value"]
        width, device = example.shape[-1], example.device
        with graph.inserting_before(node):
            rolled = graph.call_function(torch.roll, (x, width // 2, -1))
            place = graph.call_function(torch.arange, (width,), {"device": device})
            is_first = graph.call_function(torch.lt, (place, width // 2))
            negated = graph.call_function(torch.neg, (rolled,))
            rotated = graph.call_function(torch.where, (is_first, negated, rolled))
        rotated.meta["example_value"] = node.meta["example_value"]
        node.replace_all_uses_with(rotated)
        graph.erase_node(node)  # what it read is left to the compiler, which knows what has effects
    graph.lint()
    graph_module.recompile()


def _rotated(node: Any) -> Any:
    """The `x` of which `node` rotates the two halves of the last dimension; None if it does not."""
    if node.op != "call_function" or node.target is not torch.cat:
        return None
    parts, dim = node.args[0], node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    if dim != -1 or not isinstance(parts, list | tuple) or len(parts) != 2:
        return None
    minus, first = parts
    if not all(isinstance(part, fx.Node) for part in parts) or minus.target is not operator.neg:
        return None
    second = minus.args[0]
    low, high = _last_slice(first), _last_slice(second)
    if low is None or high is None or low[0] is not high[0]:
        return None
    width = low[0].meta["example_value"].shape[-1]
    halves = (slice(None, width // 2), slice(width // 2, None))
    known = isinstance(width, int) and width % 2 == 0
    return low[0] if known and (low[1], high[1]) == halves else None


def _last_slice(node: Any) -> tuple[Any, slice] | None:
    """`x` and `s` of a node `x[..., s]`."""
    if not isinstance(node, fx.Node) or node.target is not operator.getitem or not isinstance(node.args[1], tuple):
        return None
    index = node.args[1]
    if len(index) != 2 or index[0] is not Ellipsis or not isinstance(index[1], slice):
        return None
    start, stop, step = index[1].start, index[1].stop, index[1].step
    return (node.args[0], slice(start or None, stop)) if step is None else None
