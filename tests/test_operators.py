"""Our operators take operands with any strides and addresses, and say truly what their results look like.

`check` compares an operator with its schema and with what it promises to a compiler: shapes, dtypes and strides of its
results, which compiled code relies on.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import pkgutil
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

import hf_nanotron.ops
import hf_nanotron.parallel.cp
from hf_nanotron.ops import attention, fp8, fp8_linear, gated_mlp, linear
from hf_nanotron.ops.layer_norm import LayerNorm
from hf_nanotron.ops.operands import is_readable, readable
from hf_nanotron.parallel.mesh import Group
from hf_nanotron.parallel.tp.loss import linear_causal_lm_loss

Form = Callable[[torch.Tensor], torch.Tensor]


def _transposed(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def _expanded(x: torch.Tensor) -> torch.Tensor:
    return x[:1].expand(x.shape)


def _sliced(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x, x, x], -1)[..., x.shape[-1] : 2 * x.shape[-1]]


def _inner(x: torch.Tensor) -> torch.Tensor:
    """The two middle dimensions the other way round in memory, as heads before tokens are."""
    return x.transpose(-3, -2).contiguous().transpose(-3, -2) if x.dim() > 2 else x


def _misaligned(x: torch.Tensor) -> torch.Tensor:
    memory = x.new_empty(x.numel() + 1)
    return memory[1:].view(x.shape).copy_(x)


FORMS: dict[str, Form] = {
    "as it is": lambda x: x.clone(),
    "transposed": _transposed,
    "expanded": _expanded,
    "sliced": _sliced,
    "inner": _inner,
    "misaligned": _misaligned,
}
forms = pytest.mark.parametrize("form", FORMS)
# Not "test_aot_dispatch_dynamic", which asks for symbolic sizes as well, and takes most of the time.
CHECKS = ("test_schema", "test_faketensor", "test_autograd_registration")


class Total:
    """The memory of a weight's gradient."""

    def __init__(self, *shape: int) -> None:
        self.sum = torch.zeros(shape)

    def takes_product(self, dtype: torch.dtype) -> bool:
        return dtype == torch.float32

    def add_product(self, grad_output: torch.Tensor, input: torch.Tensor) -> None:
        linear.add_product(self.sum, grad_output, input, overwrite=False)

    def add_scaled_product(self, *operands: torch.Tensor) -> None:
        fp8.add_scaled_product(self.sum, *operands, overwrite=False)


def check(operator: Any, *operands: Any, checks: tuple[str, ...] = CHECKS) -> None:
    torch.library.opcheck(operator, operands, test_utils=checks)
    check_strides(operator, *operands)


def check_strides(operator: Any, *operands: Any) -> None:
    """As opcheck does, but not that of torch 2.11."""
    given = pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, operands)
    with FakeTensorMode() as mode:
        promised = operator(*pytree.tree_map_only(torch.Tensor, mode.from_tensor, given))
    assert strides(operator(*given)) == strides(promised), operator


def strides(results: Any) -> list[list[int]]:
    """Of each tensor, along the dimensions of more than one element, which are all that matter."""

    def of(x: torch.Tensor) -> list[int]:
        return [step for size, step in zip(x.shape, x.stride(), strict=True) if size > 1 and x.numel()]

    return [of(x) for x in pytree.tree_leaves(results)]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def operand(form: str, *shape: int, seed: int = 0) -> torch.Tensor:
    return FORMS[form](random(*shape, seed=seed)).requires_grad_()


@functools.cache
def layer(bias: bool) -> tuple[linear.Linear, Total]:
    made, total = linear.Linear(24, 12, bias=bias), Total(12, 24)
    made.accumulate_into(total)
    return made, total


@forms
@pytest.mark.parametrize("shape", [(24,), (5, 24), (2, 5, 24), (2, 0, 24), (2, 3, 4, 24)], ids=str)
def test_linear(form: str, shape: tuple[int, ...]) -> None:
    made, total = layer(len(shape) != 3)
    x = operand(form, *shape)
    check(torch.ops.hf_nanotron.linear, x, made.weight, made.bias, made.key)
    grad = operand(form, *shape[:-1], 12, seed=1).detach()
    check(torch.ops.hf_nanotron.linear_backward, grad, x.detach(), made.weight.detach(), made.key)
    total.sum.zero_()
    out = torch.ops.hf_nanotron.linear(x, made.weight, made.bias, made.key)
    out.backward(grad)
    expected = grad.reshape(-1, 12).t() @ x.detach().reshape(-1, 24)
    torch.testing.assert_close(total.sum, expected)
    torch.testing.assert_close(x.grad, grad @ made.weight)


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16])
def test_a_linear_rounds_its_input_to_its_weight(given: torch.dtype, kept: torch.dtype) -> None:
    """Some stock blocks compute in fp32 and hand that to a layer in bf16."""
    made = linear.Linear(24, 12, dtype=kept)
    x = random(3, 24).to(given).requires_grad_()
    out = made(x)
    out.sum().backward()
    assert out.dtype == kept and x.grad is not None and x.grad.dtype == given
    torch.testing.assert_close(out, torch.nn.functional.linear(x.to(kept), made.weight, made.bias))


def test_others_round_their_input_to_their_weight() -> None:
    x = random(5, 24).requires_grad_()
    weights = [random(*shape, seed=3).bfloat16().requires_grad_() for shape in ((20, 24), (20, 24), (24, 20))]
    out = gated_mlp.gated_mlp(x, (weights[0], weights[1], weights[2]), (None, None, None), 4, "silu")
    assert out.dtype == torch.bfloat16
    norm = LayerNorm(24, dtype=torch.bfloat16)
    normed = norm(x)
    assert normed.dtype == torch.bfloat16 and LayerNorm(24, elementwise_affine=False)(x).dtype == torch.float32
    loss = linear_causal_lm_loss(x[None], weights[0], None, torch.arange(5)[None], 0, Group((0,), 0, None))
    (out.sum() + normed.sum() + loss).backward()
    assert x.grad is not None and x.grad.dtype == torch.float32
    assert all(weight.grad is not None and weight.grad.dtype == torch.bfloat16 for weight in weights)


@forms
@pytest.mark.parametrize("activation", gated_mlp.ACTIVATIONS)
def test_gated_mlp(form: str, activation: str) -> None:
    layers = [linear.Linear(24, 20, bias=False), linear.Linear(24, 20, bias=False), linear.Linear(20, 24, bias=False)]
    totals = [Total(*one.weight.shape) for one in layers]
    layers[0].accumulate_into(totals[0])  # the others return their gradients
    weights, keys = [one.weight for one in layers], [one.key for one in layers]
    for shape in ((7, 24), (2, 5, 24)):
        x = operand(form, *shape)
        check(torch.ops.hf_nanotron.gated_mlp, x, *weights, *keys, 4, activation)
        operands = [operand(form, *shape, seed=1), x, *weights]
        given = [one.detach() for one in operands]
        check(torch.ops.hf_nanotron.gated_mlp_backward, *given, *keys, [False, True, True], 4, activation)


ATTENTIONS = [("by_document", None), ("by_document", 3), ("cpu_flash", None)]


@forms
@pytest.mark.parametrize(("kernel", "window"), ATTENTIONS, ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_attention(form: str, kernel: str, window: int | None, packed: bool) -> None:
    for batch in (1, 2) if form == "inner" else (2,):
        q, k, v = (operand(form, batch, 6, heads, 8, seed=heads) for heads in (4, 2, 2))
        bounds = torch.tensor([0, 2, *range(6, 6 * batch + 1, 6)], dtype=torch.int32) if packed else None
        longest = torch.tensor(6) if packed else None
        said = (bounds, longest, 0.3, window, kernel)
        check(torch.ops.hf_nanotron.attention, q, k, v, *said)
        output, sums = torch.ops.hf_nanotron.attention(q.detach(), k.detach(), v.detach(), *said)
        grad = operand(form, *output.shape, seed=9).detach()
        tensors = [x.detach() for x in (q, k, v)]
        check(torch.ops.hf_nanotron.attention_backward, grad, *tensors, output, sums, *said)


def test_values_may_be_narrower_than_keys() -> None:
    q, k, v = (random(2, 6, 2, width).transpose(1, 2).transpose(1, 2) for width in (8, 8, 5))
    found = attention.attention(q, k, v, "by_document", 0.3)
    assert found.shape == (2, 6, 2, 5) and found.is_contiguous()


@forms
@pytest.mark.parametrize("recipe", fp8.RECIPES)
def test_fp8(form: str, recipe: str) -> None:
    made, total = linear.Linear(32, 16), Total(16, 32)
    copies = fp8_linear.WeightCopies(recipe)
    owner, key = fp8_linear.Fp8Weight(copies, total), torch.tensor(10**6)
    fp8_linear._weights[int(key)] = owner
    x, grad = operand(form, 5, 32), operand(form, 5, 16, seed=1).detach()
    scales, grad_scales = fp8.scales(x, recipe), fp8.scales(grad, recipe)
    scales = tuple(scale.clone() for scale in scales)  # an operator takes no tensor twice in this check
    checks = CHECKS[1:]  # the first multiplies its operands, which a CPU does not do in FP8
    check(torch.ops.hf_nanotron.fp8_quantize, x.detach(), *scales, checks=checks)
    rows, columns = torch.ops.hf_nanotron.fp8_quantize(x.detach(), *scales)
    operands = (x, rows, columns, *scales, made.weight.detach(), made.bias.detach(), key)
    check(torch.ops.hf_nanotron.fp8_linear, *operands, checks=checks)
    grad_scales = tuple(scale.clone() for scale in grad_scales)
    of_grad = torch.ops.hf_nanotron.fp8_quantize(grad, *grad_scales)
    said = (*of_grad, *grad_scales, columns, scales[1], made.weight.detach(), key)
    check(torch.ops.hf_nanotron.fp8_linear_backward, *said, checks=checks)


def test_other_strides_than_promised_are_found() -> None:
    turned = torch.library.custom_op(
        "test_operators::turned", lambda x: x.clone().t(), mutates_args=(), schema="(Tensor x) -> Tensor"
    )
    turned.register_fake(lambda x: x.new_empty(x.shape[::-1]))
    with pytest.raises(AssertionError, match="turned"):
        check_strides(turned, random(2, 3))
    check_strides(turned, random(1, 3))


def test_every_operator_is_checked() -> None:
    """Here, and those of context parallelism, which need ranks, in `test_cp_attention.py`."""
    for package in (hf_nanotron.ops, hf_nanotron.parallel.cp):
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)
    names = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("hf_nanotron::")}
    sources = [Path(__file__), Path(__file__).with_name("test_cp_attention.py")]
    checked = {name for path in sources for name in re.findall(r"ops\.hf_nanotron\.(\w+)", path.read_text())}
    assert names >= {"linear", "attention_backward", "cp_to_tokens"} and names == checked


def test_what_a_kernel_reads() -> None:
    """A copy is made where it is needed, and nowhere else."""
    rows = random(2, 6, 4, 8).bfloat16()
    for form, needed in (
        ("as it is", False),
        ("inner", False),
        ("sliced", False),  # by 16 bytes
        ("transposed", True),
        ("expanded", True),
        ("misaligned", True),
    ):
        x = FORMS[form](rows)
        found = readable(x)
        assert (found is not x) == needed, form
        assert is_readable(found) and torch.equal(found, x), form
    odd = torch.cat([rows, rows[..., :1]], -1)[..., 1:]
    assert not is_readable(odd) and torch.equal(readable(odd), odd)
    assert readable(rows[:0]).shape == (0, 6, 4, 8)
    assert all(is_readable(random(*shape)) for shape in itertools.product((1, 3), repeat=3))
