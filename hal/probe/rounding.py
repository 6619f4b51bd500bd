# SPDX-License-Identifier: Apache-2.0
"""How many bits a sum keeps and how it is rounded, found with three or four products at moments of its growth.

All numbers here are powers of two, or 1.5 of one; u is one unit of a sum of 1. The sum's leading 1 is taken away at the
end, so that what is left is seen whole even where the result has fewer bits than the accumulator.

    asked                                   terms, moment by moment             answer
    bits of the accumulator                 1, 2^-k, -1                         the last k that comes back, plus 1
    bits of aligned products                1, 2^-k, -1 in one group            the last k that comes back
    what becomes of the rest of these       1, 3/4 unit, -1; 1, -3/4 unit, -1   unit, 0, -unit: nearest, cut, down
    exponents of products                   9/4, 2^-k, -9/4 in one group, with  2^-k: those of the operands are added;
                                            the last k of before                0: the product is normalised first
    rounding of sums                        1, 3/4 u, -1 and its negative;      u, 0 and -u tell nearest, toward zero,
                                            1, u/2, -1; 1 + u, u/2, -1          up, down, and what becomes of ties
    bits of products under a larger sum     1, u/2 and 2^-k in one group, -1    u: the tie was broken (to nearest);
                                            1, -2^-k, -1                        not 0: 1 was made less (toward zero)
    what becomes of the rest of these       1, -u/4 and -2^-k, -1; larger k     -u/2: rounded down; 0: cut
    bits of a sum under a larger product    u/2 and 2^-k, 1, -1; -2^-k, 1, -1   the same two
    a small sum under a large product       -2^-q, 1, -1; 2^-q, 1, -1           0: cut; minus one unit: rounded down
    products                                -(1 + 2^(1-m)), (1 + 2^-m)^2        2^-2m: exact; 0: rounded first
    rounding of what is stored              as of sums, without the -1          as of sums
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from hal.matrix_unit import FORMATS
from hal.probe.multiplier import Multiplier
from hal.probe.order import fused, largest_group, spine
from hal.probe.terms import Sum, Term, sums, term
from hal.probe.tree import Tree

Values = Sequence[tuple[int, float]]
"""Products by their position in K."""

DEEPEST = 60
"""Bits that are asked for: more than any accumulator has."""


@dataclass(frozen=True)
class Rounding:
    """What is done to sums. What the format's range, or too few moments, cannot show is None.

    Attributes:
        group: products that are added at once; 1 if only two numbers ever meet.
        accumulator_bits: significand bits that a sum keeps from one moment to the next.
        at_least: whether the format's range ends there: the accumulator may be wider.
        alignment_bits: bits that products which are added at once keep below the leading one of the largest.
        aligned: what becomes of the rest of them: "cut", "rounded down" or "nearest".
        exponents: by which products are aligned: "summed", those of the operands, or "normalised", their own.
        products_under_sum: bits that products keep below the leading one of a larger sum; None if all of them.
        rest_under_sum: what becomes of the rest of them: "cut" or "rounded down".
        sum_under_product: bits that a sum keeps below the leading one of a larger product; None if all of them.
        sums: "nearest, ties to even", "nearest, ties away", "toward zero", "down", "up" or "other".
        small_sum: "dropped", or "rounded down" if a small negative sum takes one unit from a large product.
        products: "exact", or "rounded" before they are added.
        stored: how a sum is rounded to a result with fewer bits, as `sums`.
    """

    group: int
    accumulator_bits: int | None
    at_least: bool
    alignment_bits: int | None
    aligned: str | None
    exponents: str | None
    products_under_sum: int | None
    rest_under_sum: str | None
    sum_under_product: int | None
    sums: str | None
    small_sum: str | None
    products: str | None
    stored: str | None


def rounding(multiply: Multiplier, tree: Tree, input_bits: int, *, flushes: bool = False) -> Rounding:
    """Find out how sums are rounded, given the tree of additions.

    Args:
        multiply: the product.
        tree: its order.
        input_bits: that survive of an operand.
        flushes: whether subnormal operands count as zero.
    """
    return _Prober(multiply, tree, input_bits, flushes=flushes).found()


class _Prober:
    def __init__(self, multiply: Multiplier, tree: Tree, input_bits: int, *, flushes: bool) -> None:
        self._multiply = multiply
        self._least = 2.0**multiply.numbers.min_exponent if flushes else 0.0
        self._K = len(tree.leaves)
        self._input_bits = input_bits
        # One place for each moment; the first moment has as many as are added at once.
        moments = spine(tree)
        self._first = [child.leaves[0] for child in moments[0]]
        self._later = [joining[0].leaves[0] for joining in moments[1:]]
        self._second = [k for joining in moments[1:2] for child in joining for k in child.leaves]
        self._group = largest_group(tree)
        self._fused = fused(tree)
        # The 1 of the table, as large as leaves room above for sums, and what the range has below.
        self._top = min(2 * multiply.largest_exponent, 14 if multiply.result == torch.float16 else 100)

    def found(self) -> Rounding:
        bits, at_least = self._accumulator_bits()
        alignment = self._alignment_bits()
        sums_, small, under_sum, rest, under_product = None, None, None, None, None
        if bits is not None and not at_least:
            sums_ = self._sums(bits)
            small = self._small_sum(max(bits, alignment or 0))
            under_sum = self._products_under_sum(bits, sums_)
            rest = self._rest_under_sum(bits, sums_, under_sum)
            under_product = self._sum_under_product(bits, sums_)
        return Rounding(
            group=self._fused,
            accumulator_bits=bits,
            at_least=at_least,
            alignment_bits=alignment,
            aligned=None if alignment is None else self._aligned(alignment),
            exponents=None if alignment is None else self._exponents(alignment),
            products_under_sum=under_sum,
            rest_under_sum=rest,
            sum_under_product=under_product,
            sums=sums_,
            small_sum=small,
            products=self._products(bits),
            stored=self._stored(bits),
        )

    def _ask(self, wanted: Sequence[Values]) -> list[float | None]:
        """Return each sum in units of the 1 of the table; None where a term has no place in the format."""
        scale = 2.0**self._top
        made: list[Sum | None] = [self._terms(each, scale) for each in wanted]
        got = iter((sums(self._multiply, [each for each in made if each is not None], self._K) / scale).tolist())
        return [None if each is None else next(got) for each in made]

    def _terms(self, values: Values, scale: float) -> list[Term] | None:
        try:
            found = [term(self._multiply, k, value * scale) for k, value in values]
        except ValueError:
            return None
        return None if any(min(abs(each.a), abs(each.b)) < self._least for each in found) else found

    def _accumulator_bits(self) -> tuple[int | None, bool]:
        if len(self._later) < 2:
            return None, False
        i, (j, k) = self._first[0], self._later[:2]
        return self._kept([[(i, 1.0), (j, 2.0**-n), (k, -1.0)] for n in range(1, DEEPEST)], plus=1)

    def _alignment_bits(self) -> int | None:
        if len(self._group) < 3:
            return None
        i, j, k = self._group[:3]
        kept, at_least = self._kept([[(i, 1.0), (j, 2.0**-n), (k, -1.0)] for n in range(1, DEEPEST)], plus=0)
        return None if at_least else kept

    def _aligned(self, bits: int) -> str | None:
        i, j, k = self._group[:3]
        rest = 0.75 * 2.0**-bits
        answers = self._ask([[(i, 1.0), (j, rest), (k, -1.0)], [(i, 1.0), (j, -rest), (k, -1.0)]])
        units = tuple(answer * 2.0**bits for answer in answers if answer is not None)
        return _ALIGNMENTS.get(units)

    def _exponents(self, bits: int) -> str | None:
        """Ask of neighbours in a group, and of its even places, which some units add up by themselves."""
        places = [self._group[:3]] + ([self._group[:5:2]] if len(self._group) > 4 else [])
        half, factor = self._top // 2, 1.5
        wanted = []
        for i, j, k in places:
            left, right = factor * 2.0 ** (self._top - half), factor * 2.0**half
            small = self._terms([(j, 2.0**-bits)], 2.0**self._top)
            if small is None:
                return None
            wanted.append([Term(i, left, right), *small, Term(k, -left, right)])
        kept = sums(self._multiply, wanted, self._K) / 2.0**self._top == 2.0**-bits
        return "summed" if bool(kept.all()) else "normalised"

    def _kept(self, wanted: Sequence[Values], plus: int) -> tuple[int | None, bool]:
        least = torch.finfo(self._multiply.result).smallest_normal
        for n, got in enumerate(self._ask(wanted), start=1):
            if got is None or 2.0 ** (self._top - n) < least:
                return (n - 1 + plus, True) if n > 1 else (None, False)
            if got != 2.0**-n:
                return n - 1 + plus, False
        return len(wanted) + plus, True

    def _sums(self, bits: int) -> str | None:
        unit = 2.0 ** (1 - bits)
        i, rest = self._first[0], self._later
        # 1 + u in the first group at once, or one after the other.
        odd: list[tuple[int, float]] = [(i, 1.0)]
        if len(self._first) > 1:
            odd.append((self._first[1], unit))
        else:
            odd.append((rest[0], unit))
            rest = rest[1:]
        if len(rest) < 2:
            return None
        j, k = rest[:2]
        answers = self._ask([
            [(i, 1.0), (j, 0.75 * unit), (k, -1.0)], [(i, -1.0), (j, -0.75 * unit), (k, 1.0)],
            [(i, 1.0), (j, 0.5 * unit), (k, -1.0)], [*odd, (j, 0.5 * unit), (k, -1.0)],
        ])  # fmt: skip
        if any(answer is None for answer in answers):
            return None
        return _ROUNDINGS.get(tuple(answer / unit for answer in answers if answer is not None), "other")

    def _products_under_sum(self, bits: int, how: str | None) -> int | None:
        def asked(n: int) -> Values | None:
            return self._small(n, bits, how, self._second)

        return self._visible(bits, how, lambda n: _around(asked(n), [(self._first[0], 1.0)], [(self._later[1], -1.0)]))

    def _sum_under_product(self, bits: int, how: str | None) -> int | None:
        own = self._first if len(self._first) > 1 else [self._first[0], self._later[0]]
        rest = self._later if len(self._first) > 1 else self._later[1:]
        if len(rest) < 2:
            return None

        def asked(n: int) -> Values | None:
            return self._small(n, bits, how, own)

        return self._visible(bits, how, lambda n: _around(asked(n), [], [(rest[0], 1.0), (rest[1], -1.0)]))

    def _small(self, n: int, bits: int, how: str | None, places: Sequence[int]) -> Values | None:
        """Return what changes a 1 if its bit 2^-n counts: alone, or (to nearest) beside half a unit, which is a tie."""
        if how == "toward zero":
            return [(places[0], -(2.0**-n))]
        if n < bits:
            return [(places[0], 2.0**-n)]
        tie = 2.0**-bits if n > bits else 2.0 ** (1 - bits)  # of n == bits, a tie is what it makes
        if len(places) > 1:
            return [(places[0], tie), (places[1], 2.0**-n)]
        return [(places[0], tie + 2.0**-n)] if n - bits < self._input_bits else None

    def _visible(self, bits: int, how: str | None, asked: Callable[[int], Values | None]) -> int | None:
        """Return the last n whose bit counts; None if all do, or if the rounding is one that cannot tell."""
        if how is None or not how.startswith(("nearest, ties to even", "toward zero")):
            return None
        wanted = [values for n in range(1, DEEPEST) if (values := asked(n)) is not None]
        for n, got in enumerate(self._ask(wanted), start=1):
            if got is None:
                return None
            lost = 2.0 ** (1 - bits) if n == bits and how != "toward zero" else 0.0
            if got == lost:  # two numbers that meet alone keep all that they have
                return n - 1 if self._fused > 1 or n < 2 * bits else None
        return None

    def _rest_under_sum(self, bits: int, how: str | None, kept: int | None) -> str | None:
        if how is None or kept is None:
            return None
        if how == "toward zero":
            return "cut"  # or else less would have been visible without end
        if len(self._second) < 2:
            return None
        i, (x, y), k = self._first[0], self._second[:2], self._later[1]
        quarter, rest = 0.5 * 2.0**-bits, 2.0 ** -(max(kept, bits) + 2)
        (got,) = self._ask([[(i, 1.0), (x, -quarter), (y, -rest), (k, -1.0)]])
        return None if got is None else "cut" if got == 0.0 else "rounded down"

    def _small_sum(self, bits: int) -> str | None:
        i, (j, k) = self._first[0], self._later[:2]
        for below in (bits + 6, bits + 3, bits + 2):  # as far as the range goes
            small = 2.0**-below
            minus, plus = self._ask([[(i, -small), (j, 1.0), (k, -1.0)], [(i, small), (j, 1.0), (k, -1.0)]])
            if minus is not None and plus is not None:
                return {(True, True): "dropped", (False, True): "rounded down", (True, False): "rounded up"}.get(
                    (minus == 0.0, plus == 0.0), "kept"
                )
        return None

    def _products(self, bits: int | None) -> str | None:
        """Ask whether the square of 1 + 2^-m is added with its last bit, m as large as operands and a sum allow."""
        m = min(self._input_bits - 1, 27 if self._multiply.format == "float64" else 12, bits or DEEPEST)
        # Of two products at the bottom of a tree nothing tells the first, which is rounded as the sum begins.
        i, j = self._first[0], self._later[:2][-1] if self._later else self._first[-1]
        if i == j or m < 2:
            return None
        number = 1.0 + 2.0**-m
        try:
            terms = [term(self._multiply, i, -(1.0 + 2.0 ** (1 - m))), Term(j, number, number)]
        except ValueError:
            return None
        left = float(sums(self._multiply, [terms], self._K)[0])
        return "exact" if left == 2.0 ** (-2 * m) else "rounded"

    def _stored(self, bits: int | None) -> str | None:
        """Ask about sums that have more bits than the result."""
        has = FORMATS[str(self._multiply.result).removeprefix("torch.")].bits
        if bits is None or bits < has + 2:
            return None
        places = [*self._first, *self._later]
        if len(places) < 3:
            return None
        i, j, k = places[:3]
        unit = 2.0 ** (1 - has)
        answers = self._ask([
            [(i, 1.0), (j, 0.75 * unit)], [(i, -1.0), (j, -0.75 * unit)],
            [(i, 1.0), (j, 0.5 * unit)], [(i, 1.0), (j, unit), (k, 0.5 * unit)],
        ])  # fmt: skip
        if any(answer is None for answer in answers):
            return None
        rests = [
            (answer - one) / unit for answer, one in zip(answers, (1, -1, 1, 1), strict=True) if answer is not None
        ]
        return _ROUNDINGS.get(tuple(rests), "other")


def _around(values: Values | None, before: Values, after: Values) -> Values | None:
    return None if values is None else [*before, *values, *after]


_ALIGNMENTS: dict[tuple[float, ...], str] = {(0.0, 0.0): "cut", (0.0, -1.0): "rounded down", (1.0, -1.0): "nearest"}

_ROUNDINGS: dict[tuple[float, ...], str] = {
    (1.0, -1.0, 0.0, 2.0): "nearest, ties to even",
    (1.0, -1.0, 1.0, 2.0): "nearest, ties away",
    (1.0, -1.0, 0.0, 1.0): "nearest, ties toward zero",
    (0.0, 0.0, 0.0, 1.0): "toward zero",
    (0.0, -1.0, 0.0, 1.0): "down",
    (1.0, 0.0, 1.0, 2.0): "up",
}
"""Answers to the four questions about sums, in units."""
