"""Graphs that are too large to be worth compiling run as they were captured, one operator after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx
from torch._dynamo import lookup_backend
from transformers.utils import logging

from .compile_passes import Backend

logger = logging.get_logger(__name__)

# Of the 120 tested families the largest layer without a loop over tokens has 343 nodes. Compilers take more than linear
# time in them.
MOST_NODES = 800


def bounded(backend: Backend, most_nodes: int = MOST_NODES) -> Backend:
    """`backend` for graphs of up to `most_nodes` nodes. Larger ones are not compiled, which a warning says."""

    def compile(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        nodes = count_nodes(graph_module)
        if nodes <= most_nodes:
            return backend(graph_module, inputs)
        logger.warning_once(
            f"torch_compile: {_origin(graph_module)} makes a graph of {nodes} operators, more than {most_nodes}, which "
            "would take minutes to compile, so its operators run one by one."
        )
        return lookup_backend("eager")(graph_module, list(inputs))

    return compile


def count_nodes(graph_module: fx.GraphModule) -> int:
    """Also those of the graphs inside of it, as recomputation has them."""
    return sum(len(part.graph.nodes) for part in graph_module.modules() if isinstance(part, fx.GraphModule))


def _origin(graph_module: fx.GraphModule) -> str:
    """The class of the module that a graph was captured from, as far as its nodes say."""
    for node in graph_module.graph.nodes:
        for _, kind in (node.meta.get("nn_module_stack") or {}).values():
            return kind.__name__ if isinstance(kind, type) else str(kind).rpartition(".")[2]
    return "a block"
