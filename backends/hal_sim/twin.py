# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of `hal.matrix_unit` in torch's own operators: for machines without a compiler, and a second opinion.

Everything is exact in float64: an operand has at most 12 bits of significand, so that a product has 24, and a sum of 32
products that are cut to `fraction_bits` below the largest exponent has fewer than 40. Operands may be any numbers.

Shapes: M rows, N columns, K products; B matrices.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

from hal.matrix_unit import MatrixUnit

_ELEMENTS = 1 << 20
"""Of the largest array of products, so that it stays in a cache."""

_NONE = -4096
"""The exponent of zero: never the largest."""


def multiply(
    a_BMK: torch.Tensor, b_BKN: torch.Tensor, c_BMN: torch.Tensor, unit: MatrixUnit, min_exponents: tuple[int, int]
) -> torch.Tensor:
    """Return c + a b as `unit` computes it.

    Args:
        a_BMK: float32 tensor, on the grid of its format; float64 for a unit whose result is float64.
        b_BKN: the same.
        c_BMN: float32, or float64.
        unit: the rule.
        min_exponents: of the formats of a and b.

    Returns:
        A tensor like c.
    """
    with _subnormals():
        return _multiply(a_BMK, b_BKN, c_BMN, unit, min_exponents)


@contextlib.contextmanager
def _subnormals() -> Iterator[None]:
    """Keep subnormals for a while, if the program flushes them: torch does not say so, and is asked by an example."""
    flushing = bool(torch.tensor([2.0**-140]).mul(1.0).eq(0.0))
    if flushing:
        torch.set_flush_denormal(False)
    try:
        yield
    finally:
        if flushing:
            torch.set_flush_denormal(True)


def _multiply(
    a_BMK: torch.Tensor, b_BKN: torch.Tensor, c_BMN: torch.Tensor, unit: MatrixUnit, min_exponents: tuple[int, int]
) -> torch.Tensor:
    step = _STEPS[unit.kind]
    d_BMN = torch.empty_like(c_BMN, memory_format=torch.contiguous_format)
    K = a_BMK.shape[2]
    _, M, N = c_BMN.shape
    rows = max(1, _ELEMENTS // max(1, unit.group * N))
    matrices = max(1, rows // max(1, M))
    for first in range(0, c_BMN.shape[0], matrices):
        at = slice(first, first + matrices)
        for row in range(0, M, rows):
            d = c_BMN[at, row : row + rows]
            for k in range(0, K, unit.group):
                d = step(a_BMK[at, row : row + rows, k : k + unit.group], b_BKN[at, k : k + unit.group], d, unit,
                         min_exponents)  # fmt: skip
            d_BMN[at, row : row + rows] = d
    return d_BMN


# One step: a [B, M, L], b [B, L, N], c [B, M, N] ---------------------------------------------------------------------

Step = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, MatrixUnit, tuple[int, int]], torch.Tensor]


def _truncated(
    a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, unit: MatrixUnit, min_exponents: tuple[int, int]
) -> torch.Tensor:
    products, exponents = _products(a, b, min_exponents)
    addend, of_c = _split(c, -126)
    largest = torch.maximum(exponents.amax(2), of_c)
    nothing = largest < _NONE // 2
    if unit.exponent_floor is not None:
        largest = largest.clamp(min=unit.exponent_floor)
    total = _shifted(products, exponents - largest[:, :, None] + unit.fraction_bits).trunc().sum(2)
    total += _shifted(addend, of_c - largest + unit.fraction_bits).trunc()
    value = _shifted(total, torch.where(nothing, 0, largest - unit.fraction_bits))
    result = (_nearest_float16 if unit.result == "float16" else _cut)(value, 13 if unit.result == "float32_13" else 23)
    return _with_specials(result, a, b, c, nan=0x7FFFE000 if unit.result == "float16" else 0x7FFFFFFF)


def _floored(
    a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, unit: MatrixUnit, min_exponents: tuple[int, int]
) -> torch.Tensor:
    products, exponents = _products(a, b, min_exponents)
    parts = []
    for first in range(2 if unit.interleaved else 1):
        each = slice(first, None, 2 if unit.interleaved else 1)
        if products[:, :, each].shape[2]:
            largest = exponents[:, :, each].amax(2)
            terms = _shifted(products[:, :, each], exponents[:, :, each] - largest[:, :, None] + unit.fraction_bits)
            parts.append((terms.trunc().sum(2), largest))
    of_products = parts[0][1] if len(parts) == 1 else torch.maximum(parts[0][1], parts[1][1])
    total = sum((_shifted(part, at - of_products).floor() for part, at in parts), start=torch.zeros_like(c).double())
    addend, of_c = _split(c, -126)
    of_c = of_c.clamp(min=-126)
    both = torch.maximum(of_products, of_c)
    total = _shifted(total, of_products - both + 31 - unit.fraction_bits).floor()
    aligned = _shifted(addend, of_c - both + 24).floor()
    if unit.interleaved:
        aligned = torch.where(of_c < both - 25, 0.0, aligned)
    result = _shifted(total + aligned * 128, both - 31).float()
    result = torch.where(of_products < _NONE // 2, c + 0.0, result)
    return _with_specials(result, a, b, c, nan=0x7FC00000, limit=2.0**128)


def _pairwise(
    a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, unit: MatrixUnit, min_exponents: tuple[int, int]
) -> torch.Tensor:
    a, b = (
        torch.where(x.abs() < 2.0**least, 0.0, x) for x, least in zip((a, b), min_exponents, strict=True)
    )  # fmt: skip
    products = _flushed(a[:, :, :, None] * b[:, None] + 0.0)
    width = unit.group
    if products.shape[2] < width:
        products = torch.nn.functional.pad(products, (0, 0, 0, width - products.shape[2]))
    while width > 1:
        products = _flushed(products[:, :, 0::2] + products[:, :, 1::2])
        width //= 2
    return _flushed(torch.where(c.abs() < 2.0**-126, 0.0, c) + products[:, :, 0])


def _fused(
    a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, unit: MatrixUnit, min_exponents: tuple[int, int]
) -> torch.Tensor:
    if c.dtype == torch.float32:
        # The product is exact in float64, and so is, rounded to odd, enough of the sum.
        return _to_odd(*_two_sum(a.double() * b.double(), c.double())).float()
    return _fused_float64(a.expand_as(c), b.expand_as(c), c)


_STEPS: dict[str, Step] = {"truncated": _truncated, "floored": _floored, "pairwise": _pairwise, "fused": _fused}


# Significands, exponents, rounding -----------------------------------------------------------------------------------


def _split(x: torch.Tensor, min_exponent: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return significands in float64 and exponents, `_NONE` of zeros."""
    wide = x.double()
    exponent = ((wide.view(torch.int64) >> 52) & 0x7FF).to(torch.int32) - 1023
    exponent = torch.where(wide == 0, _NONE, exponent.clamp(min=min_exponent))
    return _shifted(wide, torch.where(wide == 0, 0, -exponent)), exponent


def _products(a: torch.Tensor, b: torch.Tensor, min_exponents: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    (a, of_a), (b, of_b) = _split(a, min_exponents[0]), _split(b, min_exponents[1])
    return a[:, :, :, None] * b[:, None], of_a[:, :, :, None] + of_b[:, None]


def _shifted(x: torch.Tensor, exponent: torch.Tensor) -> torch.Tensor:
    """Return x 2^exponent; far below all that counts the exponent is -1000 (`torch.ldexp` computes in float32)."""
    return x * ((exponent.clamp(-1000, 1000).to(torch.int64) + 1023) << 52).view(torch.float64)


def _ulp(value: torch.Tensor, fraction_bits: int, min_exponent: int) -> torch.Tensor:
    exponent = ((value.view(torch.int64) >> 52) & 0x7FF).to(torch.int32) - 1023
    return exponent.clamp(min=min_exponent) - fraction_bits


def _cut(value: torch.Tensor, fraction_bits: int) -> torch.Tensor:
    ulp = _ulp(value, fraction_bits, -126)
    kept = _shifted(_shifted(value, -ulp).trunc(), ulp)
    kept = torch.where(kept.abs() >= 2.0**128, torch.inf * kept.sign(), kept) + 0.0
    return kept.float()


def _nearest_float16(value: torch.Tensor, _: int) -> torch.Tensor:
    ulp = _ulp(value, 10, -14)
    kept = _shifted(_shifted(value, -ulp).round(), ulp)
    return (torch.where(kept.abs() >= 2.0**16, torch.inf * kept.sign(), kept) + 0.0).float()


def _flushed(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x.abs() < 2.0**-126, x * 0.0, x)


def _with_specials(
    result: torch.Tensor, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, nan: int, limit: float = torch.inf
) -> torch.Tensor:
    """Put NaN and infinities where the sum has one among its terms, or a product is at least `limit`."""
    largest = a.abs().amax().double() * b.abs().amax().double()  # a NaN is no smaller than the limit
    if bool(largest < limit) and bool(c.isfinite().all()):
        return result
    products = a.double()[:, :, :, None] * b.double()[:, None]
    products = torch.where(products.abs() >= limit, torch.inf * products.sign(), products)
    total = torch.where(products.isfinite(), 0.0, products).sum(2) + torch.where(c.isfinite(), 0.0, c)
    code = torch.tensor(nan, dtype=torch.int32).view(torch.float32)
    return torch.where(total.isnan(), code, torch.where(total.isinf(), total.float(), result))


# Fused multiply-add --------------------------------------------------------------------------------------------------


def _two_sum(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rounded sum and what it lacks (Knuth)."""
    total = x + y
    part = total - x
    return total, (x - (total - part)) + (y - part)


def _to_odd(total: torch.Tensor, lacking: torch.Tensor) -> torch.Tensor:
    """Return a sum rounded to odd: where it is not exact, the neighbour whose last bit is set."""
    even = (total.view(torch.int64) & 1) == 0
    toward = torch.where(lacking > 0, torch.inf, -torch.inf)
    wrong = (lacking != 0) & lacking.isfinite() & even
    return torch.where(wrong, torch.nextafter(total, toward.to(total.dtype)), total)


def _two_product(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rounded product and what it lacks (Dekker); exact where nothing leaves float64's normal range."""

    def halves(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        wide = z * 134217729.0
        high = wide - (wide - z)
        return high, z - high

    product = x * y
    (x1, x2), (y1, y2) = halves(x), halves(y)
    return product, ((x1 * y1 - product) + x1 * y2 + x2 * y1) + x2 * y2


def _fused_float64(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """Boldo and Melquiond, Emulation of FMA and correctly rounded sums (IEEE Trans. Computers, 2008), algorithm 5."""
    high, low = _two_product(a, b)
    of_low, rest = _two_sum(c, low)
    total, lacking = _two_sum(high, of_low)
    result = total + _to_odd(*_two_sum(rest, lacking))
    plain = a * b + c  # where the terms of the algorithm overflow, and for the sign of a zero
    return torch.where(result.isfinite() & (result != 0), result, plain)
