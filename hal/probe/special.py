# SPDX-License-Identifier: Apache-2.0
"""What a product makes of numbers at the ends of its format: cut operands, subnormals, overflow, infinities, NaN."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hal.matrix_unit import FORMATS
from hal.probe.multiplier import STORED, Multiplier, bits
from hal.probe.terms import Term, raw_sums, sums


@dataclass(frozen=True)
class Operands:
    """What survives of an operand.

    Attributes:
        bits: significand bits, the hidden one included, that come back from a product with 1, on both sides.
        rounding: what becomes of the others, where the format has more: "cut", "nearest, ties to even" or "nearest,
            ties away"; "split" if two numbers or more stand for an operand.
        subnormals: "kept" or "flushed".
    """

    bits: int
    rounding: str | None
    subnormals: str


@dataclass(frozen=True)
class Extremes:
    """What happens beyond the range of a format.

    Attributes:
        subnormal_results: "kept", "flushed", or None where two operands have no such product.
        overflow: of products beyond 2^128 that cancel: "cancels", or "infinity". None in a format that has none.
        nan: bits of infinity times zero, or of a NaN in a format without infinity, as the device stores them, in
            hexadecimal; "none" if one of the two is no NaN.
        infinity: "kept", or what an infinite operand becomes. None in a format without.
    """

    subnormal_results: str | None
    overflow: str | None
    nan: str
    infinity: str | None


def operands(multiply: Multiplier, K: int) -> Operands:
    """Find out what survives of operands in products with 1, all other products being of zeros."""
    whole = FORMATS[STORED.get(multiply.format, multiply.format)].bits
    odd = _odd_numbers(whole)
    numbers = [x for of_length in odd.values() for x in of_length]
    exact = dict.fromkeys(numbers, False)
    for x, left, right in zip(
        numbers,
        sums(multiply, [[Term(0, x, 1.0)] for x in numbers], K).tolist(),
        sums(multiply, [[Term(0, 1.0, x)] for x in numbers], K).tolist(),
        strict=True,
    ):
        exact[x] = left == right == x
    kept = 1
    while kept < whole and all(exact[x] for x in odd[kept + 1]):
        kept += 1
    rounding = None
    if kept < whole - 1:
        unit = 2.0 ** (1 - kept)
        asked = (1.0 + 0.75 * unit, 1.0 + 0.5 * unit, 1.0 + 1.5 * unit)
        got = tuple(((sums(multiply, [[Term(0, x, 1.0)] for x in asked], K) - 1.0) / unit).tolist())
        rounding = {
            (0.0, 0.0, 1.0): "cut", (1.0, 0.0, 2.0): "nearest, ties to even", (1.0, 1.0, 2.0): "nearest, ties away",
        }.get(got, "split")  # fmt: skip
    of_a, of_b = (2.0 ** (FORMATS[format].min_exponent - 1) for format in multiply.formats)
    whole_again = sums(multiply, [[Term(0, of_a, 2.0)], [Term(0, 2.0, of_b)]], K).tolist()
    return Operands(kept, rounding, "kept" if whole_again == [2 * of_a, 2 * of_b] else "flushed")


def _odd_numbers(most: int) -> dict[int, list[float]]:
    """Return numbers whose first and last significand bits are set, and one more at each place between, by length.

    The bit between shows an operand that is split in two (`hal.fp32_probe`): 1 and 2^-n alone are short ones for any n.
    """
    found = {}
    for length in range(2, most + 1):
        number = 1.0 + 2.0 ** (1 - length)
        found[length] = [number, *(number + 2.0**-place for place in range(1, length - 1) if most <= 24)]
    return found


def extremes(multiply: Multiplier, together: tuple[int, int], K: int) -> Extremes:
    """Find out what happens beyond the range.

    Args:
        multiply: the product.
        together: two positions whose products are added at once, or one right after the other.
        K: inner length.
    """
    least = multiply.numbers.min_exponent
    results = None
    if multiply.result == multiply.dtype:
        small = sums(multiply, [[Term(0, 2.0**least, 0.25)]], K)
        results = "kept" if float(small[0]) == 2.0 ** (least - 2) else "flushed"
    overflow = None
    if multiply.format in ("float32", "tf32", "hf32", "bfloat16"):
        i, j = together
        cancelled = sums(multiply, [[Term(i, 2.0**127, 2.0), Term(j, -(2.0**127), 2.0)]], K)
        overflow = "cancels" if float(cancelled[0]) == 0.0 else "infinity"
    infinity = None
    of_nan = [[Term(0, torch.nan, 1.0)]]
    if has_infinity(multiply.format):
        got = float(sums(multiply, [[Term(0, torch.inf, 1.0)]], K)[0])
        infinity = "kept" if got == torch.inf else str(got)
        of_nan.insert(0, [Term(0, torch.inf, 0.0)])
    return Extremes(results, overflow, _code(raw_sums(multiply, of_nan, K)), infinity)


def has_infinity(format: str) -> bool:
    """Return whether a format has infinities, which torch's names of those of 8 bits tell: "fn" has none."""
    return "fn" not in format


def _code(value: torch.Tensor) -> str:
    if not bool(value.isnan().all()):
        return "none"
    width = 2 * value.element_size()
    return f"{int(bits(value)[0]) & ((1 << 4 * width) - 1):0{width}x}"
