"""Causal attention as one operator for a compiler, whichever kernel computes it.

Layouts are those of flash attention (Dao, 2023): queries `[B, S, heads, D]`, keys and values `[B, S, kv_heads, D]`,
where `kv_heads` divides `heads`. A token sees itself and earlier tokens of its row, or of its document in a packed row.
Bounds of documents, `[documents + 1]`, count the tokens of all rows, as `cu_seqlens` do; no document crosses the end of
a row.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from .kernels.attention import KERNELS, Gradients, Problem, Saved

HALF = (torch.float16, torch.bfloat16)
CPU_FLASH_DTYPES = (torch.float64, torch.float32, *HALF)


class Case(NamedTuple):
    """What decides which kernel runs; the same for all micro-batches of a run. Values may have fewer features than
    `head_dim`. A token sees `window` tokens including itself, or all before it.
    """

    on_cuda: bool
    dtype: torch.dtype
    head_dim: int
    packed: bool
    window: int | None


def pick(kernels: tuple[str, ...], case: Case) -> str | None:
    """The first of `kernels`, names in `KERNELS`, that supports `case`; None where torch's own operator is as fast.

    Measured on an H100 in bf16, forward and backward: whole rows, FlashAttention-4 442 and 567 TFLOP/s for heads of 64
    and 128, cuDNN (torch's operator) 384 and 525; documents of 1,024 tokens with heads of 128, FlashAttention-4 292,
    torch's variable-length kernel 195. On a CPU torch's flash attention, of 8,192 tokens in fp32 with heads of 32, took
    an eighth of the forward and two fifths of the backward of `by_document`.
    """
    halves = case.on_cuda and case.dtype in HALF
    if "fa4" in kernels and halves and case.head_dim in (64, 96, 128):
        return "fa4"
    if not case.packed and case.window is None:
        return None
    if "flash" in kernels and halves and case.head_dim % 8 == 0 and case.head_dim <= 256:
        return "flash"
    if not case.on_cuda and case.window is None and case.dtype in CPU_FLASH_DTYPES:
        return "cpu_flash"
    return "by_document"


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kernel: str,
    scale: float,
    window: int | None = None,
    bounds: torch.Tensor | None = None,
    longest: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention by one of `KERNELS`; returns `[B, S, heads, D of value]`, contiguous.

    Args:
        query, key, value: `[B, S, heads, D]`, `[B, S, kv_heads, D]` and `[B, S, kv_heads, D or less]`.
        scale, window, bounds: as in `Problem`.
        longest: tokens of the longest document, a tensor on the host: a number would recompile for every packing.
    """
    missing = query.shape[-1] - value.shape[-1]
    filled = F.pad(value, (0, missing)) if missing else value
    output, _ = torch.ops.hf_nanotron.attention(query, key, filled, bounds, longest, scale, window, kernel)
    return output[..., : value.shape[-1]].contiguous() if missing else output


# ---- the operator. The schemas are its signatures: one inferred from types would make the window symbolic ----

SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, Tensor? bounds, Tensor? longest, float scale, int? window, str kernel)"
    " -> (Tensor, Tensor)"
)
BACKWARD_SCHEMA = (
    "(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor output, Tensor sums, Tensor? bounds, Tensor? longest,"
    " float scale, int? window, str kernel) -> (Tensor, Tensor, Tensor)"
)


def _problem(
    query: torch.Tensor,
    key: torch.Tensor,
    bounds: torch.Tensor | None,
    longest: torch.Tensor | None,
    scale: float,
    window: int | None,
) -> Problem:
    if longest is None:
        return Problem(bounds, query.shape[1], scale, window, None, key.shape[1])
    return Problem(bounds, int(longest), scale, window)


@torch.library.custom_op("hf_nanotron::attention", mutates_args=(), schema=SCHEMA)
def _attention(*inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    query, key, value, bounds, longest, scale, window, kernel = inputs
    problem = _problem(query, key, bounds, longest, scale, window)
    output, sums = KERNELS[kernel].forward(query, key, value, problem)
    return output.contiguous(), sums.contiguous()


@_attention.register_fake
def _(*inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    query, _, value, bounds, *_, kernel = inputs
    batch, length, heads = query.shape[:3]
    rows = KERNELS[kernel].dense and bounds is None
    sums = (batch, heads, length) if rows else (heads, batch * length)
    output = query.new_empty((batch, length, heads, value.shape[-1]))
    return output, query.new_empty(sums, dtype=torch.promote_types(query.dtype, torch.float32))


@torch.library.custom_op("hf_nanotron::attention_backward", mutates_args=(), schema=BACKWARD_SCHEMA)
def _attention_backward(*inputs: Any) -> Gradients:
    grad, query, key, value, output, sums, bounds, longest, scale, window, kernel = inputs
    problem = _problem(query, key, bounds, longest, scale, window)
    dq, dk, dv = KERNELS[kernel].backward(grad, Saved(query, key, value, output, sums), problem)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


@_attention_backward.register_fake
def _(grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any) -> Gradients:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    query, key, value, bounds, longest, ctx.scale, ctx.window, ctx.kernel = inputs
    ctx.save_for_backward(query, key, value, *output, bounds, longest)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad: torch.Tensor, _: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    found = torch.ops.hf_nanotron.attention_backward(grad, *ctx.saved_tensors, ctx.scale, ctx.window, ctx.kernel)
    return (*found, None, None, None, None, None)


_attention.register_autograd(_gradients, setup_context=_keep)
