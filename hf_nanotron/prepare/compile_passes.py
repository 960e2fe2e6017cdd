"""What is changed in the graph of a compiled block before it is compiled further."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from ..ops.joint_linear import joint_linear

# Rows of the narrowest weight up to which linears are joined. Wider ones are as fast apart (measured on an H100 with
# 2,048 to 14,336 rows, and with 512 beside 2,048), and joined they cost a pass that puts gradients side by side.
NARROW = 256

Backend = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]


def rewriting(backend: Backend, joins: bool = True) -> Backend:
    """A backend of `torch.compile` that hands rewritten graphs to `backend`, narrow linears joined if `joins`."""

    def compile(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        for module in graph_module.modules():  # what is recomputed has a graph of its own
            if isinstance(module, fx.GraphModule):
                if joins:
                    join_linears(module)
                roll_halves(module)
        return backend(graph_module, inputs)

    return compile


def join_linears(graph_module: fx.GraphModule) -> None:
    """Compute linear layers over one input (query, key and value; gate and up) as one product, in place.

    Last first: buckets hold weights in the order in which the backward meets them.
    """
    graph = graph_module.graph
    by_input: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        if _is_linear(node):
            by_input.setdefault(node.args[0], []).append(node)
    for input, nodes in by_input.items():
        if len(nodes) < 2 or not all(map(_is_given, nodes)) or any(map(_is_in_place, input.users)):
            continue
        _, weights, biases, keys = zip(*(node.args for node in reversed(nodes)), strict=True)
        if min(map(_out_features, weights)) > NARROW:
            continue
        with graph.inserting_before(nodes[0]):
            joint = graph.call_function(joint_linear._opoverload, (input, list(weights), list(keys)))
            sizes = [_out_features(weight) for weight in weights]
            parts = graph.call_function(torch.split, (joint, sizes), {"dim": -1})
            for index, (node, bias) in enumerate(zip(reversed(nodes), biases, strict=True)):
                part = graph.call_function(_item, (parts, index))
                if bias is not None:
                    part = graph.call_function(torch.add, (part, bias))
                elif any(_is_in_place(user) for user in node.users):
                    part = graph.call_function(torch.clone, (part,))
                node.replace_all_uses_with(part)
        for node in nodes:
            graph.erase_node(node)
    graph.lint()
    graph_module.recompile()


def roll_halves(graph_module: fx.GraphModule) -> None:
    """Compute `cat(-x[..., h:], x[..., :h])` of rotary embeddings as a rotation of `x` times signs, in place.

    The same numbers. Its gradient is one read at another place, where that of the slices is a sum of filled-up halves.
    """
    graph = graph_module.graph
    for node in graph.nodes:
        x = _rotated(node)
        if x is None:
            continue
        half = x.meta["example_value"].shape[-1] // 2
        with graph.inserting_before(node):
            rolled = graph.call_function(torch.roll, (x, half, -1))
            rotated = graph.call_function(_negate_first, (rolled, half))
        node.replace_all_uses_with(rotated)
        graph.erase_node(node)  # what it read is left to the compiler, which knows what has effects
    graph.lint()
    graph_module.recompile()


def _negate_first(x: torch.Tensor, half: int) -> torch.Tensor:
    return torch.where(torch.arange(x.shape[-1], device=x.device) < half, -x, x)


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
    return low[0] if width % 2 == 0 and (low[1], high[1]) == halves else None


def _last_slice(node: Any) -> tuple[Any, slice] | None:
    """`x` and `s` of a node `x[..., s]`."""
    if not isinstance(node, fx.Node) or node.target is not operator.getitem or not isinstance(node.args[1], tuple):
        return None
    index = node.args[1]
    if len(index) != 2 or index[0] is not Ellipsis or not isinstance(index[1], slice):
        return None
    start, stop, step = index[1].start, index[1].stop, index[1].step
    return (node.args[0], slice(start or None, stop)) if step is None else None


def _item(parts: Sequence[torch.Tensor], index: int) -> torch.Tensor:
    return parts[index]


def _is_linear(node: fx.Node) -> bool:
    linear = torch.ops.hf_nanotron.linear
    return node.op == "call_function" and node.target in (linear, linear.default)


def _is_in_place(node: fx.Node) -> bool:
    return node.op == "call_method" and str(node.target).endswith("_")


def _is_given(node: fx.Node) -> bool:
    """Whether weight, bias and key of a linear are inputs of the graph, there before any of its nodes."""
    return all(x is None or (isinstance(x, fx.Node) and x.op in ("placeholder", "get_attr")) for x in node.args[1:])


def _out_features(weight: fx.Node) -> int:
    return int(weight.meta["example_value"].shape[0])
