# SPDX-License-Identifier: Apache-2.0
"""Sums of a few crafted products, many in one call: the only thing that a probe asks a device for.

Sum number i stands in row i of a and in column i of b, so that both factors can be chosen, and is element (i, i) of the
product. (A large and a small product whose ratio must exceed 2^25 need both factors in float16 and FP8.)

Shapes: P sums, M rows, N columns, K products.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hal.probe.multiplier import Kernel, Multiplier


@dataclass(frozen=True)
class Term:
    """One product: at position `k` of the inner dimension, of these factors."""

    k: int
    a: float
    b: float


Sum = Sequence[Term]


def term(multiply: Multiplier, k: int, value: float) -> Term:
    """Return a product of this value, both of whose factors are normal numbers of the format if there are such.

    Raises:
        ValueError: no two numbers of the format have that product.
    """
    significand, exponent = math.frexp(abs(value))  # significand in [1/2, 1)
    significand, exponent = 2 * significand, exponent - 1
    format = multiply.numbers
    if significand * 2 ** (format.bits - 1) % 1:
        raise ValueError(f"{value!r} has more bits than {multiply.format}")
    least, most = format.min_exponent, multiply.largest_exponent
    lowest = least - (format.bits - 1)  # of subnormal powers of two
    of_b = min(max(exponent // 2, least), most)
    of_a = exponent - of_b
    if of_a < lowest and significand == 1.0:
        of_a, of_b = lowest, exponent - lowest
    too_small = of_b < lowest or (of_a < least and significand != 1.0)
    if of_a > most or too_small or (of_a == most and significand > 1.75):
        raise ValueError(f"{value!r} is no product of two numbers of {multiply.format}")
    return Term(k, math.copysign(math.ldexp(significand, of_a), value), math.ldexp(1.0, of_b))


def sums(multiply: Multiplier, wanted: Sequence[Sum], K: int) -> torch.Tensor:
    """Return what the device makes of each sum, [P] in float64; all other products are of zeros."""
    return _summed(multiply, wanted, K, multiply)


def raw_sums(multiply: Multiplier, wanted: Sequence[Sum], K: int) -> torch.Tensor:
    """Return the same as the device stores it."""
    return _summed(multiply, wanted, K, multiply.raw)


def _summed(multiply: Multiplier, wanted: Sequence[Sum], K: int, call: Kernel) -> torch.Tensor:
    parts = []
    size = multiply.outer
    for first in range(0, len(wanted), size):
        chunk = wanted[first : first + size]
        a = torch.zeros(size, K, dtype=torch.float64)
        b = torch.zeros(K, size, dtype=torch.float64)
        at = [(i, t.k, t.a, t.b) for i, each in enumerate(chunk) for t in each]
        if at:
            rows, ks, left, right = zip(*at, strict=True)
            a[list(rows), list(ks)] = torch.tensor(left, dtype=torch.float64)
            b[list(ks), list(rows)] = torch.tensor(right, dtype=torch.float64)
        parts.append(call(a, b).diagonal()[: len(chunk)])
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)
