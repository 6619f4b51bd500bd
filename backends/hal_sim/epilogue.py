# SPDX-License-Identifier: Apache-2.0
"""What follows a sum of products: a factor, an addend, and one rounding."""

from __future__ import annotations

import torch


def finished(
    product: torch.Tensor, addend: torch.Tensor | None, alpha: float, beta: float, dtype: torch.dtype
) -> torch.Tensor:
    """Return alpha product + beta addend in the accumulator's format, rounded once to `dtype`."""
    if alpha != 1:
        product = product * alpha
    if addend is not None and beta != 0:  # then not even a NaN of it counts
        wide = addend.to(product.dtype)
        product = product + (wide if beta == 1 else wide * beta)
    return product.to(dtype)
