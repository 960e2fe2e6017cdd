"""What is not compiled: blocks that loop over tokens in Python, told by their source, and graphs that are too large.

The reference for loops is a count: where the operators of a stock forward are more for a longer row, something loops.
"""

from __future__ import annotations

import logging
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from family_runs import KNOWN, tiny_model
from torch import nn
from torch._dynamo import lookup_backend
from torch._functorch._aot_autograd.autograd_cache import check_cacheable
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers.integrations.hub_kernels import use_kernel_func_from_hub_with_fallback

from hf_nanotron.models.stock.anatomy import dissect
from hf_nanotron.models.stock.mixer_kernels import choice_of, kernels_of
from hf_nanotron.prepare.compile_limit import bounded
from hf_nanotron.prepare.compile_passes import rewriting
from hf_nanotron.prepare.recompute import selective_contexts
from hf_nanotron.prepare.token_loops import modules_with_loops, token_loop

SAMPLE = ("llama", "mamba", "qwen3_5_text", "minimax", "bamba", "deepseek_v4", "gemma3n_text")
UNTESTED = {"gemma3n"}  # it needs timm
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")


class Counter(TorchDispatchMode):
    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        return func(*args, **(kwargs or {}))


def operators(model: nn.Module, family: str, tokens: int) -> int:
    ids = torch.arange(tokens)[None] % 90 + 3
    more = {"token_type_ids": torch.zeros_like(ids)} if "token_type_ids" in KNOWN[family].get("inputs", ()) else {}
    with torch.no_grad(), Counter() as counter:
        model(input_ids=ids, use_cache=False, **more)
    return counter.number


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "any_family" in metafunc.fixturenames:
        everything = metafunc.config.getoption("--full-matrix")
        metafunc.parametrize("any_family", sorted(KNOWN.keys() - UNTESTED) if everything else SAMPLE)


def test_loops_are_found_where_longer_rows_take_more_operators(any_family: str) -> None:
    family = any_family
    config = KNOWN[family]["config"]
    model = tiny_model(family, **{name: 1024 for name in POSITIONS if name in config}).train()
    # Whole chunks of 256 tokens, the largest of any family, so that nothing is padded.
    grows = operators(model, family, 512) > operators(model, family, 256)
    found = [where for _, layer in dissect(model).numbered_layers() for where in modules_with_loops(layer).values()]
    assert bool(found) == grows, found


class OverTokens(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        chunks = (length + 63) // 64
        return torch.stack([x[:, i] for i in range(chunks)])


def scan(x: torch.Tensor, steps: int, state: torch.Tensor) -> torch.Tensor:
    for i in range(steps):
        state = state + x[:, i]
    return state


class InAHelper(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        length = x.size(1)
        return self.run(x, length)

    def run(self, x: torch.Tensor, count: int) -> torch.Tensor:
        return scan(x, state=x[:, 0], steps=count)


class OfAFixedLength(nn.Module):
    turns = 64

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(self.turns):
            x = x.sin()
        return x


class OverDimensions(nn.Module):
    """Short loops: over the dimensions of a tensor, and as many as a field says."""

    turns = 4

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(len(x.shape)):
            x = x.sin()
        for _ in range(self.turns):
            x = scan(x[None], 3, x)
        return x


def plain_scan(x: torch.Tensor) -> torch.Tensor:
    for i in range(x.shape[1]):
        x = x + x[:, i : i + 1]
    return x


class Mixer(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return quick_scan(x)  # type: ignore[name-defined]  # noqa: F821  see `with_kernel`


def with_kernel(installed: bool, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """A module that calls `plain_scan` as transformers' models call what may have a kernel."""
    package = ModuleType("some_kernels")
    if installed:
        package.quick_scan = lambda x: x  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "some_kernels", package)
    decorate = use_kernel_func_from_hub_with_fallback("quick_scan", "some_kernels")
    monkeypatch.setitem(globals(), "quick_scan", decorate(plain_scan))
    return Mixer()


@pytest.mark.parametrize("module", [OverTokens(), InAHelper(), OfAFixedLength()], ids=lambda m: type(m).__name__)
def test_code_of_users_is_read(module: nn.Module) -> None:
    assert "test_compile_bounds.py" in (token_loop(module) or "")


@pytest.mark.parametrize("module", [OverDimensions(), nn.Linear(2, 2), nn.GELU()], ids=lambda m: type(m).__name__)
def test_short_loops_do_not_count(module: nn.Module) -> None:
    assert token_loop(module) is None


@pytest.mark.parametrize("installed", [True, False])
def test_an_installed_kernel_has_no_loop(installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    mixer = with_kernel(installed, monkeypatch)
    choice = choice_of(globals()["quick_scan"])
    assert choice is not None and (choice.package, choice.installed) == ("some_kernels", installed)
    assert (token_loop(mixer) is None) is installed


@pytest.mark.parametrize("recomputes", [False, True])
def test_large_graphs_run_one_by_one(recomputes: bool, caplog: pytest.LogCaptureFixture) -> None:
    torch._dynamo.reset()
    weight = torch.randn(4, 4, requires_grad=True)
    x = torch.randn(3, 4)
    compiled: list[int] = []

    def inner(graph_module: Any, inputs: Any) -> Any:
        compiled.append(1)
        return lookup_backend("aot_eager")(graph_module, inputs)

    def block(x: torch.Tensor) -> torch.Tensor:
        def body(x: torch.Tensor) -> torch.Tensor:
            return (x @ weight).sin() @ weight

        return checkpoint(body, x, use_reentrant=False, context_fn=selective_contexts) if recomputes else body(x)

    results = []
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        for most in (3, 100):
            torch._dynamo.reset()
            y = torch.compile(block, backend=bounded(inner, most))(x)
            results.append((y.detach(), torch.autograd.grad(y.square().sum(), weight)[0]))
    finally:
        logger.removeHandler(caplog.handler)
    expected = block(x)
    expected = (expected.detach(), torch.autograd.grad(expected.square().sum(), weight)[0])
    assert len(compiled) == 1
    assert "more than 3, which would take minutes to compile" in caplog.text
    for result in results:
        torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_graphs_can_be_kept(family: str) -> None:
    """Torch keeps the traced forward and backward of a graph if it knows all functions in it to be safe."""
    torch._dynamo.reset()
    seen: list[bool] = []

    def inner(graph_module: Any, inputs: Any) -> Any:
        check_cacheable(graph_module)
        seen.append(any(node.target is torch.roll for node in graph_module.graph.nodes))
        return lookup_backend("eager")(graph_module, inputs)

    model = tiny_model(family).train()
    for _, layer in dissect(model).numbered_layers()[:1]:
        layer.forward = torch.compile(layer.forward, backend=rewriting(inner))
    model(torch.arange(8)[None], use_cache=False)
    assert seen == [True]


def test_kernels_are_named() -> None:
    sentences = kernels_of(dissect(tiny_model("qwen3_5_text")))
    assert any("chunk_gated_delta_rule" in sentence and "linear-attention" in sentence for sentence in sentences)
    assert kernels_of(dissect(tiny_model("llama"))) == []
