"""Kernels of causal attention: FlashAttention-4, torch's flash attention on GPUs and CPUs, document after document.

Layouts are those of `ops.attention`, whose operator calls them.
"""

from __future__ import annotations

import functools
import importlib
import itertools
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch

from ..operands import readable
from .kept_attention import kept_kernels


class Problem(NamedTuple):
    """The arguments of a kernel besides its tensors, `[B, S, heads, D]`.

    `bounds` are `[documents + 1]`, int32, on the device (None if each row is a document), `longest` the tokens of the
    longest document. A token sees `window` tokens including itself, or all before it.

    Where queries are the last tokens of their documents, keys have `key_bounds` and `longest_key` of their own (rows of
    their own length, with `bounds` None): query `i` of `n` sees key `j` of `m` if `j <= i + m - n`, and with a window
    if `j > i + m - n - window`. So the mask is aligned at the bottom right, as in FlashAttention since 2.1. A document
    may have no queries; with some, it has at least as many keys.
    """

    bounds: torch.Tensor | None
    longest: int
    scale: float
    window: int | None
    key_bounds: torch.Tensor | None = None
    longest_key: int | None = None

    @property
    def longest_of_keys(self) -> int:
        return self.longest if self.longest_key is None else self.longest_key


def _both_bounds(problem: Problem, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of queries and of keys; those of their rows, if each is a document."""
    if problem.bounds is not None:
        return problem.bounds, problem.bounds if problem.key_bounds is None else problem.key_bounds
    queries = _row_bounds(q)
    return queries, queries if q.shape[1] == k.shape[1] else _row_bounds(k)


def _row_bounds(rows: torch.Tensor) -> torch.Tensor:
    batch, length = rows.shape[:2]
    return torch.arange(0, (batch + 1) * length, length, device=rows.device, dtype=torch.int32)


class Saved(NamedTuple):
    """What a backward needs of its forward."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    output: torch.Tensor
    sums: torch.Tensor


Forward = tuple[torch.Tensor, torch.Tensor]
Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Kernel(NamedTuple):
    """One way to compute attention, of operands with any strides and addresses.

    Args:
        forward: `(q, k, v, problem)` -> the output `[B, S, heads, D]` and the log-sum-exp of the scores.
        backward: `(grad, saved, problem)` -> gradients of q, k and v.
        dense: whether the log-sum-exp of whole rows is `[B, heads, S]` instead of `[heads, B * S]`.
    """

    forward: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Problem], Forward]
    backward: Callable[[torch.Tensor, Saved, Problem], Gradients]
    dense: bool = False


# ---- FlashAttention-4 ----


@functools.cache
def flash_attention_4() -> tuple[ModuleType | None, str]:
    """The module with its kernels, or None and why there is none."""
    try:
        with kept_kernels():
            module = importlib.import_module("flash_attn.cute.interface")
        return (module, "") if hasattr(module, "_flash_attn_bwd") else (None, "it has no _flash_attn_bwd")
    except Exception as error:  # its compiler's packages raise errors of their own where they do not fit
        return None, f"{type(error).__name__}: {error}".splitlines()[0]


def _fa4() -> ModuleType:
    module, why = flash_attention_4()
    if module is None:
        raise ValueError(f"FlashAttention-4 cannot run: {why}.")
    return module


def _fa4_arguments(problem: Problem) -> dict[str, Any]:
    arguments: dict[str, Any] = {"softmax_scale": problem.scale, "causal": True}
    if problem.window is not None:
        arguments |= {"window_size_left": problem.window - 1, "window_size_right": 0}
    if problem.bounds is not None:
        keys = problem.bounds if problem.key_bounds is None else problem.key_bounds
        arguments |= {"cu_seqlens_q": problem.bounds, "cu_seqlens_k": keys}
        arguments |= {"max_seqlen_q": problem.longest, "max_seqlen_k": problem.longest_of_keys}
    return arguments


def _fa4_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, problem: Problem) -> Forward:
    module = _fa4()
    shape, (q, k, v) = (*q.shape[:3], v.shape[-1]), map(readable, (q, k, v))
    if problem.bounds is not None:
        q, k, v = _flat(q, k, v)
    output, sums = module._flash_attn_fwd(q, k, v, return_lse=True, **_fa4_arguments(problem))[:2]
    return output.view(shape), sums


def _fa4_backward(grad: torch.Tensor, saved: Saved, problem: Problem) -> Gradients:
    module = _fa4()
    grad, q, k, v, output, sums = map(readable, (grad, *saved))
    shapes = [x.shape for x in (q, k, v)]
    if problem.bounds is not None:
        grad, q, k, v, output = _flat(grad, q, k, v, output)
    fresh = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
    deterministic = torch.are_deterministic_algorithms_enabled()
    found = module._flash_attn_bwd(
        q, k, v, output, grad, sums, deterministic=deterministic,
        dq=fresh[0], dk=fresh[1], dv=fresh[2], **_fa4_arguments(problem),
    )  # fmt: skip
    dq, dk, dv = (x.view(shape) for x, shape in zip(found, shapes, strict=True))
    return dq, dk, dv


# ---- torch's flash attention: documents, and windows ----


def _flash_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, problem: Problem) -> Forward:
    shape, (q, k, v) = (*q.shape[:3], v.shape[-1]), map(readable, (q, k, v))
    output, sums, *_ = torch.ops.aten._flash_attention_forward(
        *_flat(q, k, v), *_flash_bounds(problem, q, k), 0.0, True, False, scale=problem.scale, **_flash_window(problem)
    )
    return output.view(shape), sums


def _flash_backward(grad: torch.Tensor, saved: Saved, problem: Problem) -> Gradients:
    grad, q, k, v, output, sums = map(readable, (grad, *saved))
    bounds, shapes = _flash_bounds(problem, q, k), [x.shape for x in (q, k, v)]
    state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of dropout, which there is none of
    grad, q, k, v, output = _flat(grad, q, k, v, output)
    found = torch.ops.aten._flash_attention_backward(
        grad, q, k, v, output, sums, *bounds, 0.0, True, state, torch.empty(0, device=q.device), scale=problem.scale,
        **_flash_window(problem),
    )  # fmt: skip
    dq, dk, dv = (x.reshape(shape).contiguous() for x, shape in zip(found, shapes, strict=True))
    return dq, dk, dv


def _flash_bounds(problem: Problem, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    return *_both_bounds(problem, q, k), problem.longest, problem.longest_of_keys


def _flash_window(problem: Problem) -> dict[str, int]:
    return {} if problem.window is None else {"window_size_left": problem.window - 1, "window_size_right": 0}


# ---- one document after another: for any device and dtype. On a GPU the host waits for the bounds ----

# Queries of a document whose scores are in memory at once, each with the keys that they see: half of the work of whole
# rows, and scores of 16,384 keys are 16 MiB a head.
QUERIES_AT_ONCE = 256


def _scores(q: torch.Tensor, k: torch.Tensor, scale: float, window: int | None) -> torch.Tensor:
    """Of one document, `[heads, S, D]` in fp32 or better -> `[heads, S of q, S of k]`, -inf for what is not seen."""
    place, seen = torch.arange(q.shape[1], device=q.device), torch.arange(k.shape[1], device=q.device)
    distance = (place + (k.shape[1] - q.shape[1]))[:, None] - seen[None, :]
    hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
    return (scale * (q @ k.transpose(1, 2))).masked_fill(hidden, -torch.inf)


def _heads_first(x: torch.Tensor, heads: int) -> torch.Tensor:
    """`[S, kv_heads, D]` -> `[heads, S, D]` in fp32 or better, repeated for the queries that share it."""
    exact = x.transpose(0, 1).to(torch.promote_types(x.dtype, torch.float32))
    return exact.repeat_interleave(heads // exact.shape[0], 0)


def _blocks(problem: Problem, q: torch.Tensor, k: torch.Tensor) -> list[tuple[slice, slice]]:
    """Some queries of a document and the keys that they see, which are aligned as those of `Problem` are."""
    cuts = (itertools.pairwise(bounds.tolist()) for bounds in _both_bounds(problem, q, k))
    found = []
    for (begin, end), (first, last) in zip(*cuts, strict=True):
        for start in range(begin, end, QUERIES_AT_ONCE):
            stop, ahead = min(start + QUERIES_AT_ONCE, end), last - end
            near = first if problem.window is None else max(first, start + ahead - problem.window + 1)
            found.append((slice(start, stop), slice(near, stop + ahead)))
    return found


def _by_document_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, problem: Problem) -> Forward:
    shape, heads, outputs, sums = (*q.shape[:3], v.shape[-1]), q.shape[2], [], []
    every_q, every_k, every_v = _flat(q, k, v)
    for queries, keys in _blocks(problem, q, k):
        one_q, one_k, one_v = (_heads_first(x, heads) for x in (every_q[queries], every_k[keys], every_v[keys]))
        scores = _scores(one_q, one_k, problem.scale, problem.window)
        sums.append(scores.logsumexp(-1))
        outputs.append(((scores - sums[-1][..., None]).exp() @ one_v).transpose(0, 1))
    return torch.cat(outputs).to(q.dtype).view(shape), torch.cat(sums, 1)


def _by_document_backward(grad: torch.Tensor, saved: Saved, problem: Problem) -> Gradients:
    q, k, v, output, sums = saved
    heads = q.shape[2]
    every_q, every_k, every_v, every_grad, every_output = _flat(q, k, v, grad, output)
    exact = torch.promote_types(q.dtype, torch.float32)
    dq, dk, dv = (torch.zeros(x.shape, dtype=exact, device=x.device) for x in (every_q, every_k, every_v))
    for queries, keys in _blocks(problem, q, k):
        one_q, one_grad, one_output = (_heads_first(x[queries], heads) for x in (every_q, every_grad, every_output))
        one_k, one_v = (_heads_first(x[keys], heads) for x in (every_k, every_v))
        scores = _scores(one_q, one_k, problem.scale, problem.window)
        chances = (scores - sums[:, queries, None]).exp()
        slopes = one_grad @ one_v.transpose(1, 2) - (one_grad * one_output).sum(-1, keepdim=True)
        slopes = problem.scale * chances * slopes
        dq[queries] += _heads_last(slopes @ one_k, q)
        dk[keys] += _heads_last(slopes.transpose(1, 2) @ one_q, k)
        dv[keys] += _heads_last(chances.transpose(1, 2) @ one_grad, v)
    return dq.to(q.dtype).view(q.shape), dk.to(k.dtype).view(k.shape), dv.to(v.dtype).view(v.shape)


def _heads_last(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`[heads, S, D]` -> `[S, kv_heads, D]`, summed over the queries that share a head of `like`."""
    return x.unflatten(0, (like.shape[2], -1)).sum(1).transpose(0, 1)


# ---- torch's flash attention on a CPU: documents one after another, no windows. Any dtype ----


def _pieces(problem: Problem, q: torch.Tensor, k: torch.Tensor) -> list[tuple[slice, slice, bool]]:
    """Queries of each document with the keys before all of them, and with their own, which the causal mask is over.

    The kernel aligns its mask at the top left, so with the mask it gets as many keys as queries. It takes values with
    as many features as keys.
    """
    cuts = (itertools.pairwise(bounds.tolist()) for bounds in _both_bounds(problem, q, k))
    found = []
    for (begin, end), (first, last) in zip(*cuts, strict=True):
        own = last - (end - begin)
        found += [(slice(begin, end), slice(first, own), False)] if own > first and end > begin else []
        found += [(slice(begin, end), slice(own, last), True)] if end > begin else []
    return found


def _cpu_flash_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, problem: Problem) -> Forward:
    heads = q.shape[2]
    every_q, every_k, every_v = (_heads_first(x, heads)[None] for x in _flat(q, k, v))
    output, sums = torch.zeros_like(every_q), every_q.new_full(every_q.shape[:-1], -torch.inf)
    for queries, keys, causal in _pieces(problem, q, k):
        inputs = (every_q[:, :, queries], every_k[:, :, keys], every_v[:, :, keys])
        part, part_sums = CPU_FLASH(*inputs, 0.0, causal, scale=problem.scale)
        before = sums[:, :, queries]
        both = torch.logaddexp(before, part_sums)
        weights, part_weights = ((x - both).exp()[..., None] for x in (before, part_sums))
        output[:, :, queries] = output[:, :, queries] * weights + part * part_weights
        sums[:, :, queries] = both
    return output[0].transpose(0, 1).to(q.dtype).reshape(q.shape), sums[0]


def _cpu_flash_backward(grad: torch.Tensor, saved: Saved, problem: Problem) -> Gradients:
    q, k, v, output, sums = saved
    heads = q.shape[2]
    every = (_heads_first(x, heads)[None] for x in _flat(grad, q, k, v, output))
    every_grad, every_q, every_k, every_v, every_output = every
    dq, dk, dv = (torch.zeros_like(x) for x in (every_q, every_k, every_v))
    for queries, keys, causal in _pieces(problem, q, k):
        of_queries = (every_output[:, :, queries].contiguous(), sums[None, :, queries].contiguous())
        part = CPU_FLASH_BACKWARD(
            every_grad[:, :, queries], every_q[:, :, queries], every_k[:, :, keys], every_v[:, :, keys], *of_queries,
            0.0, causal, scale=problem.scale,
        )  # fmt: skip
        for total, where, one in zip((dq, dk, dv), (queries, keys, keys), part, strict=True):
            total[:, :, where] += one
    dq, dk, dv = (_heads_last(total[0], like) for total, like in ((dq, q), (dk, k), (dv, k)))
    return dq.to(q.dtype).reshape(q.shape), dk.to(k.dtype).reshape(k.shape), dv.to(v.dtype).reshape(v.shape)


CPU_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
CPU_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


KERNELS = {
    "fa4": Kernel(_fa4_forward, _fa4_backward, dense=True),
    "flash": Kernel(_flash_forward, _flash_backward),
    "cpu_flash": Kernel(_cpu_flash_forward, _cpu_flash_backward),
    "by_document": Kernel(_by_document_forward, _by_document_backward),
}


def _flat(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """`[B, S, heads, D]` -> `[B * S, heads, D]`, without a copy for what a projection wrote."""
    return [x.flatten(0, 1) for x in tensors]
