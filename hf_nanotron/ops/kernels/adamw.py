"""AdamW in one pass over memory, as a Triton kernel. `optim/adamw.py` says what it computes, and does so on the CPU."""

from __future__ import annotations

import torch

from .language import tl, triton

BLOCK = 1024


@triton.jit
def _mix(x):
    """The hash of `optim.adamw.mix`, on uint32."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _round(value, bits):
    """fp32 to bfloat16 by stochastic rounding with 16 random bits."""
    raw = (value.to(tl.uint32, bitcast=True) + bits) & 0xFFFF0000
    # The payload of a NaN would overflow into the sign: a GPU's own NaN is 0x7FFFFFFF.
    return tl.where(value == value, raw.to(tl.float32, bitcast=True), value).to(tl.bfloat16)


# What is not specialised keeps its type: Triton makes constants of integers that equal 1.
@triton.jit(do_not_specialize=["row", "key0", "key1", "first"])
def _adamw_kernel(
    master,
    gradient,
    exp_avg,
    exp_avg_sq,
    rounded,
    factors,
    grad_scale,
    found_inf,
    count,
    row,
    key0,
    key1,
    first,
    decay,
    weight1,
    beta2,
    weight2,
    eps,
    STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    limit = count
    if found_inf is not None:
        limit = tl.where(tl.load(found_inf) == 0, count, 0)
    mask = offsets < limit
    step_size = tl.load(factors + 3 * row)
    correction = tl.load(factors + 3 * row + 1)
    step = tl.load(factors + 3 * row + 2)

    g = tl.load(gradient + offsets, mask=mask, other=0.0)
    if grad_scale is not None:
        g = tl.div_rn(g, tl.load(grad_scale))
    p = tl.load(master + offsets, mask=mask, other=0.0)
    m = tl.load(exp_avg + offsets, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(exp_avg_sq + offsets, mask=mask, other=0.0).to(tl.float32)

    m = m + weight1 * (g - m)
    v = v * beta2 + weight2 * g * g
    denominator = tl.div_rn(tl.sqrt_rn(v), correction) + eps
    p = p * decay - step_size * tl.div_rn(m, denominator)

    tl.store(master + offsets, p, mask=mask)
    if rounded is not None:
        tl.store(rounded + offsets, p.to(rounded.dtype.element_ty), mask=mask)
    if STOCHASTIC:
        elements = offsets + first
        key = _mix(step.to(tl.int32).to(tl.uint32, bitcast=True) ^ key0.to(tl.uint32, bitcast=True))
        other = _mix(key ^ key1.to(tl.uint32, bitcast=True))
        bits = _mix(_mix(elements.to(tl.uint32) ^ key) + other + (elements >> 32).to(tl.uint32))
        tl.store(exp_avg + offsets, _round(m, bits & 0xFFFF), mask=mask)
        tl.store(exp_avg_sq + offsets, _round(v, bits >> 16), mask=mask)
    else:
        tl.store(exp_avg + offsets, m, mask=mask)
        tl.store(exp_avg_sq + offsets, v, mask=mask)


def adamw(
    master: torch.Tensor,
    gradient: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    factors: torch.Tensor,
    row: int,
    *,
    rounded: torch.Tensor | None,
    grad_scale: torch.Tensor | None,
    found_inf: torch.Tensor | None,
    keys: tuple[int, int],
    first: int,
    decay: float,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """Update `master` and both moments in place. All tensors are contiguous and on one GPU.

    Args:
        master, gradient: fp32, of one shape.
        exp_avg, exp_avg_sq: of that shape, fp32, or bfloat16 with stochastic rounding.
        factors: `[n, 3]`, fp32; row `row` is lr / (1 - beta1^t), sqrt(1 - beta2^t) and the step t.
        rounded: of that shape, of any floating dtype; also gets the new `master`.
        grad_scale: 0-dim, fp32; divides the gradient if given.
        found_inf: 0-dim; nothing is written if it is not zero.
        keys: of the random bits, two signed 32-bit integers.
        first: number of the first element in its stream of random bits.
        decay: 1 - lr * weight decay.
    """
    count = master.numel()
    if count == 0:  # an empty grid cannot be launched
        return
    with torch.cuda.device_of(master):
        _adamw_kernel[(triton.cdiv(count, BLOCK),)](
            master,
            gradient,
            exp_avg,
            exp_avg_sq,
            rounded,
            factors,
            grad_scale,
            found_inf,
            count,
            row,
            *keys,
            first,
            decay,
            1 - betas[0],
            betas[1],
            1 - betas[1],
            eps,
            STOCHASTIC=exp_avg.dtype == torch.bfloat16,
            BLOCK=BLOCK,
        )
