# SPDX-License-Identifier: Apache-2.0
"""The norm of all gradients together, and gradients scaled to it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hal.moe.optimizer_ops import CLIP_EPSILON
from hal_conformance.case import F64
from hal_conformance.numerics.bounds import TINY32, U32, Bounded, positive_sum
from hal_conformance.numerics.budget import level


def clip_grad_norm(
    gradients: Sequence[F64], max_norm: float, dtypes: str | Sequence[str], *, tensors: int | None = None
) -> tuple[Bounded, list[Bounded]]:
    """Return the norm, stored in float32, and the clipped gradients, stored in their dtypes.

    The sum of n squares: each is rounded once, or twice more where a norm divides by the largest element first, 3 u;
    the sum of positive terms in any order; for norms of norms a root, a square and a sum over T tensors, T + 2 u. The
    root halves all that and adds 2 u. Squares below the normal numbers may be lost, `TINY32` each.

    The factor c = max / (norm + epsilon) inherits the norm's error and has two constants, a sum and a quotient, 4 u.
    It is cut at 1 and grows with its error, so it lies between min(1, c -) and min(1, c +); where both are 1 it is
    exactly 1, and the gradients come back as they were, as they do under a limit of infinity. The product is rounded in
    float32, and stored.

    Args:
        gradients: all of them.
        max_norm: the limit.
        dtypes: of the gradients: one for each, or one for all.
        tensors: T, where the device had the same numbers in more tensors.
    """
    flat = np.concatenate([g.reshape(-1) for g in gradients])
    squares = flat**2
    total = float(squares.sum())
    norm = float(np.sqrt(total))
    factor = max_norm / (norm + CLIP_EPSILON)
    if not np.isfinite(total):
        return Bounded.exact(np.asarray(norm)), [Bounded.exact(g * factor) for g in gradients]
    summed = float(positive_sum(np.asarray(total), squares, 0, level(len(gradients) + 1)))
    lost = len(flat) * TINY32 / total if total > 0 else 0.0
    relative = 0.5 * (summed + lost + (5 + (tensors or len(gradients))) * U32) + 2.0 * U32
    around = factor * (relative + 4.0 * U32)
    near = (factor, factor - around, factor + around) if np.isfinite(max_norm) else (1.0, 1.0, 1.0)
    value, low, high = (min(1.0, c) for c in near)
    spread = max(high - value, value - low)
    clipped = []
    for g, dtype in zip(gradients, [dtypes] * len(gradients) if isinstance(dtypes, str) else dtypes, strict=True):
        if low == 1.0:
            clipped.append(Bounded.exact(g))
            continue
        product = g * value
        own = np.abs(g) * spread + (0.0 if dtype == "float32" else U32) * np.abs(product) + TINY32 * (g != 0)
        clipped.append(Bounded.deterministic(product, own).stored(dtype))
    return Bounded.deterministic(np.asarray(norm), np.asarray(norm * relative)).stored("float32"), clipped
