"""Triton, in which kernels are written, or what to install."""

from __future__ import annotations

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError(
        "Training on a GPU needs triton, which torch's CUDA builds for Linux include; install it with `pip install "
        "triton`."
    ) from error

__all__ = ["tl", "triton"]
