"""Products of matrices that are symmetric: half of the tiles are computed, each is written twice.

The kernel is quack's `gemm_symmetric`, which `pip install hf-nanotron[flash]` installs with FlashAttention-4.
`ops/newton_schulz.py` says where such products are, and computes whole ones elsewhere.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch

SMALLEST = 2048  # of a result that pays: 512 takes four times as long as by bmm (H200; sizes between were not measured)
ALIGNED = 8  # elements of 16 bits that are copied at once


@functools.cache
def quack_kernel() -> Callable[..., torch.Tensor] | None:
    """`quack.gemm_interface.gemm_symmetric`; None where quack is not installed, or not for this torch and GPU."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] not in (9, 10):
        return None
    try:
        module: Any = importlib.import_module("quack.gemm_interface")
    except Exception:  # its compiler's packages raise errors of their own where they do not fit
        return None
    return getattr(module, "gemm_symmetric", None)


def supports(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether the kernel computes `a b`, of `[count, size, inner]` and `[count, inner, size]`."""
    if not a.is_cuda or a.dtype not in (torch.bfloat16, torch.float16) or a.shape[1] < SMALLEST:
        return False
    is_aligned = all(size % ALIGNED == 0 for size in a.shape[1:])
    return is_aligned and all(_is_dense(x) for x in (a, b)) and quack_kernel() is not None


def _is_dense(x: torch.Tensor) -> bool:
    return (x.is_contiguous() or x.mT.is_contiguous()) and x.data_ptr() % 16 == 0


def symmetric_product(
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    diagonal: float = 0.0,
) -> torch.Tensor:
    """`alpha a b + beta c + diagonal I`, of which only what is on and below the diagonal is computed.

    Args:
        a: `[count, size, inner]`, that `supports` accepts.
        b: `[count, inner, size]`, of the same dtype; such that `a b` is symmetric but for rounding.
        c: `[count, size, size]`, symmetric, of the same dtype, contiguous.

    Returns:
        `[count, size, size]`, in the same dtype; equal to its transpose in every bit.
    """
    kernel = quack_kernel()
    assert kernel is not None
    found = kernel(a, b, c, alpha=float(alpha), beta=float(beta))
    if diagonal:
        found.diagonal(dim1=1, dim2=2).add_(diagonal)
    return found
