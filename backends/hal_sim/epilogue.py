# SPDX-License-Identifier: Apache-2.0
"""What follows a sum of products: a factor, an addend, and one rounding."""

from __future__ import annotations

import math

import torch


def finished(
    product: torch.Tensor, addend: torch.Tensor | None, alpha: complex, beta: complex, dtype: torch.dtype
) -> torch.Tensor:
    """Return alpha product + beta addend in the accumulator's format, rounded once to `dtype`.

    Raises:
        RuntimeError: a factor is no number of the accumulator's format: complex, or too large.
    """
    alpha, beta = _real(alpha, product.dtype), _real(beta, product.dtype)
    if alpha != 1:
        product = product * alpha
    if addend is not None and beta != 0:  # then not even a NaN of it counts
        wide = addend.to(product.dtype)
        product = product + (wide if beta == 1 else wide * beta)
    return product.to(dtype)


def _real(factor: complex, dtype: torch.dtype) -> float:
    """Return a factor, which may be a complex number without an imaginary part, or refuse it in torch's words."""
    number = complex(factor)
    if number.imag or torch.finfo(dtype).max < abs(number.real) < math.inf:
        name = "double" if dtype == torch.float64 else "float"
        raise RuntimeError(f"value cannot be converted to type {name} without overflow")
    return number.real
