# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of `hal.matrix_unit` in torch's own operators: for machines without a compiler, and a second opinion.

Everything is exact in float64: an operand has at most 12 bits of significand, so that a product has 24, and a sum of 32
products that are cut to `fraction_bits` below the largest exponent has fewer than 40. Operands may be any numbers.

Shapes: M rows, N columns, K products; B matrices.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from typing import NamedTuple

import torch

from hal.matrix_unit import MatrixUnit

_ELEMENTS = 1 << 17
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
    with subnormals():
        return with_one_nan(_multiply(a_BMK, b_BKN, c_BMN, unit, min_exponents), unit)


@contextlib.contextmanager
def subnormals() -> Iterator[None]:
    """Keep subnormals for a while, if the program flushes them: torch does not say so, and is asked by an example.

    Only this thread can be told to. Others, which torch started while it flushed, go on doing so, and are done without.
    """
    flushing = bool(torch.tensor([2.0**-140], dtype=torch.float32, device="cpu").mul(1.0).eq(0.0))
    if not flushing:
        yield
        return
    threads = torch.get_num_threads()
    torch.set_flush_denormal(False)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(True)


def with_one_nan(x: torch.Tensor, unit: MatrixUnit) -> torch.Tensor:
    """Put the unit's NaN wherever x has one, and return x: a CPU's arithmetic has many, each kind of CPU its own."""
    bits = x.view(torch.int64 if x.dtype == torch.float64 else torch.int32)
    bits.masked_fill_(x.isnan(), _nan(unit))
    return x


def _nan(unit: MatrixUnit) -> int:
    if unit.result == "float64":
        return 0x7FF8000000000000
    return 0x7FC00000 if unit.kind != "truncated" else 0x7FFFE000 if unit.result == "float16" else 0x7FFFFFFF


def _multiply(
    a_BMK: torch.Tensor, b_BKN: torch.Tensor, c_BMN: torch.Tensor, unit: MatrixUnit, min_exponents: tuple[int, int]
) -> torch.Tensor:
    chain = _CHAINS[unit.kind]
    d_BMN = torch.empty_like(c_BMN, memory_format=torch.contiguous_format)
    K = a_BMK.shape[2]
    _, M, N = c_BMN.shape
    rows = max(1, _ELEMENTS // max(1, unit.group * N))
    matrices = max(1, rows // max(1, M))
    for first in range(0, c_BMN.shape[0], matrices):
        at = slice(first, first + matrices)
        for row in range(0, M, rows):
            d = c_BMN[at, row : row + rows]
            steps = max(1, _ELEMENTS // max(1, unit.group * d.numel()))
            for k in range(0, K, steps * unit.group):
                part = slice(k, k + steps * unit.group)
                d = chain(a_BMK[at, row : row + rows, part], b_BKN[at, part], d, unit, min_exponents)
            d_BMN[at, row : row + rows] = d
    return d_BMN


# Chains of steps: a [B, M, K], b [B, K, N], c [B, M, N]; K is some groups of L products, the last perhaps short -------

Chain = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, MatrixUnit, tuple[int, int]], torch.Tensor]


class _Terms(NamedTuple):
    """The products of all steps, exact; S steps of L products, the last one filled up with zeros.

    Attributes:
        products: [B, M, S, L, N].
        exponents: sums of the operands' exponents, as the unit sees them; [B, M, S, L, N].
    """

    products: torch.Tensor
    exponents: torch.Tensor


Parts = Iterable[tuple[torch.Tensor, torch.Tensor]]
"""What a step needs of its products, for each step."""


def _aligning(
    prepared: Callable[[_Terms, MatrixUnit], Parts],
    step: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, MatrixUnit], torch.Tensor],
    limit: float,
) -> Chain:
    """Return the chain of steps that take finite terms; one that meets others looks at each step's.

    Args:
        prepared: what does not depend on the accumulator.
        step: of one group: its parts, c, and the rule.
        limit: from which on a product is infinite.
    """

    def chain(
        a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, unit: MatrixUnit, min_exponents: tuple[int, int]
    ) -> torch.Tensor:
        terms = _terms(a, b, unit.group, min_exponents)
        parts = list(prepared(terms, unit))
        d = c
        largest = a.abs().amax().double() * b.abs().amax().double()  # a NaN is no smaller than the limit
        if bool(largest < limit) and bool(c.isfinite().all()):
            for part in parts:
                d = step(*part, d, unit)
            if bool(d.isfinite().all()):  # a sum that is not finite stays so
                return d
        d = c
        for part, products in zip(parts, terms.products.unbind(2), strict=True):
            d = _with_specials(step(*part, d, unit), products, d, unit, limit)
        return d

    return chain


def _terms(a: torch.Tensor, b: torch.Tensor, group: int, min_exponents: tuple[int, int]) -> _Terms:
    if missing := -a.shape[2] % group:
        a, b = torch.nn.functional.pad(a, (0, missing)), torch.nn.functional.pad(b, (0, 0, 0, missing))
    products = a.double()[:, :, :, None] * b.double()[:, None]
    exponents = _exponent(a, min_exponents[0])[:, :, :, None] + _exponent(b, min_exponents[1])[:, None]
    return _Terms(products.unflatten(2, (-1, group)), exponents.unflatten(2, (-1, group)))


def _of_truncated(terms: _Terms, unit: MatrixUnit) -> Parts:
    """Yield products and their largest exponents."""
    return zip(terms.products.unbind(2), terms.exponents.amax(3).unbind(2), strict=True)


def _truncated(products: torch.Tensor, of_products: torch.Tensor, c: torch.Tensor, unit: MatrixUnit) -> torch.Tensor:
    largest = torch.maximum(of_products, _exponent(c, -126))
    if unit.exponent_floor is not None:
        largest = largest.clamp(min=unit.exponent_floor)
    last_bit = _power(largest - unit.fraction_bits)
    total = _in_units_of(last_bit[:, :, None], products).sum(2) + _in_units_of(last_bit, c)
    value = total * last_bit
    if unit.result == "float16":
        return _nearest_float16(value)
    result = _cut(value)
    return _without_last(result, 10) if unit.result == "float32_13" else result


def _of_floored(terms: _Terms, unit: MatrixUnit) -> Parts:
    """Yield the sums of products, in units of their last bit, and their largest exponents."""
    halves = 2 if unit.interleaved else 1
    products, exponents = (x.unflatten(3, (-1, halves)) for x in terms)
    largest = exponents.amax(3)
    sums = _in_units_of(_power(largest - unit.fraction_bits)[:, :, :, None], products).sum(3)
    of_products = largest.amax(3)
    total = _shifted(sums, largest - of_products[:, :, :, None]).floor().sum(3)
    return zip(total.unbind(2), of_products.unbind(2), strict=True)


def _floored(total: torch.Tensor, of_products: torch.Tensor, c: torch.Tensor, unit: MatrixUnit) -> torch.Tensor:
    of_c = _exponent(c, -126).clamp(min=-126)
    both = torch.maximum(of_products, of_c)
    total = _shifted(total, of_products - both + 31 - unit.fraction_bits).floor()
    addend = (c * _power(24 - both)).floor()
    if unit.interleaved:
        addend = torch.where(of_c < both - 25, 0.0, addend)
    result = _shifted(total + addend * 128, both - 31).float()
    return torch.where(of_products < _NONE // 2, c + 0.0, result)


def _pairwise(
    a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, unit: MatrixUnit, min_exponents: tuple[int, int]
) -> torch.Tensor:
    a, b = (
        torch.where(x.abs() < 2.0**least, 0.0, x) for x, least in zip((a, b), min_exponents, strict=True)
    )  # fmt: skip
    products = _flushed(a[:, :, :, None] * b[:, None] + 0.0)
    if missing := -products.shape[2] % unit.group:
        products = torch.nn.functional.pad(products, (0, 0, 0, missing))
    width = unit.group
    while width > 1:  # neighbours of one group, since its number of products is a power of two
        products = _flushed(products[:, :, 0::2] + products[:, :, 1::2])
        width //= 2
    for sum_of_group in products.unbind(2):
        c = _flushed(torch.where(c.abs() < 2.0**-126, 0.0, c) + sum_of_group)
    return c


def _fused(
    a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, unit: MatrixUnit, min_exponents: tuple[int, int]
) -> torch.Tensor:
    if c.dtype != torch.float32:
        for k in range(a.shape[2]):
            c = _fused_float64(a[:, :, k, None].expand_as(c), b[:, k, None].expand_as(c), c)
        return c
    # A product is exact in float64.
    products = a.double().movedim(2, 0)[:, :, :, None] * b.double().movedim(1, 0)[:, :, None]
    # A sum that is rounded to float64, and again to float32, is rounded right but where the first one lies halfway
    # between two of the second: never, but for what is made to do so.
    d, sums = c, torch.empty_like(products)
    for product, total in zip(products, sums, strict=True):
        d = torch.add(product, d, out=total).float()
    if not _may_be_halfway(sums):
        return d
    for product in products:
        # Rounded to odd, float64 has enough of the sum.
        c = _to_odd(*_two_sum(product, c.double())).float()
    return c


_CHAINS: dict[str, Chain] = {
    "truncated": _aligning(_of_truncated, _truncated, torch.inf),
    "floored": _aligning(_of_floored, _floored, 2.0**128),
    "pairwise": _pairwise, "fused": _fused,
}  # fmt: skip


# Significands, exponents, rounding -----------------------------------------------------------------------------------


def _exponent(x: torch.Tensor, min_exponent: int) -> torch.Tensor:
    """Return exponents, `_NONE` of zeros."""
    exponent = (x.frexp().exponent - 1).clamp(min=min_exponent)
    return torch.where(x == 0, _NONE, exponent)


def _power(exponent: torch.Tensor) -> torch.Tensor:
    """Return 2^exponent; far from all that counts the exponent is -1000 or 1000 (`torch.ldexp` computes in float32)."""
    return ((exponent.clamp(-1000, 1000).to(torch.int64) + 1023) << 52).view(torch.float64)


def _in_units_of(power: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return how many whole units of a power of two there are in x (`trunc` takes ten times as long in float64)."""
    return torch.div(x, power, rounding_mode="trunc")


def _shifted(x: torch.Tensor, exponent: torch.Tensor) -> torch.Tensor:
    """Return x 2^exponent."""
    return x * _power(exponent)


def _cut(value: torch.Tensor) -> torch.Tensor:
    """Return float64 in float32, cut toward zero."""
    nearest, size = value.float(), value.abs()
    beyond = (nearest.abs() > size) & (size < 2.0**128)
    return torch.where(beyond, nearest.nextafter(torch.zeros_like(nearest)), nearest) + 0.0


def _without_last(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Return float32 without its last bits."""
    return (x.view(torch.int32) & -(1 << bits)).view(torch.float32) + 0.0


def _nearest_float16(value: torch.Tensor) -> torch.Tensor:
    """Return float64 rounded to float16's numbers, in float32 (torch's own conversion rounds to float32 first)."""
    exponent = ((value.view(torch.int64) >> 52) & 0x7FF).to(torch.int32) - 1023
    ulp = exponent.clamp(min=-14) - 10
    kept = _shifted(_shifted(value, -ulp).round(), ulp)
    return (torch.where(kept.abs() >= 2.0**16, torch.inf * kept.sign(), kept) + 0.0).float()


def _may_be_halfway(x: torch.Tensor) -> bool:
    """Tell whether one of these float64 lies halfway between two float32, or may do so among its subnormal numbers."""
    if bool(((x.view(torch.int64) & 0x1FFFFFFF) == 0x10000000).any()):
        return True
    small = x.abs() < 2.0**-126
    return bool(small.any()) and bool((x[small] != 0).any())


def _flushed(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x.abs() < 2.0**-126, x * 0.0, x)


def _with_specials(
    result: torch.Tensor, products: torch.Tensor, c: torch.Tensor, unit: MatrixUnit, limit: float
) -> torch.Tensor:
    """Put NaN and infinities where the sum has one among its terms, or a product is at least `limit`."""
    products = torch.where(products.abs() >= limit, torch.inf * products.sign(), products)
    total = torch.where(products.isfinite(), 0.0, products).sum(2) + torch.where(c.isfinite(), 0.0, c)
    code = torch.tensor(_nan(unit), dtype=torch.int32).view(torch.float32)
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
    """Return a b + c, rounded once.

    Boldo and Melquiond, Emulation of FMA and correctly rounded sums (IEEE Trans. Computers, 2008), algorithm 5; where
    its terms might leave float64's range, fractions, number by number.
    """
    high, low = _two_product(a, b)
    of_low, rest = _two_sum(c, low)
    total, lacking = _two_sum(high, of_low)
    result = total + _to_odd(*_two_sum(rest, lacking))
    plain = a * b + c  # of infinities and NaN, and for the sign of a zero
    plain = torch.where(c.isinf() & a.isfinite() & b.isfinite(), c, plain)  # whose product may be too large
    result = torch.where(result.isfinite() & (result != 0), result, plain)
    beyond = _may_leave_the_range(a, b, c)
    if bool(beyond.any()):
        result[beyond] = _fused_exactly(a[beyond], b[beyond], c[beyond])
    return result


def _may_leave_the_range(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """Tell of which finite numbers some term of `_fused_float64` may be no multiple of 2^-1074, or infinite.

    The last bit of a product's remainder is 105 below the product's exponent or higher. `_two_product` multiplies an
    operand by 2^27, and sums of three numbers reach twice the largest.
    """
    of_a, of_b, of_c = (x.frexp().exponent for x in (a, b, c))
    of_product = of_a + of_b
    beyond = (of_product < -960) | (of_product > 1000) | (torch.maximum(of_a, of_b) > 990) | (of_c > 1000)
    return beyond & (a != 0) & (b != 0) & a.isfinite() & b.isfinite() & c.isfinite()


def _fused_exactly(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    found = []
    for x, y, z in zip(a.tolist(), b.tolist(), c.tolist(), strict=True):
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        try:
            magnitude = float(abs(exact))
        except OverflowError:
            magnitude = math.inf
        found.append(-magnitude if exact < 0 else magnitude)
    return torch.tensor(found, dtype=torch.float64)
