# SPDX-License-Identifier: Apache-2.0
"""How many bits a sum keeps and how it is rounded, found with three or four products at moments of its growth.

All numbers here are powers of two, or 1.5 of one. The sum's leading 1 is taken away at the end, so that what is left is
seen whole even where the result has fewer bits than the accumulator.

    asked                                   terms, moment by moment             answer
    bits of the accumulator                 1, 2^-k, -1                         the last k that comes back, plus 1
    bits of aligned products                1, 2^-k, -1 in one group            the last k that comes back
    what becomes of the rest of these       1, 3/4 unit, -1; 1, -3/4 unit, -1   unit, 0, -unit: nearest, cut, down
    rounding of sums, u one unit            1, 3/4 u, -1 and its negative;      u, 0 and -u tell nearest, toward zero,
                                            1, u/2, -1; 1 + u, u/2, -1          up, down, and what becomes of ties
    a small sum under a large product       -2^-q, 1, -1; 2^-q, 1, -1           0: cut; minus one unit: rounded down
    products                                -(1 + 2^(1-m)), (1 + 2^-m)^2        2^-2m: exact; 0: rounded first
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

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
        sums: "nearest, ties to even", "nearest, ties away", "toward zero", "down", "up" or "other".
        small_sum: "dropped", or "rounded down" if a small negative sum takes one unit from a large product.
        products: "exact", or "rounded" before they are added.
    """

    group: int
    accumulator_bits: int | None
    at_least: bool
    alignment_bits: int | None
    aligned: str | None
    sums: str | None
    small_sum: str | None
    products: str | None


def rounding(multiply: Multiplier, tree: Tree, input_bits: int) -> Rounding:
    """Find out how sums are rounded, given the tree of additions.

    Args:
        multiply: the product.
        tree: its order.
        input_bits: that survive of an operand.
    """
    return _Prober(multiply, tree, input_bits).found()


class _Prober:
    def __init__(self, multiply: Multiplier, tree: Tree, input_bits: int) -> None:
        self._multiply = multiply
        self._K = len(tree.leaves)
        self._input_bits = input_bits
        # One place for each moment; the first moment has as many as are added at once.
        moments = spine(tree)
        self._first = [child.leaves[0] for child in moments[0]]
        self._later = [joining[0].leaves[0] for joining in moments[1:]]
        self._group = largest_group(tree)
        self._fused = fused(tree)
        # The 1 of the table, as large as leaves room above for sums, and what the range has below.
        self._top = min(2 * multiply.largest_exponent, 14 if multiply.result == torch.float16 else 100)

    def found(self) -> Rounding:
        bits, at_least = self._accumulator_bits()
        alignment = self._alignment_bits()
        sums_, small = None, None
        if bits is not None and not at_least:
            sums_ = self._sums(bits)
            small = self._small_sum(max(bits, alignment or 0))
        aligned = None if alignment is None else self._aligned(alignment)
        return Rounding(self._fused, bits, at_least, alignment, aligned, sums_, small, self._products(bits))

    def _ask(self, wanted: Sequence[Values]) -> list[float | None]:
        """Return each sum in units of the 1 of the table; None where a term has no place in the format."""
        scale = 2.0**self._top
        made: list[Sum | None] = [self._terms(each, scale) for each in wanted]
        got = iter((sums(self._multiply, [each for each in made if each is not None], self._K) / scale).tolist())
        return [None if each is None else next(got) for each in made]

    def _terms(self, values: Values, scale: float) -> list[Term] | None:
        try:
            return [term(self._multiply, k, value * scale) for k, value in values]
        except ValueError:
            return None

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
