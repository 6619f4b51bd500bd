# SPDX-License-Identifier: Apache-2.0
"""How far an honest device may be from the exact result: derived from the inner length and the contract.

Every operator yields a `Bounded`: the float64 value, a bound that an honest implementation exceeds only with the
probability that `budget` grants, and a variance above that of every order of summation which the contract
admits. The rounding errors are taken as independent, of mean zero and at most half an ulp (so that their variance
is at most hu^2 / 3), except where the contract says "truncate". Absolute constants (K u S and the like) need no
assumption at all.

Legend: K inner length, u unit roundoff, S = sum |a b|, Q = sum (a b)^2, hu half an ulp, L and lambda from `budget`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hal.contract import Arithmetic
from hal_conformance.case import F64, Array
from hal_conformance.numerics.budget import Level

U32 = 2.0**-24
"""Unit roundoff of float32, in which all element-wise arithmetic is done."""

EXP = 4.0 * U32
"""Relative error of a device's exp: at most 2 ulp (CUDA, ROCm and SLEEF document 1 to 2); 2 ulp are 4 u."""

TINY32 = 2.0**-126
"""Smallest normal float32: below it results may be flushed to zero."""

EXPONENT_FIELD = 0x7FF << 52
"""The exponent's bits of a float64: alone, they are the power of two at or below a number."""

SIGNIFICANDS = {"float64": 53, "float32": 24, "bfloat16": 8, "float16": 11}
MIN_EXPONENTS = {"float64": -1022, "float32": -126, "bfloat16": -126, "float16": -14}


def half_ulp(value: Array, dtype: str) -> F64:
    """Return half the distance between neighbours of `dtype` at `value`: the largest error of rounding to nearest."""
    exponent_bits = np.asarray(value, np.float64).view(np.int64) & EXPONENT_FIELD
    power = np.asarray(exponent_bits).view(np.float64)  # 2^floor(log2 |value|); 0 for what is smaller, inf for NaN
    np.maximum(power, 2.0 ** MIN_EXPONENTS[dtype], out=power)
    power *= 2.0 ** -SIGNIFICANDS[dtype]
    return power


@dataclass(frozen=True)
class Bounded:
    """An exact result and how far an honest device may be from it.

    Attributes:
        value: float64.
        bound: largest admitted |error|.
        var: a variance above that of every admitted error.
    """

    value: F64
    bound: F64
    var: F64

    @classmethod
    def exact(cls, value: Array) -> Bounded:
        """Return a value that is known without error: an input, or what the device itself returned."""
        wide = np.asarray(value, np.float64)
        return cls(wide, np.zeros_like(wide), np.zeros_like(wide))

    @classmethod
    def deterministic(cls, value: F64, bound: F64) -> Bounded:
        """Return a value with a bound that holds always; the error is taken as uniform within it."""
        return cls(value, bound, bound**2 / 3.0)

    def scaled(self, factor: F64 | float) -> Bounded:
        """Multiply by powers of two of either sign, which rounds nothing above the subnormal numbers."""
        size = np.abs(factor)
        return Bounded(self.value * factor, self.bound * size, self.var * size**2)

    def widened(self, by: F64) -> Bounded:
        """Admit another error of at most `by`."""
        return Bounded(self.value, self.bound + by, self.var + by**2 / 3.0)

    def stored(self, dtype: str) -> Bounded:
        """Round to a storage dtype: half an ulp of the largest admitted value, not of the exact one."""
        half = half_ulp(np.abs(self.value) + self.bound, dtype)
        return Bounded(self.value, self.bound + half, self.var + half**2 / 3.0)


def matmul_variance(value: F64, squares: F64, inner: int, rule: Arithmetic) -> F64:
    """Return a variance above that of a sum of `inner` products in any order.

    Adding in order, the partial sum S_k is (k/K) y plus a bridge of variance Q k/K (1 - k/K), if the order is
    exchangeable with the data. Each addition adds a rounding error of variance at most u^2 S_k^2 / 3, so that the
    sum over k is u^2/3 K (y^2/3 + Q/6); trees add less. 5/24 instead of 1/6 leaves room for blockings that
    restart the walk. The products themselves, if rounded, add u^2/3 Q.

    Truncation loses on average half a unit of each partial sum, all with one sign: the squared sum of K losses is
    at most K times the sum of squares.

    Reduced inputs (`input_bits`) change each product by two errors of at most r = 2^-bits: 2 r^2/3 Q.
    """
    of_squares, of_value = matmul_factors(inner, rule)
    return np.asarray(of_squares * squares + of_value * value**2)


def matmul_factors(inner: int, rule: Arithmetic) -> tuple[float, float]:
    """Return what the sum of squares Q and the squared result y^2 are multiplied by in `matmul_variance`."""
    u = rule.unit_roundoff
    each = u**2 * inner if rule.rounding == "truncate" else u**2 / 3.0
    of_squares, of_value = each * (inner * 5.0 / 24.0 + 1.0), each * inner / 3.0
    if rule.input_bits is not None:
        r = 2.0**-rule.input_bits
        of_squares, of_value = of_squares + 2.0 / 3.0 * r**2, of_value + 4.0 * r**2
    return of_squares, of_value


def matmul_bound(value: F64, squares: F64, absolute: F64 | None, inner: int, rule: Arithmetic, level: Level) -> F64:
    """Return the bound of a sum of `inner` products in any order.

    Rounding to nearest: given the path, the error is sub-Gaussian with variance u^2/3 sum S_k^2.
      - From (k/K) y: deviation u |y| sqrt(K) / 3, so lambda/3 u sqrt(K) |y|.
      - From the bridge B: E exp(t^2/2 c^2 int B^2) = sqrt(x / sin x), x = t c, c = u sqrt(K Q / 3), which stays finite
        up to x = pi; so the tail is exp(-pi e / c), and e = L c / pi = (L / (pi sqrt 3)) u sqrt(K Q).
      - From the products: lambda/sqrt(3) u sqrt(Q).
    Truncating: at most 1 unit is lost of every |S_k|: the linear part sums to K |y| / 2, the bridge stays below
    sqrt(L/2) sqrt(Q) = lambda/2 sqrt(Q) (Kolmogorov), and a group is cut at its largest product, at most sqrt(Q).
    Always: at most K + 1 roundings of partial sums that never exceed S (Higham 2002, section 3.1).
    Reduced inputs: lambda r sqrt(2 Q / 3), and 2 r |y| for units that cut inputs instead of rounding them.

    The order must be exchangeable with the data: the suite permutes K by seed.
    """
    u, lam = rule.unit_roundoff, level.deviations
    root = np.sqrt(squares)
    if rule.rounding == "truncate":
        bound = u * inner * (0.5 * np.abs(value) + (0.5 * lam + 1.0) * root)
    else:
        walk = np.sqrt(inner) * (level.bridge * root + lam / 3.0 * np.abs(value))
        bound = u * (walk + lam / np.sqrt(3.0) * root)
    if absolute is not None:
        bound = np.minimum(bound, (inner + 1) * u * absolute)
    if rule.input_bits is not None:
        r = 2.0**-rule.input_bits
        bound = bound + lam * r * np.sqrt(2.0 / 3.0) * root + 2.0 * r * np.abs(value)
    return np.asarray(bound)


def flushed(a: F64, b: F64, rule: Arithmetic, spread_a: F64 | float = 0.0, spread_b: F64 | float = 0.0) -> F64 | None:
    """Return what a product [M, K] [K, N] may lose because small operands count as zero; None where nothing does.

    sum |a b| over the pairs of which one may be below `flushes_below`, at most: each is lost whole, in any order.

    Args:
        a, b: the operands.
        rule: the device's.
        spread_a, spread_b: how far each operand may be from what it is here.
    """
    below = rule.flushes_below
    if not below:
        return None
    (size_a, small_a), (size_b, small_b) = (
        (np.abs(x) + spread, np.where(np.abs(x) - spread < below, np.minimum(np.abs(x) + spread, below), 0.0))
        for x, spread in ((a, spread_a), (b, spread_b))
    )
    if not small_a.any() and not small_b.any():
        return None
    return np.asarray(small_a @ size_b + size_a @ small_b)


def matmul(a: F64, b: F64, rule: Arithmetic, level: Level) -> Bounded:
    """Multiply exact [M, K] by exact [K, N] on a device that follows `rule`; not yet stored."""
    inner = a.shape[-1]
    value, squares = a @ b, (a * a) @ (b * b)
    # The cap binds only for short sums: S >= sqrt(Q), and c_Q sqrt(K) < K beyond K = c_Q^2, about 60.
    absolute = np.abs(a) @ np.abs(b) if inner <= 128 else None
    product = Bounded(
        value,
        matmul_bound(value, squares, absolute, inner, rule, level),
        matmul_variance(value, squares, inner, rule),
    )
    lost = flushed(a, b, rule)
    # All of it may have one sign: it is no error of mean zero, and its square no smaller than this.
    return product if lost is None else Bounded(value, product.bound + lost, 2.0 * (product.var + lost**2))


def positive_sum(total: F64, terms: F64, axis: int, level: Level) -> F64:
    """Return the relative error of adding positive terms in float32, in any order.

    At most (n - 1) u. Partial sums grow linearly, so rounding to nearest gives lambda/sqrt(3) u sqrt(n) for
    independent errors. They are not independent once terms fall below half an ulp of the running sum, when each is
    dropped whole: stagnation, the sum of min(t, u s) over terms t < 8 u s, relative to the total s.
    """
    n = terms.shape[axis]
    safe = np.where(total > 0, total, 1.0)
    scaled = terms / np.expand_dims(safe, axis)
    stagnation = np.where(scaled < 8 * U32, np.minimum(scaled, U32), 0.0).sum(axis)
    return np.asarray(np.minimum(n * U32, level.deviations / np.sqrt(3.0) * np.sqrt(n) * U32 + stagnation))


def softmax(logits: F64, level: Level) -> Bounded:
    """Softmax over the last axis in float32 of exact logits; not yet stored.

    Each exp(x - max) has relative error eps = 4 u + 3 u d + u (|x| + |max|), d = max - x: 2 ulp of exp, u d from
    rounding the difference (twice more for units that scale it by log2 e), and u |x| and u |max| for kernels that scale
    both before they subtract. p inherits its own eps, the p-weighted eps of the sum, the error of the summation, and a
    division (2 u for approximate ones). All first order; deterministic but for the summation.
    """
    top = logits.max(-1, keepdims=True)
    d = top - logits
    e = np.exp(-d)
    total = e.sum(-1, keepdims=True)
    p = e / total
    eps = EXP + U32 * (3.0 * d + np.abs(logits) + np.abs(top))
    summed = positive_sum(total[..., 0], e, -1, level)[..., None]
    bound = p * (eps + (p * eps).sum(-1, keepdims=True) + summed + 2.0 * U32) + TINY32
    return Bounded.deterministic(p, bound)


def logistic(x: F64) -> F64:
    """1 / (1 + exp(-x)) in float64, without overflow."""
    e = np.exp(-np.abs(x))
    return np.asarray(np.where(x >= 0, 1.0, e) / (1.0 + e))


def sigmoid(x: F64) -> Bounded:
    """1 / (1 + exp(-x)) in float32 of exact x; not yet stored.

    The error of exp, (2 |x| + 4) u, enters with weight 1 - s; addition, division and the store add 3 u. The form
    1/2 + 1/2 tanh(x/2) is worse by 4e5 for negative x and not admitted.
    """
    s = logistic(x)
    return Bounded.deterministic(s, s * sigmoid_error(x, s) + TINY32)


def sigmoid_error(x: F64, sigma: F64) -> F64:
    """Return the relative error of sigma = `sigmoid`(x)."""
    return np.asarray(U32 * ((1.0 - sigma) * (2.0 * np.abs(x) + 4.0) + 3.0))


def silu_error(x: F64, sigma: F64) -> F64:
    """Return the relative error of x sigma: that of `sigmoid`, and a product."""
    return np.asarray(sigmoid_error(x, sigma) + 2.0 * U32)


def slope_of_silu(x: F64, sigma: F64) -> F64:
    """Return silu'(x) = sigma (1 + x (1 - sigma))."""
    return np.asarray(sigma * (1.0 + x * (1.0 - sigma)))


def slope_error(x: F64, sigma: F64) -> F64:
    """Return the absolute error of silu'(x) in float32; not relative to the slope, which has a zero.

    With a = |x| and q = 1 - sigma: u sigma [(1 + a q)(4 + q (2 a + 4)) + a q (sigma (2 a + 4) + 4) + 3 + a sigma].
    """
    a, q = np.abs(x), 1.0 - sigma
    inner = (1 + a * q) * (4 + q * (2 * a + 4)) + a * q * (sigma * (2 * a + 4) + 4) + 3 + a * sigma
    return np.asarray(sigma * U32 * inner)


def silu(x: F64) -> Bounded:
    """x sigmoid(x) in float32 of exact x; not yet stored."""
    sigma = logistic(x)
    s = x * sigma
    own = np.abs(s) * silu_error(x, sigma)
    return Bounded.deterministic(s, own + TINY32 * np.maximum(1.0, np.abs(x)))


def silu_slope(x: F64) -> Bounded:
    """silu'(x) in float32 of exact x, for an upstream gradient that is exact; not yet stored."""
    sigma = logistic(x)
    # Where exp overflows, sigma is 0 and x (1 - sigma) is finite: the product is 0, and the exact slope is below this.
    lost = TINY32 * np.maximum(1.0, np.abs(x))
    return Bounded.deterministic(slope_of_silu(x, sigma), slope_error(x, sigma) + lost)


def smallest_normal(dtype: str) -> float:
    """Return the smallest normal number of a storage dtype."""
    return float(2.0 ** MIN_EXPONENTS[dtype])
