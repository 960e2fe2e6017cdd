"""What is element-wise in an optimizer of matrices, each in one pass over memory, as Triton kernels.

`optim/matrix_optimizer.py` says what they compute, and does so on the CPU.
"""

from __future__ import annotations

import torch

from .language import tl, triton

BLOCK = 1024


@triton.jit
def _momentum_kernel(
    gradient, momentum, out, grad_scale, found_inf, count, weight, beta, NESTEROV: tl.constexpr, BLOCK: tl.constexpr
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < count
    g = tl.load(gradient + offsets, mask=mask, other=0.0)
    if grad_scale is not None:
        g = tl.div_rn(g, tl.load(grad_scale))
    m = tl.load(momentum + offsets, mask=mask, other=0.0)
    m = m + weight * (g - m)
    if out is not None:
        direction = m
        if NESTEROV:
            direction = g + beta * (m - g)
        tl.store(out + offsets, direction.to(out.dtype.element_ty), mask=mask)
    if found_inf is not None:
        mask = offsets < tl.where(tl.load(found_inf) == 0, count, 0)
    tl.store(momentum + offsets, m, mask=mask)


@triton.jit
def _update_kernel(master, update, rounded, found_inf, count, decay, rate, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    limit = count
    if found_inf is not None:
        limit = tl.where(tl.load(found_inf) == 0, count, 0)
    mask = offsets < limit
    p = tl.load(master + offsets, mask=mask, other=0.0)
    u = tl.load(update + offsets, mask=mask, other=0.0).to(tl.float32)
    p = p * decay - rate * u
    tl.store(master + offsets, p, mask=mask)
    if rounded is not None:
        tl.store(rounded + offsets, p.to(rounded.dtype.element_ty), mask=mask)


def update_momentum(
    gradient: torch.Tensor,
    momentum: torch.Tensor,
    out: torch.Tensor | None,
    *,
    beta: float,
    nesterov: bool,
    grad_scale: torch.Tensor | None,
    found_inf: torch.Tensor | None,
) -> None:
    """Update `momentum` in place, and write it, or Nesterov's mean of it and the gradient, to `out`.

    Args:
        gradient, momentum: fp32, of one shape, contiguous and on one GPU.
        out: of that shape, of any floating dtype.
        beta: what is kept of the momentum.
        grad_scale: 0-dim, fp32; divides the gradient if given.
        found_inf: 0-dim; `momentum` stays as it is if it is not zero.
    """
    count = momentum.numel()
    if count == 0:
        return
    with torch.cuda.device_of(momentum):
        _momentum_kernel[(triton.cdiv(count, BLOCK),)](
            gradient,
            momentum,
            out,
            grad_scale,
            found_inf,
            count,
            float(1 - beta),
            float(beta),
            NESTEROV=nesterov,
            BLOCK=BLOCK,
        )


def apply_update(
    master: torch.Tensor,
    update: torch.Tensor,
    rounded: torch.Tensor | None,
    *,
    decay: float,
    rate: float,
    found_inf: torch.Tensor | None,
) -> None:
    """`master * decay - rate * update`, in place.

    Args:
        master: fp32, contiguous, on a GPU.
        update: of its shape, of any floating dtype.
        rounded: of its shape, of any floating dtype; also gets the new `master`.
        found_inf: 0-dim; nothing is written if it is not zero.
    """
    count = master.numel()
    if count == 0:
        return
    with torch.cuda.device_of(master):
        _update_kernel[(triton.cdiv(count, BLOCK),)](
            master, update, rounded, found_inf, count, float(decay), float(rate), BLOCK=BLOCK
        )
