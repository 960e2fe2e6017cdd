"""`silu(gate) * up` (SwiGLU, Shazeer 2020, arXiv:2002.05202) of gates and ups side by side, in one pass each way."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def silu_and_multiply(x: torch.Tensor) -> torch.Tensor:
    """`[rows, 2 I] -> [rows, I]`: the SiLU of the first half times the second. In bf16 only the result is rounded."""
    if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16, torch.float32):
        return _SiluAndMultiply.apply(x)
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


class _SiluAndMultiply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        from .kernels.gated import forward

        x = x.contiguous()
        ctx.save_for_backward(x)
        return forward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        from .kernels.gated import backward

        return backward(grad.contiguous(), ctx.saved_tensors[0])
