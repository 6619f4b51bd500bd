# SPDX-License-Identifier: Apache-2.0
"""RMSNorm and LayerNorm, value and gradients, in float32 with one rounding of each result.

Local bounds from exact inputs. Legend: u unit roundoff of float32, n = D channels, r = 1 / sqrt(mean square + eps),
g = weight dy.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hal.contract import Arithmetic
from hal_conformance.case import F64, Array
from hal_conformance.numerics.bounds import TINY32, U32, Bounded, matmul_bound, positive_sum
from hal_conformance.numerics.budget import Level, level

ROOT = 4.0 * U32
"""Relative error of 1 / sqrt: 2 ulp where it is one instruction, or a root and a division."""


@dataclass(frozen=True)
class Normed:
    """A norm's result and gradients; each not yet stored."""

    y: Bounded
    dx: Bounded
    dweight: Bounded
    dbias: Bounded | None = None


def rms_norm(x_TD: Array, weight_D: Array, dy_TD: Array, eps: float) -> Normed:
    """RMSNorm.

    r: each square is rounded (u), their sum has the error of `positive_sum`, the division by n u; this counts by the
    share that the mean square has of what is under the root; eps and the addition 2 u; the root halves all of it and
    adds `ROOT`. y = x r w: two more products.

    dx = r g - x r^3 / n sum(g x): the first term has r's error and two roundings; the sum is one of products of
    either sign (`matmul_bound`, and a rounding more for each term: of g); r enters the second term three times, with
    four roundings; the difference is rounded relative to both. dweight = sum_t dy x r: r's error is one for a whole
    row, so it adds up absolutely.
    """
    x, w, dy = (np.asarray(array, np.float64) for array in (x_TD, weight_D, dy_TD))
    n, at, at_weight = x.shape[1], level(x.size), level(w.size)
    squares = x * x
    total = squares.sum(1)
    mean = total / n
    share = mean / (mean + eps)
    relative = (0.5 * (share * (positive_sum(total, squares, 1, at) + 2.0 * U32) + 2.0 * U32) + ROOT)[:, None]
    r = 1.0 / np.sqrt(mean + eps)[:, None]
    y = x * r * w
    g = w * dy
    dot, dot_bound = _sum(g * x, 1, 2, at)
    first, second = r * g, x * (r**3 * dot / n)
    dx_bound = (
        np.abs(first) * (relative + 3.0 * U32)
        + np.abs(second) * (3.0 * relative + 5.0 * U32)
        + np.abs(x) * r**3 / n * dot_bound
    )
    terms = dy * x * r
    dweight, dweight_bound = _sum(terms, 0, 2, at_weight)
    dweight_bound = dweight_bound[0] + (np.abs(terms) * relative).sum(0)
    return Normed(
        Bounded.deterministic(y, np.abs(y) * (relative + 2.0 * U32) + TINY32),
        Bounded.deterministic(first - second, dx_bound + TINY32),
        Bounded.deterministic(dweight[0], dweight_bound + TINY32),
    )


def layer_norm(x_TD: Array, weight_D: Array, bias_D: Array, dy_TD: Array, eps: float) -> Normed:
    """LayerNorm, with the variance of the differences from the mean.

    Mean: a sum (`matmul_bound`) and a division. Variance: each difference has the mean's error, which adds its square
    only, since the differences sum to 0, and a rounding of its own; squared, summed, divided: `positive_sum` + 4 u.
    Welford's running mean is off by a damped walk of deviation u |mean| sqrt(k) / 3 after k terms; times differences
    of random sign this moves the variance by a relative lambda u kappa / 2, kappa = sqrt(1 + mean^2 / var).

    y: the difference may be formed after scaling (x r - mean r), so it is rounded relative to |x| + 2 |mean|. The
    gradients' sums are sum(g) and sum(g x^); the latter may be formed from x and mean apart.

    dx = r (g - sum(g) / n - x^ sum(g x^) / n), dweight = sum_t dy x^, dbias = sum_t dy.
    """
    x, w, b, dy = (np.asarray(array, np.float64) for array in (x_TD, weight_D, bias_D, dy_TD))
    n, at, at_weight = x.shape[1], level(x.size), level(w.size)
    total, total_bound = _sum(x, 1, 0, at)
    mean, mean_bound = total / n, total_bound / n + U32 * np.abs(total / n)
    centred = x - mean
    squares = centred**2
    var = squares.sum(1, keepdims=True) / n
    kappa = np.sqrt(1.0 + mean**2 / np.where(var > 0.0, var, 1.0))
    of_var = positive_sum(squares.sum(1), squares, 1, at)[:, None] + 4.0 * U32 + 0.5 * at.deviations * U32 * kappa
    absolute = var * of_var + mean_bound**2
    relative = 0.5 * (absolute / (var + eps) + 2.0 * U32) + ROOT
    r = 1.0 / np.sqrt(var + eps)
    hat = centred * r
    size = (np.abs(x) + 2.0 * np.abs(mean)) * r  # of what is subtracted, where it is scaled first
    hat_bound = np.abs(hat) * (relative + U32) + mean_bound * r + U32 * size
    y = hat * w + b
    g = w * dy
    plain, plain_bound = _sum(g, 1, 1, at)
    _, dot_bound = _sum(g * size, 1, 2, at)
    dot = (g * hat).sum(1, keepdims=True)
    # An error of the mean is one for the whole row: it meets sum(g), not sum |g|.
    dot_bound = dot_bound + np.abs(plain) * mean_bound * r + np.abs(dot) * relative
    inner = g - plain / n - hat * dot / n
    dx_bound = r * (
        plain_bound / n + np.abs(hat) * dot_bound / n + hat_bound * np.abs(dot) / n
        + 4.0 * U32 * (np.abs(g) + np.abs(plain) / n + size * np.abs(dot) / n)
    ) + np.abs(r * inner) * relative  # fmt: skip
    terms = dy * hat
    dweight = terms.sum(0)
    _, dweight_bound = _sum(dy * size, 0, 2, at_weight)
    dweight_bound = dweight_bound[0] + (np.abs(terms) * relative + np.abs(dy) * mean_bound * r).sum(0)
    dbias, dbias_bound = _sum(dy, 0, 0, at_weight)
    return Normed(
        Bounded.deterministic(y, np.abs(w) * hat_bound + U32 * (np.abs(hat * w) + np.abs(b) + np.abs(y)) + TINY32),
        Bounded.deterministic(r * inner, dx_bound + TINY32),
        Bounded.deterministic(dweight, dweight_bound + TINY32),
        Bounded.deterministic(dbias[0], dbias_bound[0] + TINY32),
    )


def _sum(terms: F64, axis: int, roundings: int, at: Level) -> tuple[F64, F64]:
    """Return a float32 sum of terms that were rounded so often each, and its bound; the axis is kept."""
    n = terms.shape[axis]
    value, squares = terms.sum(axis, keepdims=True), (terms**2).sum(axis, keepdims=True)
    bound = matmul_bound(value, squares, np.abs(terms).sum(axis, keepdims=True), n, Arithmetic(), at)
    more = roundings * at.deviations / np.sqrt(3.0) * U32 * np.sqrt(squares)
    return value, bound + more
