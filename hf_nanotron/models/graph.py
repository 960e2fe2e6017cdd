"""What is changed in the graph of a compiled block before it is compiled further."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from ..ops.joint_linear import joint_linear

# Rows of the narrowest weight up to which linears are joined: wide products gain nothing from it, and lose the pass
# that puts the gradients of their outputs side by side.
NARROW = 2048

Backend = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]


def rewriting(backend: Backend) -> Backend:
    """A backend of `torch.compile` that hands rewritten graphs to `backend`."""

    def compile(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        for module in graph_module.modules():  # what is recomputed has a graph of its own
            if isinstance(module, fx.GraphModule):
                join_linears(module)
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
        if len(nodes) < 2 or not all(_is_given(node) for node in nodes):
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


def _item(parts: Sequence[torch.Tensor], index: int) -> torch.Tensor:
    return parts[index]


def _is_linear(node: fx.Node) -> bool:
    operator = torch.ops.hf_nanotron.linear
    return node.op == "call_function" and node.target in (operator, operator.default)


def _is_in_place(node: fx.Node) -> bool:
    return node.op == "call_method" and str(node.target).endswith("_")


def _is_given(node: fx.Node) -> bool:
    """Whether weight, bias and key of a linear are inputs of the graph, there before any of its nodes."""
    return all(x is None or (isinstance(x, fx.Node) and x.op in ("placeholder", "get_attr")) for x in node.args[1:])


def _out_features(weight: fx.Node) -> int:
    return int(weight.meta["example_value"].shape[0])
