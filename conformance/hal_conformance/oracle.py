# SPDX-License-Identifier: Apache-2.0
"""The float64 oracle of the MoE operators: each yields the value and how far an honest device may be from it.

Stages start from exact numbers: inputs, or what the device itself returned from the stage before (a local bound).
Where the stage before cannot be seen, variances are chained: a stage's variance is that of its own roundings plus the
squared Jacobian times the variance of its inputs. Two paths that share one error add as (a + b)^2 <= 2 a^2 + 2 b^2.

Legend: T tokens, D model dim, F expert hidden dim, E experts, K choices, R routed rows, n rows of one expert.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hal.contract import Arithmetic
from hal_conformance.bounds import U32, Bounded, half_ulp, logistic, matmul_variance
from hal_conformance.case import F64, I64


def store_variance(value: F64, var: F64, dtype: str) -> F64:
    """Return the variance after rounding to storage: uniform within half an ulp, at the next larger binade's edge."""
    return np.asarray(var + half_ulp(np.abs(value) + 4.0 * np.sqrt(var), dtype) ** 2 / 3.0)


def product(a: F64, var_a: F64 | float, b: F64, var_b: F64 | float, rule: Arithmetic) -> tuple[F64, F64]:
    """Return a @ b and its variance, for inexact [M, K] and [K, N]; not stored."""
    value, squares = a @ b, (a * a) @ (b * b)
    var = matmul_variance(value, squares, a.shape[-1], rule)
    if np.any(var_a):
        var = var + np.broadcast_to(var_a, a.shape) @ (b * b)
    if np.any(var_b):
        var = var + (a * a) @ np.broadcast_to(var_b, b.shape)
    return value, np.asarray(var)


@dataclass(frozen=True)
class Hidden:
    """The inside of a SwiGLU: gate g, up u, s = silu(g), h = s u, each with its variance as stored."""

    g: F64
    var_g: F64
    u: F64
    var_u: F64
    s: F64
    var_s: F64
    h: F64
    var_h: F64
    sigma: F64


def hidden(x: F64, w1_FD: F64, w3_FD: F64, dtype: str, rule: Arithmetic) -> Hidden:
    """Compute silu(x w1^T) * (x w3^T) for rows of one expert.

    Each of g, u, s and h may be stored in `dtype`; an implementation that keeps one of them wider is more precise.
    Source of silu's error: `bounds.sigmoid` and one product, |s| u [(1 - sigma)(2 |g| + 4) + 5].
    """
    g, var_g = product(x, 0.0, w1_FD.T, 0.0, rule)
    u, var_u = product(x, 0.0, w3_FD.T, 0.0, rule)
    var_g, var_u = store_variance(g, var_g, dtype), store_variance(u, var_u, dtype)
    sigma = logistic(g)
    s = g * sigma
    slope = sigma * (1.0 + g * (1.0 - sigma))
    own = np.abs(s) * U32 * ((1.0 - sigma) * (2.0 * np.abs(g) + 4.0) + 5.0)
    # |silu''| <= 1/2: the second-order term of an error of variance v adds at most (1/2 * v)^2.
    var_s = store_variance(s, slope**2 * var_g + 0.25 * var_g**2 + own**2 / 3.0, dtype)
    h = s * u
    var_h = store_variance(h, u**2 * var_s + s**2 * var_u + var_s * var_u + (U32 * h) ** 2 / 3.0, dtype)
    return Hidden(g, var_g, u, var_u, s, var_s, h, var_h, sigma)


def spans(counts_E: I64) -> list[tuple[int, slice]]:
    """Return (expert, its rows) for each expert that has rows."""
    ends = np.cumsum(counts_E)
    return [(e, slice(int(end - n), int(end))) for e, (n, end) in enumerate(zip(counts_E, ends, strict=True)) if n]


def experts(x_RD: F64, counts_E: I64, w1: F64, w3: F64, w2: F64, dtype: str, rule: Arithmetic) -> tuple[F64, F64]:
    """Return the experts' output [R, D] and its variance, stored."""
    y, var = np.zeros_like(x_RD), np.zeros_like(x_RD)
    for e, rows in spans(counts_E):
        inside = hidden(x_RD[rows], w1[e], w3[e], dtype, rule)
        y[rows], v = product(inside.h, inside.var_h, w2[e].T, 0.0, rule)
        var[rows] = store_variance(y[rows], v, dtype)
    return y, var


@dataclass(frozen=True)
class ExpertGradients:
    """Gradients of the experts' inputs and weights, and their variances."""

    dx: F64
    var_dx: F64
    dw1: F64
    var_dw1: F64
    dw3: F64
    var_dw3: F64
    dw2: F64
    var_dw2: F64


def experts_backward(
    x_RD: F64, counts_E: I64, w1: F64, w3: F64, w2: F64, dy: F64, dtype: str, rule: Arithmetic,
    var_dy: F64 | None = None,
) -> ExpertGradients:  # fmt: skip
    """Return the gradients for an upstream gradient `dy`, [R, D]; every stage may be stored in `dtype`."""
    dx, var_dx = np.zeros_like(x_RD), np.zeros_like(x_RD)
    grads = {name: (np.zeros_like(w), np.zeros_like(w)) for name, w in (("1", w1), ("3", w3), ("2", w2))}
    for e, rows in spans(counts_E):
        x, up, var_up = x_RD[rows], dy[rows], 0.0 if var_dy is None else var_dy[rows]
        i = hidden(x, w1[e], w3[e], dtype, rule)
        dh, v_dh = product(up, var_up, w2[e], 0.0, rule)
        v_dh = store_variance(dh, v_dh, dtype)
        du = dh * i.s
        v_du = store_variance(du, i.s**2 * v_dh + dh**2 * i.var_s + v_dh * i.var_s + (U32 * du) ** 2, dtype)
        ds = dh * i.u
        v_ds = store_variance(ds, i.u**2 * v_dh + dh**2 * i.var_u + v_dh * i.var_u + (U32 * ds) ** 2, dtype)
        slope = i.sigma * (1.0 + i.g * (1.0 - i.sigma))
        dg = ds * slope
        # d slope / dg is at most 1/2. Own arithmetic: research form of SwiGLU's dg, relative to ds, not to dg,
        # because the slope has a zero.
        a, q = np.abs(i.g), 1.0 - i.sigma
        inner = (1 + a * q) * (4 + q * (2 * a + 4)) + a * q * (i.sigma * (2 * a + 4) + 4) + 3 + a * i.sigma
        own = np.abs(ds) * U32 * i.sigma * inner
        v_dg = store_variance(dg, slope**2 * v_ds + 0.25 * ds**2 * i.var_g + own**2 / 3.0, dtype)
        d1, v1 = product(dg, v_dg, w1[e], 0.0, rule)
        d3, v3 = product(du, v_du, w3[e], 0.0, rule)
        # Both paths share the errors of dh and g.
        dx[rows] = d1 + d3
        var_dx[rows] = store_variance(
            dx[rows], 2.0 * (store_variance(d1, v1, dtype) + store_variance(d3, v3, dtype)), dtype
        )
        terms: dict[str, tuple[F64, F64 | float, F64, F64 | float]] = {
            "1": (dg, v_dg, x, 0.0), "3": (du, v_du, x, 0.0), "2": (up, var_up, i.h, i.var_h),
        }  # fmt: skip
        for name, (left, v_left, right, v_right) in terms.items():
            v_left_t = v_left.T if isinstance(v_left, np.ndarray) else v_left
            value, var = product(left.T, v_left_t, right, v_right, rule)
            grads[name][0][e], grads[name][1][e] = value, store_variance(value, var, dtype)
    return ExpertGradients(dx, var_dx, *grads["1"], *grads["3"], *grads["2"])


def gather_rows(y_RD: F64, slot_R: I64, tokens: int, top_k: int) -> F64:
    """Return [T, K, D]: the row that answers each slot, zeros where none does."""
    rows = np.zeros((tokens * top_k, y_RD.shape[1]))
    rows[slot_R] = y_RD
    return rows.reshape(tokens, top_k, -1)


def combine(y_TKD: F64, weights_TK: F64, dtype: str) -> Bounded:
    """Add up weighted rows in float32, in any order, and store.

    K products and K - 1 additions, each rounded once on partial sums that never exceed sum |w y|: K u sum |w y|.
    """
    terms = y_TKD * weights_TK[:, :, None]
    k = terms.shape[1]
    absolute = np.abs(terms).sum(1)
    bound = k * U32 * absolute
    # Each of the 2 K - 1 roundings has at most half an ulp of a partial sum no larger than sum |w y|.
    return Bounded(terms.sum(1), bound, (2 * k - 1) * (U32 * absolute) ** 2 / 3.0).stored(dtype)
