# SPDX-License-Identifier: Apache-2.0
"""SwiGLU experts, forward and backward, a few at a time: all of them in float64 need not fit in memory.

Legend: n rows of each of G experts, D model dim, F expert hidden dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from hal.contract import Arithmetic
from hal_conformance.absent import needed
from hal_conformance.case import I64, Array
from hal_conformance.chained import Chained, product, silu, silu_backward, together

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
        return SwigluGradients(
            together(through_g, through_u).stored(dtype),  # both paths share the errors of dh and g
            product(dg.T, self.x, rule).stored(dtype),
            product(du.T, self.x, rule).stored(dtype),
            product(dy.T, self.h, rule).stored(dtype),
        )


@dataclass(frozen=True)
class SwigluGradients:
    """Gradients of the rows and the weights; of several experts, with an axis for them in front."""

    dx: Chained
    dw1_FD: Chained
    dw3_FD: Chained
    dw2_DF: Chained

    @property
    def weights(self) -> tuple[Chained, Chained, Chained]:
        """Those of w1, w3 and w2."""
        return self.dw1_FD, self.dw3_FD, self.dw2_DF


class Unknown(Swiglu):
    """Experts of which nothing is asked: NaN of the right shapes."""

    @classmethod
    def of(cls, x: Array, weights: Weights, dtype: str, rule: Arithmetic) -> Unknown:  # type: ignore[override]
        """Return it without computing anything."""
        w1, w3, w2 = (_unknown(w.shape) for w in weights)
        g = _unknown((*x.shape[:-1], weights[0].shape[-2]))
        return cls(_unknown(x.shape), w1, w3, w2, g, g, g, g, _unknown(x.shape), dtype, rule)

    def backward(self, dy: Chained) -> SwigluGradients:
        """See `Swiglu.backward`."""
        return SwigluGradients(self.x, self.w1_FD, self.w3_FD, self.w2_DF)


def _unknown(shape: tuple[int, ...]) -> Chained:
    return Chained(np.broadcast_to(np.float64(np.nan), shape), np.broadcast_to(np.float64(0.0), shape))


TOGETHER = 2**17
"""Elements of one matrix of the experts that are computed at once: enough for numpy to be busy."""


def each(
    x_RD: Array, counts_E: I64, weights: Weights, dtype: str, rule: Arithmetic
) -> Iterator[tuple[I64, I64, Swiglu]]:
    """Yield (experts [G], their rows [G, n], their inside) until every expert that has rows was there.

    Those of one yield have as many rows each. The inside is unknown if nobody asks for it.
    """
    w1, w3, w2 = weights
    first = np.cumsum(counts_E) - counts_E
    most = max(1, TOGETHER // max(1, w1[0].size))
    asked = np.array([needed(e) for e in range(len(counts_E))], bool)
    for n in np.unique(counts_E[counts_E > 0]):
        for kind, alike in ((Swiglu, asked), (Unknown, ~asked)):
            of = np.flatnonzero((counts_E == n) & alike)
            for at in range(0, len(of), most):
                e = of[at : at + most]
                rows = first[e][:, None] + np.arange(n)
                given = w1[e], w3[e], w2[e]
                if kind is Unknown:
                    yield e, rows, Unknown.of(x_RD[rows], given, dtype, rule)
                else:
                    yield e, rows, Swiglu.of(Chained.exact(x_RD[rows]), given, dtype, rule)


def experts(x_RD: Array, counts_E: I64, weights: Weights, dtype: str, rule: Arithmetic) -> Chained:
    """Return the experts' output [R, D], stored."""
    y = Chained(np.zeros(x_RD.shape), np.zeros(x_RD.shape))
    for _, rows, inside in each(x_RD, counts_E, weights, dtype, rule):
        y[rows] = inside.y
    return y
