# SPDX-License-Identifier: Apache-2.0
"""Ling's NormHead: logits from a head whose columns have norm 1, and their gradients."""

from __future__ import annotations

import numpy as np

from hal.contract import Arithmetic
from hal.moe.training_ops import NORM_HEAD_EPSILON
from hal_conformance.case import F64, Array
from hal_conformance.numerics.bounds import U32, half_ulp, matmul_variance, positive_sum
from hal_conformance.numerics.budget import level
from hal_conformance.numerics.chained import Chained, product


class NormHead:
    """The inside of the head: n = sqrt(sum_v W^2), the normalised weights, the logits.

    n has half the error of a sum of squares (`positive_sum` and u for each square), and 2 u of the root; with the
    epsilon and the division W' has `relative`: one number for a column, of any sign, so that it is propagated with
    the column. W' is stored in `dtype`. An implementation that divides x by the norms instead, in float32, errs less.
    One that stores x / n in 16 bits errs as much in the logits, and is outside in the weights' gradient: the terms of
    dlogits^T (x / n) are then rounded, not their sum alone, which may be far smaller.

    Numbers with the same digits have the same error in W', so that errors add up where dlogits go along the weights: up
    to a part of an ulp of the sum. The room for it is that `Chained.bounded` counts the last store twice.
    """

    def __init__(self, x_TD: Array, weight_VD: Array, dtype: str, rule: Arithmetic) -> None:
        self._dtype, self._rule = dtype, rule
        self._x = np.asarray(x_TD, np.float64)
        self._w = np.asarray(weight_VD, np.float64)
        squares = self._w**2
        total = squares.sum(0)
        self._norm = np.sqrt(total)
        self._full = self._norm + NORM_HEAD_EPSILON
        relative = 0.5 * (positive_sum(total, squares, 0, level(total.size)) + U32) + 5.0 * U32
        self._relative: F64 = relative
        value = self._w / self._full
        stored = half_ulp(np.abs(value) * (1.0 + relative), dtype) ** 2 / 3.0
        self._normal = Chained(value, stored)
        logits = product(Chained.exact(self._x), self._normal.T, rule)
        # The norms' errors are one for a column: independent over D, the same for all V.
        columns = (self._x**2 * relative**2) @ (value.T**2)
        self.logits = Chained(logits.value, logits.var + columns).stored(dtype)

    def backward(self, dlogits_TV: Array, through_norm: bool) -> tuple[Chained, Chained]:
        """Return the gradients of x and of the weights, stored.

        dW' = dlogits^T x may be stored before it goes on. dW = dW' / n' - W / n * s / n'^2, s = sum_v dW' W, n' = n +
        1e-7: s adds over V in float32; its errors and those of the first term share dW', so they add as `together`.
        """
        dy = np.asarray(dlogits_TV, np.float64)
        dx = product(Chained.exact(dy), self._normal, self._rule)
        columns = (dx.value * self._relative) ** 2
        dx = Chained(dx.value, dx.var + columns).stored(self._dtype)
        dnormal = product(Chained.exact(dy.T), Chained.exact(self._x), self._rule).stored(self._dtype)
        n = self._full
        first = dnormal.value / n
        var = dnormal.var / n**2 + first**2 * (self._relative**2 + 2.0 * U32**2)
        if not through_norm:
            return dx, Chained(first, var).stored(self._dtype)
        terms = dnormal.value * self._w
        dot = terms.sum(0)
        squares = (terms**2).sum(0)
        of_dot = matmul_variance(dot, squares, len(self._w), Arithmetic()) + U32**2 * squares
        of_dot = of_dot + (self._w**2 * dnormal.var).sum(0)
        factor = self._w / np.where(self._norm == 0.0, 1.0, self._norm) / n**2  # of a column of zeros it is zero
        second = factor * dot
        var_second = factor**2 * of_dot + second**2 * (9.0 * self._relative**2 + 6.0 * U32**2)
        return dx, Chained(first - second, 2.0 * (var + var_second)).stored(self._dtype)
