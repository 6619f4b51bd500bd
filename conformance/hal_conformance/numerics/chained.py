# SPDX-License-Identifier: Apache-2.0
"""Numbers with the variance of an honest device's error, and the operators that carry it along.

Where a stage cannot be seen, its error is part of the next one's: an operator's variance is that of its own roundings,
plus the squared Jacobian times the variances of its operands. So a model of a device is written once, as equations,
and yields the value and how far an honest device may be from it. Two paths that share one error add as
(a + b)^2 <= 2 a^2 + 2 b^2 (`together`).

The roundings of a float32 operation are at most u |result|, taken as uniform: u^2/3 of variance. What is kept more
precisely than `stored` says is more precise than the model, and inside its bound.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from hal.contract import Arithmetic
from hal_conformance.case import F64, Array
from hal_conformance.numerics.bounds import (
    U32,
    Bounded,
    flushed,
    half_ulp,
    logistic,
    matmul_factors,
    matmul_variance,
    sigmoid_error,
    silu_error,
    slope_error,
    slope_of_silu,
)
from hal_conformance.numerics.budget import level

ZERO = bytes(8)
"""One float64, of which the variances of exact values are made: read-only, and without memory of their own."""


@dataclass(frozen=True)
class Chained:
    """A value and the variance of its error.

    Attributes:
        value: float64.
        var: a variance above that of every admitted error; of the value's shape.
    """

    value: F64
    var: F64

    @classmethod
    def exact(cls, value: Array) -> Chained:
        """Return a value without error: an input, or what the device itself returned."""
        wide = np.asarray(value, np.float64)
        return cls(wide, np.ndarray(wide.shape, np.float64, ZERO, strides=(0,) * wide.ndim))

    @classmethod
    def of(cls, bounded: Bounded) -> Chained:
        """Start a chain from a local bound."""
        return cls(bounded.value, np.broadcast_to(bounded.var, bounded.value.shape))

    @property
    def is_exact(self) -> bool:
        """Whether nothing is known to be wrong with it; of what `exact` made, without a look at every element."""
        return (not any(self.var.strides) and self.var.size > 0 and not self.var.flat[0]) or not self.var.any()

    @property
    def T(self) -> Chained:
        """The transpose; of several matrices, that of each."""
        return Chained(self.value.swapaxes(-1, -2), self.var.swapaxes(-1, -2))

    def __getitem__(self, key: Any) -> Chained:
        return Chained(self.value[key], self.var[key])

    def __setitem__(self, key: Any, part: Chained) -> None:
        self.value[key], self.var[key] = part.value, part.var

    def __add__(self, other: Chained) -> Chained:
        """Add two results with errors of their own; the rounding is that of the store."""
        return Chained(self.value + other.value, self.var + other.var)

    def __mul__(self, other: Chained) -> Chained:
        """Multiply two results with errors of their own, and round to float32."""
        a, b = self, other
        value = a.value * b.value
        var = b.value**2 * a.var + a.value**2 * b.var + a.var * b.var
        return Chained(value, var + (U32 * value) ** 2 / 3.0)

    def stored(self, dtype: str) -> Chained:
        """Round to storage: uniform within half an ulp, at the next larger binade's edge."""
        largest = np.sqrt(self.var)
        largest *= 4.0
        largest += np.abs(self.value)
        var = half_ulp(largest, dtype)
        var *= var
        var /= 3.0
        var += self.var
        return Chained(self.value, var)

    def within_deviations(self) -> Bounded:
        """Return the bound of what is not stored yet, lambda deviations; its own `stored` adds the store.

        Tighter than `bounded`, which counts the last store twice, in the variance and as half an ulp: no deviation of a
        store is more than half an ulp.
        """
        return Bounded(self.value, level(self.value.size).deviations * np.sqrt(self.var), self.var)

    def bounded(self, dtype: str, elements: int | None = None) -> Bounded:
        """Return the bound of what was stored last: lambda deviations, and half an ulp.

        The error is, to first order, a sum of many independent rounding errors weighted by squared Jacobians, each
        sub-Gaussian; so is the sum, and lambda = sqrt(2 L) deviations have odds exp(-L).

        Args:
            dtype: of storage.
            elements: judged together with these; None: as many as there are here.
        """
        if self.value.size > 1 and not any(self.value.strides) and not any(self.var.strides):
            # One number throughout, as what is unknown has.
            one = Chained(self.value.flat[:1], self.var.flat[:1]).bounded(dtype, elements or self.value.size)
            sides = (np.broadcast_to(side, self.value.shape) for side in (one.value, one.bound, one.var))
            return Bounded(*sides)
        deviations = level(self.value.size if elements is None else elements).deviations * np.sqrt(self.var)
        return Bounded(self.value, deviations + half_ulp(np.abs(self.value) + deviations, dtype), self.var)


def together(*parts: Chained) -> Chained:
    """Add results that share errors: (a + b + ...)^2 <= n (a^2 + b^2 + ...)."""
    value, var = parts[0].value, parts[0].var
    for part in parts[1:]:
        value, var = value + part.value, var + part.var
    return Chained(value, len(parts) * var)


def product(a: Chained, b: Chained, rule: Arithmetic) -> Chained:
    """Return a @ b for [..., M, K] and [..., K, N]; not stored."""
    square_a, square_b = a.value * a.value, b.value * b.value
    value = a.value @ b.value
    # `matmul_variance` is linear in the sum of squares, which the variances of a are added to: one product for both.
    of_squares, of_value = matmul_factors(a.value.shape[-1], rule)
    weighted = of_squares * square_a
    if not a.is_exact:
        weighted += a.var
    var = weighted @ square_b
    var += of_value * (value * value)
    if not b.is_exact:
        var += square_a @ b.var
    if rule.flushes_below:
        lost = flushed(a.value, b.value, rule, *(4.0 * np.sqrt(x.var) for x in (a, b)))
        var = var if lost is None else 2.0 * (var + lost**2)
    return Chained(value, var)


def dot(a: Chained, b: F64) -> Chained:
    """Return sum_k a_k b_k over the last axis in float32, for an exact b; not stored."""
    terms = a.value * b
    value = terms.sum(-1)
    var = matmul_variance(value, (terms**2).sum(-1), terms.shape[-1], Arithmetic())
    return Chained(value, var + (b**2 * a.var).sum(-1))


def sigmoid(x: Chained) -> Chained:
    """Return 1 / (1 + exp(-x)); its own error is that of `bounds.sigmoid`."""
    s = logistic(x.value)
    own = s * sigmoid_error(x.value, s)
    return Chained(s, (s * (1.0 - s)) ** 2 * x.var + own**2 / 3.0)


def silu(x: Chained) -> Chained:
    """Return x sigmoid(x); its own error is that of `bounds.silu`."""
    sigma = logistic(x.value)
    s = x.value * sigma
    own = np.abs(s) * silu_error(x.value, sigma)
    # |silu''| <= 1/2: the second-order term of an error of variance v adds at most (v / 2)^2.
    return Chained(s, slope_of_silu(x.value, sigma) ** 2 * x.var + 0.25 * x.var**2 + own**2 / 3.0)


def silu_backward(ds: Chained, x: Chained) -> Chained:
    """Return ds silu'(x); its own error is that of `bounds.silu_slope`. d slope / dx is at most 1/2."""
    sigma = logistic(x.value)
    slope = slope_of_silu(x.value, sigma)
    own = np.abs(ds.value) * slope_error(x.value, sigma)
    return Chained(ds.value * slope, slope**2 * ds.var + 0.25 * ds.value**2 * x.var + own**2 / 3.0)
