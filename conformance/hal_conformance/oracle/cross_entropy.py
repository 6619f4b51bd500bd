# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy over a vocabulary, with the z-loss: mean over the tokens that count, and its gradient."""

from __future__ import annotations

import numpy as np

from hal_conformance.case import I64, Array
from hal_conformance.numerics.bounds import EXP, TINY32, U32, Bounded, positive_sum
from hal_conformance.numerics.budget import level


def cross_entropy(logits_TV: Array, targets_T: I64, ignore_index: int, z_coefficient: float) -> tuple[Bounded, Bounded]:
    """Return the loss, stored, and the gradient of the logits, not yet stored; rows that do not count have zeros.

    L = m + log sum exp(x - m). Each exp has the error eps of `bounds.softmax`; the sum has their p-weighted mean and
    that of `positive_sum`; log 2 ulp (4 u of the result); adding m rounds L. Together e, absolute. The loss of a
    token, L - x_target, adds a rounding of each of the two and of itself; z L^2 has 2 z |L| e and three roundings. The
    mean: a sum of terms that are not negative, a product and a division.

    The gradient ((1 + 2 z L) p - 1 [v = target]) / N. p is exp(x - m) / sum, with the errors above, or exp(x - L) with
    those of L: eps + e + u |L| + the sum's + 3 u cover either. The difference is rounded relative to itself and to p,
    since it cancels where p is nearly 1.
    """
    counted = np.flatnonzero(targets_T != ignore_index)
    gradient, bound = np.zeros(logits_TV.shape), np.zeros(logits_TV.shape)
    number = len(counted)
    if number == 0:
        return Bounded.exact(np.zeros(())), Bounded(gradient, bound, bound)
    x = np.asarray(logits_TV, np.float64)[counted]
    at = level(logits_TV.size)
    rows = np.arange(number), targets_T[counted]
    top = x.max(1, keepdims=True)
    masked = np.isneginf(x)  # exp(-inf) is 0, without an error
    d = np.where(masked, 0.0, top - x)
    e = np.where(masked, 0.0, np.exp(-d))
    total = e.sum(1, keepdims=True)
    p = e / total
    eps = EXP + U32 * (3.0 * d + np.where(masked, 0.0, np.abs(x)) + np.abs(top))
    log = np.log(total)
    lse = top + log
    # Where p is 0, eps may be anything.
    common = np.einsum("tv,tv->t", p, eps)[:, None] + positive_sum(total[:, 0], e, 1, at)[:, None]
    of_lse = common + 4.0 * U32 * np.abs(log) + U32 * np.abs(lse)
    picked = x[rows][:, None]
    plain = lse - picked
    losses = plain + z_coefficient * lse**2
    own = (
        of_lse * (1.0 + 2.0 * z_coefficient * np.abs(lse))
        + U32 * (np.abs(lse) + np.abs(picked) + 2.0 * plain + 4.0 * z_coefficient * lse**2)
        + U32 * (np.abs(picked) + np.abs(top))
    )
    # A sum over the plain terms and one over the squares, or one over both: each within this relative error.
    summed = np.maximum(
        positive_sum(losses.sum(0), losses, 0, at)[0],
        positive_sum(plain.sum(0), plain, 0, at)[0],
    )
    value = np.asarray(losses.mean())
    loss = Bounded.deterministic(value, own.mean() + np.abs(value) * (summed + 3.0 * U32)).stored("float32")
    slope = 1.0 + 2.0 * z_coefficient * lse
    part = p * slope
    rough = np.abs(part) * (eps + (common + of_lse + U32 * np.abs(lse) + 4.0 * U32))
    rough += 2.0 * z_coefficient * p * of_lse
    part[rows] -= 1.0
    rough += 3.0 * U32 * np.abs(part)
    rough[rows] += 2.0 * U32
    gradient[counted], bound[counted] = part / number, rough / number + TINY32
    return loss, Bounded.deterministic(gradient, bound)
