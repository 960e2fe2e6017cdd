"""The kernels of attention against float64 on the same numbers; skips where there is no GPU.

FlashAttention-4 is compared where it is installed (`pip install hf-nanotron[flash]`), torch's flash attention anywhere.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_attention import masked
from test_operators import FORMS, check

from hf_nanotron.ops.attention import attention
from hf_nanotron.ops.kernels.attention import flash_attention_4
from hf_nanotron.ops.linear import Linear, add_product, can_add_product

DEVICE = "cuda"
BF16 = torch.bfloat16
# A bf16 result is rounded to 2^-9, and its gradients go through a few such roundings. A wrong mask is off by tenths.
OUTPUT, GRADIENT = 1e-2, 2e-2
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] in (9, 10)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def needs(kernel: str) -> None:
    if kernel == "fa4" and not (HOPPER and flash_attention_4()[0] is not None):
        pytest.skip(f"FlashAttention-4 does not run here: {flash_attention_4()[1] or 'no Hopper GPU'}")


def error(x: torch.Tensor, reference: torch.Tensor) -> float:
    reference = reference.detach()
    return float((x.detach().cpu().double() - reference).norm() / reference.norm())


def packed(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Bounds of documents of random lengths, one token among them."""
    generator = torch.Generator().manual_seed(seed)
    cuts = [torch.randperm(length - 2, generator=generator)[:5].sort().values + 2 for _ in range(rows)]
    starts = [torch.cat([torch.tensor([0, 1]), cut]) + row * length for row, cut in enumerate(cuts)]
    return torch.cat([*starts, torch.tensor([rows * length])]).unique().to(torch.int32)


@pytest.mark.parametrize("kernel", ["fa4", "flash", "by_document"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 2), (4, 4)])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("documents", [False, True])
def test_kernel(kernel: str, heads: int, kv_heads: int, dim: int, window: int | None, documents: bool) -> None:
    """Output and gradients of rows of 333 tokens, from views as attention modules make them."""
    needs(kernel)
    rows, length = 2, 333
    generator = torch.Generator().manual_seed(dim + heads)
    leaves = [torch.randn(rows, length, n * dim, generator=generator).to(BF16) for n in (heads, kv_heads, kv_heads)]
    weight = torch.randn(rows, length, heads, dim, generator=generator).to(BF16)
    bounds = packed(rows, length) if documents else None

    exact = [x.double().requires_grad_() for x in leaves]
    expected = masked(*(x.unflatten(-1, (-1, dim)) for x in exact), bounds, window, dim**-0.5)
    gradients = torch.autograd.grad(expected, exact, weight.double())

    ours = [x.to(DEVICE).requires_grad_() for x in leaves]
    longest = None if bounds is None else bounds.diff().max()
    device_bounds = None if bounds is None else bounds.to(DEVICE)
    q, k, v = (x.unflatten(-1, (-1, dim)).transpose(1, 2).transpose(1, 2) for x in ours)
    found = attention(q, k, v, kernel, dim**-0.5, window, device_bounds, longest)
    assert found.is_contiguous() and error(found, expected) < OUTPUT
    for mine, theirs in zip(torch.autograd.grad(found, ours, weight.to(DEVICE)), gradients, strict=True):
        assert error(mine, theirs) < GRADIENT


@pytest.mark.parametrize("kernel", ["fa4", "flash"])
def test_slices_of_one_projection(kernel: str) -> None:
    """Queries, keys and values that lie in one tensor, and values with fewer features."""
    needs(kernel)
    generator = torch.Generator().manual_seed(0)
    joined = torch.randn(2, 200, 4, 64 + 64 + 48, generator=generator).to(BF16)
    exact = joined.double().requires_grad_()
    ours = joined.to(DEVICE).requires_grad_()
    expected = masked(*exact.split([64, 64, 48], -1), None, None, 0.1)
    found = attention(*ours.split([64, 64, 48], -1), kernel, 0.1)
    weight = torch.randn(expected.shape, generator=generator).to(BF16)
    assert error(found, expected) < OUTPUT
    (mine,), (theirs,) = (
        torch.autograd.grad(found, ours, weight.to(DEVICE)),
        torch.autograd.grad(expected, exact, weight.double()),
    )
    assert error(mine, theirs) < GRADIENT


@pytest.mark.parametrize("kernel", ["fa4", "flash"])
def test_operator_is_what_it_says_to_a_compiler(kernel: str) -> None:
    needs(kernel)
    q, k, v = (torch.randn(2, 128, h, 64, device=DEVICE, dtype=BF16, requires_grad=True) for h in (8, 2, 2))
    bounds = packed(2, 128)
    for arguments in ((None, None), (bounds.to(DEVICE), bounds.diff().max())):
        said = (*arguments, 0.125, None, kernel)
        check(torch.ops.hf_nanotron.attention, q, k, v, *said)
        given = [x.detach() for x in (q, k, v)]
        found = torch.ops.hf_nanotron.attention(*given, *said)
        check(torch.ops.hf_nanotron.attention_backward, torch.randn_like(found[0]), *given, *found, *said)


def step_losses(attention: str, packing: bool, compiled: bool) -> tuple[list[float], list[float], Any, int]:
    """Losses and norms of four steps of a small bf16 model, what it attended with, and graphs captured late."""
    from tiny import History, random_dataset, tiny_config, training_arguments
    from torch._dynamo.utils import counters
    from transformers import DataCollatorWithFlattening, TrainerCallback, default_data_collator, set_seed

    from hf_nanotron import AutoModelForCausalLM, NanotronTrainer, NanotronTrainingArguments

    class Graphs(TrainerCallback):
        found: list[int] = []

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.found.append(counters["stats"]["unique_graphs"])

    torch._dynamo.reset()
    counters.clear()
    set_seed(1)
    config = tiny_config("llama", hidden_size=256, num_attention_heads=4, num_key_value_heads=2, intermediate_size=512)
    model = AutoModelForCausalLM.from_config(config, dtype=BF16)
    history, graphs = History(), Graphs()
    graphs.found = []
    more = {"use_cpu": False, "bf16": True, "attention": attention, "torch_compile": compiled, "max_steps": 4}
    trainer = NanotronTrainer(
        model=model,
        args=NanotronTrainingArguments(**training_arguments(**more, per_device_train_batch_size=4)),
        train_dataset=random_dataset(16, length=64, ragged=False),
        data_collator=DataCollatorWithFlattening() if packing else default_data_collator,
        callbacks=[history, graphs],
    )
    chosen = trainer.training_state.attention
    trainer.train()
    model.mesh.close()
    return history.losses, history.norms, chosen, graphs.found[-1] - graphs.found[0]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("packing", [False, True])
def test_training(packing: bool, compiled: bool) -> None:
    """With what was chosen here: the losses of the model's own attention, and nothing compiled after the first step."""
    stock, norms, none, _ = step_losses("stock", packing, False)
    losses, our_norms, chosen, late = step_losses("auto", packing, compiled)
    assert none is None and chosen is not None and late == 0
    for expected, found in zip([*stock, *norms], [*losses, *our_norms], strict=True):
        assert abs(found / expected - 1) < GRADIENT


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kernel", ["fa4", "flash"])
@pytest.mark.parametrize("documents", [False, True])
def test_operands_of_any_form(form: str, kernel: str, documents: bool) -> None:
    """Other strides and addresses, of operands and of the gradient: the bits of contiguous copies."""
    needs(kernel)
    rows, length, dim, heads = 2, 91, 64, (8, 2, 2)  # odd: nothing is aligned by accident
    generator = torch.Generator().manual_seed(7)
    tensors = [torch.randn(rows, length, n, dim, generator=generator).to(BF16).to(DEVICE) for n in (*heads, 8)]
    odd = [FORMS[form](x) for x in tensors]
    bounds = packed(rows, length) if documents else None
    longest = None if bounds is None else bounds.diff().max()
    device_bounds = None if bounds is None else bounds.to(DEVICE)

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        found = attention(*inputs, kernel, dim**-0.5, None, device_bounds, longest)
        return [found, *torch.autograd.grad(found, inputs, grad)]

    expected = run(*(x.contiguous().clone() for x in odd))
    for mine, theirs in zip(run(*odd), expected, strict=True):
        assert error(mine, theirs.cpu().double()) < 1e-3  # sums of dQ are in no fixed order


@pytest.mark.parametrize("form", FORMS)
def test_linear_of_any_form(form: str) -> None:
    """In bf16, with a gate of four features beside wide layers, compiled: a compiler relies on strides of results."""

    class Total:
        def __init__(self, weight: torch.Tensor) -> None:
            self.sum = torch.zeros(weight.shape, device=DEVICE)

        def takes_product(self, dtype: torch.dtype) -> bool:
            return can_add_product(self.sum, dtype)

        def add_product(self, grad_output: torch.Tensor, input: torch.Tensor) -> None:
            add_product(self.sum, grad_output, input, overwrite=False)

    for features in (4, 5, 64):
        torch.manual_seed(0)
        layer = Linear(96, features, bias=False, device=DEVICE, dtype=BF16)
        total = Total(layer.weight)
        layer.accumulate_into(total)
        x = FORMS[form](torch.randn(3, 91, 96, device=DEVICE, dtype=BF16))
        grad = torch.randn(3, 91, features, device=DEVICE, dtype=BF16)

        def compute(x: torch.Tensor, layer: Linear = layer) -> torch.Tensor:
            return (layer(x * 1.0) * 2.0).sin()

        inputs = [x.detach().requires_grad_() for _ in range(2)]
        compute(inputs[0]).backward(grad)
        eager = total.sum.clone()
        total.sum.zero_()
        torch.compile(compute, dynamic=False)(inputs[1]).backward(grad)
        assert error(total.sum, eager.cpu().double()) < 2e-2
        assert error(inputs[1].grad, inputs[0].grad.cpu().double()) < 2e-2
