"""The orthogonal factor of matrices by Newton-Schulz iteration, as Muon takes it."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from .kernels.symmetric import supports, symmetric_product

# Jordan's: the slope at zero is as large as it can be, so five steps bring all but tiny singular values near 1.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
SMALLEST_NORM = 1e-7

# Name -> what multiplies the learning rate of a matrix of so many output and input features.
SCALES: dict[str, Callable[[int, int], float]] = {
    "match_rms_adamw": lambda fan_out, fan_in: 0.2 * math.sqrt(max(fan_out, fan_in)),
    "original": lambda fan_out, fan_in: math.sqrt(max(1, fan_out / fan_in)),
    "spectral": lambda fan_out, fan_in: math.sqrt(fan_out / fan_in),
}


def orthogonalize(
    matrices: torch.Tensor, steps: int = 5, coefficients: tuple[float, float, float] = COEFFICIENTS
) -> torch.Tensor:
    """About `U V^T` of every `U S V^T`, with singular values between 0.7 and 1.2 instead of 1.

    The quintic iteration of Muon (Jordan et al. 2024), X <- aX + b(XX^T)X + c(XX^T)^2 X, from X divided by its
    Frobenius norm. On the CPU each is that of `torch.optim.Muon` to the last bit; on a GPU a batch is computed at once,
    long matrices in bfloat16 by `iterate_gram`, and half of what is symmetric (`ops/kernels/symmetric.py`).

    Args:
        matrices: `[count, rows, columns]`, in the dtype in which to compute. It may be overwritten.
        steps: of the iteration.

    Returns:
        `[count, rows, columns]`, in the same dtype.
    """
    rows, columns = matrices.shape[1:]
    is_long = max(rows, columns) >= 2 * min(rows, columns) and matrices.dtype == torch.bfloat16 and steps > 1
    if is_long and matrices.is_cuda:
        return iterate_gram(matrices, steps, coefficients)
    x = matrices.mT if rows > columns else matrices
    if matrices.device.type == "cpu":  # a batch of one has the bits of torch's own, matrix by matrix
        found = torch.stack([_iterate(matrix, steps, coefficients) for matrix in x])
    else:
        found = _iterate_batch(x, steps, coefficients)
    return found.mT if rows > columns else found


def _iterate(x: torch.Tensor, steps: int, coefficients: tuple[float, float, float]) -> torch.Tensor:
    a, b, c = coefficients
    x = x / x.norm().clamp(min=SMALLEST_NORM)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _normalized(x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Each divided by its Frobenius norm; `x` may be overwritten where `dtype` is another one."""
    norms = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.float32).clamp_(min=SMALLEST_NORM)
    if dtype is None or dtype == x.dtype:
        return x / norms.to(x.dtype)
    return x.mul_(norms.reciprocal_().to(x.dtype)).to(
        dtype
    )  # two passes that torch vectorizes are faster than one that casts


def _iterate_batch(x: torch.Tensor, steps: int, coefficients: tuple[float, float, float]) -> torch.Tensor:
    a, b, c = coefficients
    x = _normalized(x)
    for _ in range(steps):
        gram = symmetric(x, x.mT)
        x = torch.baddbmm(x, symmetric(gram, gram, gram, alpha=c, beta=b), x, beta=a)
    return x


def symmetric(
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    diagonal: float = 0.0,
) -> torch.Tensor:
    """`alpha a b + beta c + diagonal I` of batches of matrices, which is symmetric but for rounding."""
    if supports(a, b):
        return symmetric_product(a, b, c, alpha=alpha, beta=beta, diagonal=diagonal)
    product = torch.bmm(a, b) if c is None else torch.baddbmm(c, a, b, beta=beta, alpha=alpha)
    if c is None and alpha != 1.0:
        product.mul_(alpha)
    if diagonal:
        product.diagonal(dim1=1, dim2=2).add_(diagonal)
    return product


def iterate_gram(x: torch.Tensor, steps: int, coefficients: tuple[float, float, float]) -> torch.Tensor:
    """The same iteration on the small matrix G = XX^T (X^TX of a tall X), with fewer products for long matrices.

    A step multiplies X by P = aI + bG + cG^2, and G becomes PGP: all of them are polynomials of the first G. X is
    multiplied by their product after at most three steps; then G is computed anew, since its rounding errors grow. In
    float16, whose range suffices for what has norm 1: nearer to the iteration in fp32 than the plain one in bfloat16.

    Args:
        x: `[count, rows, columns]`, bfloat16.
    """
    a, b, c = coefficients
    is_tall = x.shape[1] > x.shape[2]
    dtype, x = x.dtype, _normalized(x, torch.float16)
    parts = max(2, -(-steps // 3))
    for count in ((steps + part) // parts for part in range(parts)):
        gram, product = symmetric(x.mT, x) if is_tall else symmetric(x, x.mT), None
        for step in range(count):
            polynomial = symmetric(gram, gram, gram, alpha=c, beta=b, diagonal=a)
            product = polynomial if product is None else symmetric(polynomial, product)
            if step + 1 < count:
                gram = symmetric(symmetric(polynomial, gram), polynomial)
        if product is not None:
            x = torch.bmm(x, product) if is_tall else torch.bmm(product, x)
    return x.to(dtype)


def flops(rows: int, columns: int, steps: int = 5) -> int:
    """Of one matrix: three products in each step."""
    small, large = sorted((rows, columns))
    return steps * (4 * small * small * large + 2 * small**3)
