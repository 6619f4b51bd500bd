# SPDX-License-Identifier: Apache-2.0
"""SwiGLU experts, forward and backward, a few at a time: all of them in float64 need not fit in memory.

Legend: n rows of each of G experts, D model dim, F expert hidden dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from hal.contract import Arithmetic
from hal_conformance.case import I64, Array
from hal_conformance.numerics.absent import needed
from hal_conformance.numerics.chained import Chained, product, silu, silu_backward, together

Weights = tuple[Array, Array, Array]
"""w1, w3 [.., F, D] and w2 [.., D, F], as they are stored."""


@dataclass(frozen=True)
class Swiglu:
    """The inside of an expert: gate g, up u, s = silu(g), h = s u, y; each as stored in `dtype`.

    Or of several with as many rows each, with an axis for them in front. An implementation that keeps one of these
    wider is more precise.
    """

    x: Chained
    w1_FD: Chained
    w3_FD: Chained
    w2_DF: Chained
    g: Chained
    u: Chained
    s: Chained
    h: Chained
    y: Chained
    dtype: str
    rule: Arithmetic

    @classmethod
    def of(cls, x: Chained, weights: Weights, dtype: str, rule: Arithmetic) -> Swiglu:
        """Compute w2 (silu(w1 x) * (w3 x)) for the rows of one expert."""
        w1, w3, w2 = map(Chained.exact, weights)
        g = product(x, w1.T, rule).stored(dtype)
        u = product(x, w3.T, rule).stored(dtype)
        s = silu(g).stored(dtype)
        h = (s * u).stored(dtype)
        return cls(x, w1, w3, w2, g, u, s, h, product(h, w2.T, rule).stored(dtype), dtype, rule)

    def backward(self, dy: Chained) -> SwigluGradients:
        """Return the gradients for that of y; every stage may be stored in `dtype`."""
        dtype, rule = self.dtype, self.rule
        dh = product(dy, self.w2_DF, rule).stored(dtype)
        du = (dh * self.s).stored(dtype)
        ds = (dh * self.u).stored(dtype)
        dg = silu_backward(ds, self.g).stored(dtype)
        through_g = product(dg, self.w1_FD, rule).stored(dtype)
        through_u = product(du, self.w3_FD, rule).stored(dtype)
        dx = together(through_g, through_u).stored(dtype)  # both paths share the errors of dh and g
        return SwigluGradients(dx, dg, du, dy, self)


@dataclass(frozen=True)
class SwigluGradients:
    """Gradients of the rows, of gate and up, and of y; of several experts, with an axis for them in front."""

    dx: Chained
    dg: Chained
    du: Chained
    dy: Chained
    inside: Swiglu

    @property
    def weights(self) -> tuple[Chained, Chained, Chained]:
        """Those of w1, w3 and w2, computed now: sums over the rows that are here."""
        pairs = (self.dg, self.inside.x), (self.du, self.inside.x), (self.dy, self.inside.h)
        dw1_FD, dw3_FD, dw2_DF = (
            product(of.T, factor, self.inside.rule).stored(self.inside.dtype) for of, factor in pairs
        )
        return dw1_FD, dw3_FD, dw2_DF


def unknown(shape: tuple[int, ...]) -> Chained:
    """Return rows that nobody has computed."""
    return Chained(np.full(shape, np.nan), np.zeros(shape))


TOGETHER = 2**17
"""Elements of one matrix of the experts that are computed at once: enough for numpy to be busy."""


@dataclass(frozen=True)
class Part:
    """The rows of a few experts, the same number of each.

    Attributes:
        experts: [G].
        rows: [G, n].
        inside: what the experts make of them.
        whole: whether the experts have no other rows. Otherwise the others are not needed, nor what is a sum over all.
    """

    experts: I64
    rows: I64
    inside: Swiglu
    whole: bool


def each(
    x_RD: Array, counts_E: I64, weights: Weights, dtype: str, rule: Arithmetic, of_R: I64 | None = None
) -> Iterator[Part]:
    """Yield every row that is needed, once.

    Args:
        x_RD: rows, expert by expert.
        counts_E: rows of each expert.
        weights: of all experts.
        dtype: in which every stage may be stored.
        rule: of the products.
        of_R: what each row is in what a recording holds (`absent.Needed`); itself, if not said.
    """
    of_R = np.arange(len(x_RD)) if of_R is None else of_R
    expert_R = np.repeat(np.arange(len(counts_E)), counts_E)
    whole_E, asked_R = needed(len(counts_E), of_R)
    most = max(1, TOGETHER // max(1, weights[0][0].size))
    for whole, rows in ((True, whole_E[expert_R]), (False, asked_R & ~whole_E[expert_R])):
        of_E = np.bincount(expert_R[rows], minlength=len(counts_E))
        place, first = np.flatnonzero(rows), np.cumsum(of_E) - of_E
        for n in np.unique(of_E[of_E > 0]):
            alike = np.flatnonzero(of_E == n)
            for at in range(0, len(alike), most):
                e = alike[at : at + most]
                r = place[first[e][:, None] + np.arange(n)]
                w1, w3, w2 = (w[e] for w in weights)
                yield Part(e, r, Swiglu.of(Chained.exact(x_RD[r]), (w1, w3, w2), dtype, rule), whole)


def experts(x_RD: Array, counts_E: I64, weights: Weights, dtype: str, rule: Arithmetic) -> Chained:
    """Return the experts' output [R, D], stored."""
    y = unknown(x_RD.shape)
    for part in each(x_RD, counts_E, weights, dtype, rule):
        y[part.rows] = part.inside.y
    return y
