"""The FP8 kernels and layers on a GPU against the numbers of the CPU; skips where there is no FP8."""

from __future__ import annotations

import math
import tempfile
from typing import Any

import pytest
import torch
from test_fp8 import Memory, error, rounded
from tiny import History, pad_batch, random_dataset, tiny_config, training_arguments
from transformers import set_seed

from hf_nanotron.ops.fp8 import RECIPES, Operands, add_scaled_product, product, quantize, scales
from hf_nanotron.ops.fp8_linear import WeightCopies, fp8_class
from hf_nanotron.ops.linear import Linear

BF16 = torch.bfloat16
# A bf16 result is rounded to 2^-9. A sum in fp32, of partial sums by tensor cores, is better than that.
ROUNDED, SUMMED = 1e-2, 1e-3

HAS_FP8 = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
pytestmark = pytest.mark.skipif(not HAS_FP8, reason="needs a GPU with FP8")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    """Numbers of very different sizes, on the CPU."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    x = torch.randn(shape, generator=generator)
    return (x * torch.logspace(-2, 2, shape[-1]) * torch.logspace(-1, 1, shape[0])[:, None]).to(BF16)


def operands(x: torch.Tensor, recipe: str, device: str = "cuda") -> Operands:
    """With scales of the CPU, as another device divides a little differently."""
    row_scale, column_scale = (scale.to(device) for scale in scales(x, recipe))
    return Operands(*quantize(x.to(device), row_scale, column_scale), row_scale, column_scale)


def tiles() -> list[Any]:
    if not HAS_FP8:
        return []
    from hf_nanotron.ops.kernels.fp8 import TILES

    return list(TILES)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("tile", tiles(), ids=str)
@pytest.mark.parametrize(("tokens", "width"), [(256, 384), (203, 80), (1, 16), (130, 1000)])
def test_quantize(recipe: str, tile: Any, tokens: int, width: int) -> None:
    """Every tile gives the bits of the CPU, in both orders, over poisoned memory."""
    from hf_nanotron.ops.kernels.fp8 import quantize as kernel

    x = random(tokens, width)
    expected = operands(x, recipe, "cpu")
    rows = torch.full((tokens, width), math.nan, device="cuda").to(expected.rows.dtype)
    columns = torch.full(tuple(expected.columns.shape), math.nan, device="cuda").to(rows.dtype)
    kernel(x.cuda(), expected.row_scale.cuda(), expected.column_scale.cuda(), rows, columns, tile)
    assert torch.equal(rows.cpu().float(), expected.rows.float())
    assert torch.equal(columns.cpu().float(), expected.columns.float())
    # One order alone, and FP8 numbers that are only turned over.
    for given, out in (((expected.row_scale, None), rows), ((None, expected.column_scale), columns)):
        before = out.clone()
        out.view(torch.uint8).fill_(0x7F)
        pair = (out, None) if out is rows else (None, out)
        kernel(x.cuda(), *(None if scale is None else scale.cuda() for scale in given), *pair, tile)
        assert torch.equal(out.float(), before.float())
    if recipe == "tensorwise":
        columns.view(torch.uint8).fill_(0x7F)
        kernel(rows, None, None, None, columns, tile)
        assert torch.equal(columns.cpu().float(), expected.columns.float())


@pytest.mark.parametrize("recipe", RECIPES)
def test_scales(recipe: str) -> None:
    x = random(203, 80)
    compiled = torch.compile(scales)
    for found in (scales(x.cuda(), recipe), compiled(x.cuda(), recipe)):
        for scale, expected in zip(found, scales(x, recipe), strict=True):
            assert torch.allclose(scale.cpu(), expected, rtol=1e-6, atol=0)
    x[5, 7] = math.nan
    assert compiled(x.cuda(), recipe)[0].isnan().any() and compiled(x.cuda(), recipe)[1].isnan().any()
    x[5, 7] = -math.inf
    assert compiled(x.cuda(), recipe)[0].isinf().any() and compiled(x.cuda(), recipe)[1].isinf().any()


def test_quantize_many() -> None:
    """More than 2^31 elements."""
    tokens, width = 1_100_000, 2048
    x = torch.zeros(tokens, width, device="cuda", dtype=BF16)
    x[-1] = torch.arange(width, device="cuda").remainder(16)
    one = torch.ones((), device="cuda")
    rows, columns = quantize(x, one, one)
    assert torch.equal(rows[-1].float(), x[-1].float()) and torch.equal(columns[:, tokens - 1].float(), x[-1].float())
    assert not rows[-2].float().any()


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("tokens", "wide", "out"), [(512, 256, 384), (203, 48, 80), (4096, 1024, 512)])
def test_products(recipe: str, tokens: int, wide: int, out: int) -> None:
    """All three products, with torch's kernels, in float64 on the same FP8 numbers."""
    x, grad, weight = random(tokens, wide), random(tokens, out, seed=1), random(out, wide, seed=2)
    a, g, w = operands(x, recipe), operands(grad, recipe), operands(weight, recipe)

    def exact(matrix: torch.Tensor, dim: int) -> torch.Tensor:
        return rounded(matrix.float(), recipe, dim).double().cuda()

    bias = torch.randn(out, device="cuda", dtype=BF16)
    forward = exact(x, 1) @ exact(weight, 1).t()
    assert error(product(a.rows, w.rows, a.row_scale, w.row_scale, BF16), forward) < ROUNDED
    assert error(product(a.rows, w.rows, a.row_scale, w.row_scale, BF16, bias), forward + bias) < ROUNDED
    found = product(g.rows, w.columns, g.row_scale, w.column_scale, BF16)
    assert error(found, exact(grad, 1) @ exact(weight, 0)) < ROUNDED
    expected = exact(grad, 0).t() @ exact(x, 0)
    total = torch.full((out, wide), math.nan, device="cuda")
    for times in (1, 2):
        add_scaled_product(total, g.columns, a.columns, g.column_scale, a.column_scale, overwrite=times == 1)
        assert error(total, times * expected) < SUMMED


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("compiled", [False, True])
def test_layers(recipe: str, compiled: bool) -> None:
    """Layers that share an input: as exact as FP8 is, a step without waiting for the device, and NaN comes through."""
    copies = WeightCopies(recipe)
    layers: list[Any] = [Linear(256, out, bias=out == 128, device="cuda", dtype=BF16) for out in (128, 64, 64)]
    for layer in layers:
        layer.__class__ = fp8_class(Linear)
        layer.copies, layer.recipe, layer.memory = copies, recipe, Memory(layer.weight)
        layer.memory.total = layer.memory.total.cuda()
        layer.accumulate_into(layer.memory)

    def block(x: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.silu(x)
        return torch.cat([layer(x) for layer in layers], -1)

    run = torch.compile(block, fullgraph=True) if compiled else block
    x = torch.randn(4, 50, 256, device="cuda", dtype=BF16, requires_grad=True)
    grad = torch.randn(4, 50, 256, device="cuda", dtype=BF16) * 1e-4
    copies.begin()
    for step in range(2):  # the first one compiles
        x.grad = None
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            y = run(x)
            y.backward(grad)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    weight = torch.cat([layer.weight for layer in layers]).double()
    bias = torch.cat([layers[0].bias, torch.zeros(128, device="cuda")]).double()
    exact = torch.nn.functional.silu(x.detach().double()).requires_grad_()
    assert error(y, exact @ weight.t() + bias) < 0.06
    total = torch.cat([layer.memory.total for layer in layers]) / 2
    assert error(total, grad.double().flatten(0, 1).t() @ exact.flatten(0, 1)) < 0.06
    inner = x.detach().double().requires_grad_()
    torch.nn.functional.silu(inner).backward(grad.double() @ weight)
    assert x.grad is not None and inner.grad is not None and error(x.grad, inner.grad) < 0.06
    bad = x.detach().clone()
    bad[1, 2, 3] = math.nan
    y = run(bad.requires_grad_())
    assert y[1, 2].isnan().all()
    y.backward(grad)
    assert all(layer.memory.total[:, 3].isnan().all() for layer in layers)


@pytest.mark.parametrize("recipe", RECIPES)
def test_training(recipe: str) -> None:
    """A tiny model, compiled: FP8's losses are those of bf16, until it knows its four samples by heart."""
    plain, fp8 = losses(None), losses(recipe)
    assert fp8 != plain and fp8[-1] < 0.9 * fp8[0]
    assert max(abs(a - b) / b for a, b in zip(fp8, plain, strict=True)) < 0.02


def losses(recipe: str | None) -> list[float]:
    from hf_nanotron import AutoModelForCausalLM, NanotronTrainer, NanotronTrainingArguments

    torch._dynamo.reset()
    fields = training_arguments(
        **{"max_steps": 10, "learning_rate": 1e-3, "bf16": True, "fp8": recipe, "torch_compile": True},
        use_cpu=False,
        output_dir=tempfile.mkdtemp(),
    )
    args, history = NanotronTrainingArguments(**fields), History()
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "initializer_range": 0.02}
    config = tiny_config("llama", **sizes)
    set_seed(0)  # of the weights
    model = AutoModelForCausalLM.from_config(config, parallel=args.parallel)
    data = random_dataset(4, length=64)
    NanotronTrainer(model=model, args=args, train_dataset=data, data_collator=pad_batch, callbacks=[history]).train()
    return history.losses
