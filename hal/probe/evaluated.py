# SPDX-License-Identifier: Apache-2.0
"""What a rule of `hal.matrix_unit` makes of whole products, written from the rule's own words and slow.

The core needs it to say that a device follows a rule, without a simulator to ask; and a simulator that is asked about
itself must not be its own judge. Everything but float64 is exact in float64: a product has 48 bits at most, and what is
added at once fewer than 40. No product may be infinite, NaN, or 2^128 and more; one of float64 must be far from both
ends of its range.

Shapes: M rows, N columns, K products, L of them in a group.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from hal.matrix_unit import FORMATS, MatrixUnit
from hal.probe.schedule import Pieces

F64 = npt.NDArray[np.float64]
Exponents = npt.NDArray[np.int64]

_OF_ZERO = -5000
"""The exponent of zero: never the largest."""


def evaluated(a_MK: F64, b_KN: F64, unit: MatrixUnit, formats: tuple[str, str], pieces: Pieces) -> F64:
    """Return a b as a unit sums it in pieces of K: numbers of its accumulator.

    Args:
        a_MK: numbers of the first format.
        b_KN: of the second.
        unit: the rule.
        formats: of a and b, keys of `FORMATS`.
        pieces: how K is shared out.
    """
    if pieces.parts:
        left, right = (evaluated(a_MK, b_KN, unit, formats, part) for part in pieces.parts)
        total = left + right
        return total if unit.result == "float64" else total.astype(np.float32).astype(np.float64)
    of_a, of_b = formats
    least = FORMATS[of_a].min_exponent, FORMATS[of_b].min_exponent
    step = _STEPS["float64" if unit.result == "float64" else unit.kind]
    c_MN = np.zeros((len(a_MK), b_KN.shape[1]))
    for start in range(pieces.start, pieces.end, unit.group):
        group = slice(start, min(start + unit.group, pieces.end))
        a_LM1, b_L1N = a_MK.T[group, :, None], b_KN[group, None, :]
        c_MN = step(a_LM1, b_L1N, c_MN, unit, least)
    return c_MN


def _truncated(a: F64, b: F64, c: F64, unit: MatrixUnit, least: tuple[int, int]) -> F64:
    largest = np.maximum(_exponents_of_products(a, b, least).max(0), _exponent(c, -126))
    if unit.exponent_floor is not None:
        largest = np.maximum(largest, unit.exponent_floor)
    up = unit.fraction_bits - largest
    total = np.trunc(np.ldexp(a * b, up)).sum(0) + np.trunc(np.ldexp(c, up))
    if unit.result == "float16":
        return _rounded(np.ldexp(total, -up), 11, -14, np.rint)
    return _rounded(np.ldexp(total, -up), 14 if unit.result == "float32_13" else 24, -126, np.trunc)


def _floored(a: F64, b: F64, c: F64, unit: MatrixUnit, least: tuple[int, int]) -> F64:
    apart = 2 if unit.interleaved else 1
    exponents, products = _exponents_of_products(a, b, least), a * b
    sums = []
    for first in range(apart):  # a short last group may have no odd product
        of_these = exponents[first::apart].max(0, initial=_OF_ZERO)
        cut = np.trunc(np.ldexp(products[first::apart], unit.fraction_bits - of_these))
        sums.append((cut.sum(0), of_these))
    of_products = np.maximum.reduce([largest for _, largest in sums])
    total = sum(np.floor(np.ldexp(each, largest - of_products)) for each, largest in sums)
    of_c = np.maximum(_exponent(c, -126), -126)
    both = np.maximum(of_products, of_c)
    total = np.floor(np.ldexp(total, 31 - unit.fraction_bits + of_products - both))
    addend = np.floor(np.ldexp(c, 24 - both))
    if unit.interleaved:
        addend = np.where(of_c < both - 25, 0.0, addend)
    return np.where(of_products == _OF_ZERO, c, _rounded(np.ldexp(total + addend * 128, both - 31), 24, -126, np.rint))


def _pairwise(a: F64, b: F64, c: F64, unit: MatrixUnit, least: tuple[int, int]) -> F64:
    a, b = (np.where(np.abs(x) < 2.0**smallest, 0.0, x) for x, smallest in zip((a, b), least, strict=True))
    sums = list(_flushed(a * b))
    sums += [np.zeros_like(c)] * (unit.group - len(sums))
    while len(sums) > 1:
        sums = [_flushed(x + y) for x, y in zip(sums[::2], sums[1::2], strict=True)]
    return _flushed(c + sums[0])


def _flushed(x: F64) -> F64:
    nearest = _rounded(x, 24, -126, np.rint)
    return np.where(np.abs(nearest) < 2.0**-126, 0.0, nearest)


def _fused(a: F64, b: F64, c: F64, unit: MatrixUnit, least: tuple[int, int]) -> F64:
    """Round to odd in float64 first: its 53 bits leave enough of the sum to round it once more to float32."""
    product = a[0] * b[0]
    total = product + c
    lost = (product - (total - (total - product))) + (c - (total - product))
    even = total.view(np.int64) % 2 == 0
    total = np.where((lost != 0) & even, np.nextafter(total, np.copysign(np.inf, lost)), total)
    return _rounded(total, 24, -126, np.rint)


def _fused_float64(a: F64, b: F64, c: F64, unit: MatrixUnit, least: tuple[int, int]) -> F64:
    """Split the product in two (Dekker), which `math.fsum` adds to c and rounds once."""
    (x1, x2), (y1, y2) = _halves(a[0]), _halves(b[0])
    product = a[0] * b[0]
    lost = ((x1 * y1 - product) + x1 * y2 + x2 * y1) + x2 * y2
    return np.asarray(np.frompyfunc(lambda *terms: math.fsum(terms), 3, 1)(product, lost, c), np.float64)


def _halves(x: F64) -> tuple[F64, F64]:
    wide = x * 134217729.0  # 2^27 + 1
    high = wide - (wide - x)
    return high, x - high


_STEPS: dict[str, Callable[[F64, F64, F64, MatrixUnit, tuple[int, int]], F64]] = {
    "truncated": _truncated, "floored": _floored, "pairwise": _pairwise, "fused": _fused, "float64": _fused_float64,
}  # fmt: skip


def _exponents_of_products(a: F64, b: F64, least: tuple[int, int]) -> Exponents:
    return np.where(a * b == 0, _OF_ZERO, _exponent(a, least[0]) + _exponent(b, least[1]))


def _exponent(x: F64, least: int) -> Exponents:
    """Return floor(log2 |x|), but at least `least`; `_OF_ZERO` of zeros."""
    return np.where(x == 0, _OF_ZERO, np.maximum(np.frexp(x)[1].astype(np.int64) - 1, least))


def _rounded(x: F64, bits: int, least: int, how: Callable[[F64], F64]) -> F64:
    """Return x with so many bits of significand, fewer below 2^least; a zero is +0."""
    up = bits - 1 - _exponent(x, least)
    return np.where(x == 0, 0.0, np.ldexp(how(np.ldexp(x, up)), -up)) + 0.0
