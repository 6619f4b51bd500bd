# SPDX-License-Identifier: Apache-2.0
"""What a product makes of numbers at the ends of its format: cut operands, subnormals, overflow, infinities, NaN."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from hal.matrix_unit import FORMATS
from hal.probe.multiplier import STORED, Multiplier, bits
from hal.probe.terms import Sum, Term, raw_sums, sums


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
    """What happens beyond the range of a format, and to a zero's sign.

    Where not all answers to a fact's questions are alike, it names those that are not as they should be, such as
    "largest (infinity in b, -infinity in b)"; "largest" is the largest number of the result.

    Attributes:
        subnormal_results: "kept", "flushed", or None where two operands have no such product.
        overflow: of products beyond 2^128 that cancel: "cancels", or "infinity". None in a format that has none.
        overflow_stored: what finite products become whose sum is beyond the largest number of the result: "infinity",
            "largest", "nan", or a number. None in a format whose sums are never so large.
        infinity: "kept", or what an infinite operand becomes. None in a format without.
        nan: "kept", or what becomes of one among the operands, of infinity times zero, or of infinity less infinity.
        nan_bits: of infinity times zero, or of a NaN in a format without infinity, as the device stores it, in
            hexadecimal. None if that is no NaN.
        zero_signs: "kept" where sums of zeros, and of numbers that cancel, are +0, and a negative number that is too
            small to be stored is -0; or what they are.
    """

    subnormal_results: str | None
    overflow: str | None
    overflow_stored: str | None
    infinity: str | None
    nan: str | None
    nan_bits: str | None
    zero_signs: str | None


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

    Finite operands, infinite ones and NaN are asked about apart: a kernel may look for any that is not finite, and then
    take another path for all.

    Args:
        multiply: the product.
        together: two positions whose products are added at once, or one right after the other.
        K: inner length.
    """
    i, j = together
    least = multiply.numbers.min_exponent
    results = None
    if multiply.result == multiply.dtype:
        small = sums(multiply, [[Term(0, 2.0**least, 0.25)]], K)
        results = "kept" if float(small[0]) == 2.0 ** (least - 2) else "flushed"
    overflow = None
    if multiply.format in ("float32", "tf32", "hf32", "bfloat16"):
        cancelled = sums(multiply, [[Term(i, 2.0**127, 2.0), Term(j, -(2.0**127), 2.0)]], K)
        overflow = "cancels" if float(cancelled[0]) == 0.0 else "infinity"
    undefined = _times_zero(multiply)
    no_numbers = _answers(multiply, _NANS, math.nan, K)
    if undefined:
        no_numbers |= _answers(multiply, undefined, math.nan, K) | _less_itself(multiply, i, j, K)
    zeros = _zeros(multiply, i, j, K, keeps_subnormals=results == "kept")
    first, _ = next(iter((undefined or _NANS).values()))
    return Extremes(
        subnormal_results=results,
        overflow=overflow,
        overflow_stored=_in_words(_answers(multiply, _beyond(multiply, i, j), math.inf, K), kept="infinity"),
        infinity=_in_words(_answers(multiply, _infinite(multiply), math.inf, K)),
        nan=_in_words(no_numbers),
        nan_bits=_code(raw_sums(multiply, [first], K)),
        zero_signs=_in_words(_answers(multiply, zeros, 0.0, K)),
    )


def has_infinity(format: str) -> bool:
    """Return whether a format has infinities, which torch's names of those of 8 bits tell: "fn" has none."""
    return "fn" not in format


# Questions by name, each with the sign of what should come back ------------------------------------------------------

Questions = Mapping[str, tuple[Sum, float]]


def _beyond(multiply: Multiplier, i: int, j: int) -> Questions:
    """Ask for finite products whose sum is beyond the largest number of the result."""
    if multiply.result != multiply.dtype:
        return {}  # products of 8-bit numbers are far from the ends of what holds their sums
    largest = torch.finfo(multiply.dtype).max
    top = math.frexp(largest)[1]
    half = 2.0 ** (top - 1)
    asked = {
        f"2^{top} as a product": [Term(i, half, 2.0)],
        f"2^{top} as a sum": [Term(i, half, 1.0), Term(j, half, 1.0)],
    }
    if multiply.dtype in (torch.float16, torch.bfloat16):  # a sum in float32 can be less than one unit beyond
        quarter = top - multiply.numbers.bits - 2
        asked[f"2^{top} - 2^{quarter}"] = [Term(i, largest, 1.0), Term(j, 3 * 2.0**quarter, 1.0)]
    found = {name: (terms, 1.0) for name, terms in asked.items()}
    for name, terms in asked.items():
        found[f"-{name.replace('-', '+')}"] = [Term(each.k, -each.a, each.b) for each in terms], -1.0
    return found


def _infinite(multiply: Multiplier) -> Questions:
    of_a, of_b = map(has_infinity, multiply.formats)
    asked: dict[str, tuple[Sum, float]] = {}
    for word, sign in (("", 1.0), ("-", -1.0)):
        if of_a:
            asked[f"{word}infinity in a"] = ([Term(0, sign * math.inf, 1.0)], sign)
        if of_b:
            asked[f"{word}infinity in b"] = ([Term(0, 1.0, sign * math.inf)], sign)
    return asked


def _times_zero(multiply: Multiplier) -> Questions:
    of_a, of_b = map(has_infinity, multiply.formats)
    return {
        **({"infinity * 0": ([Term(0, math.inf, 0.0)], 1.0)} if of_a else {}),
        **({"0 * infinity": ([Term(0, 0.0, math.inf)], 1.0)} if of_b else {}),
    }


def _less_itself(multiply: Multiplier, i: int, j: int, K: int) -> dict[str, str]:
    """Ask what is left of infinity and its negative, in rows of both orders.

    All of b is one, so that a NaN is not that of an infinity times a zero elsewhere.
    """
    a = torch.zeros(multiply.outer, K, dtype=torch.float64)
    a[::2, i], a[::2, j], a[1::2, i], a[1::2, j] = math.inf, -math.inf, -math.inf, math.inf
    plus, minus = multiply(a, torch.ones(K, multiply.outer, dtype=torch.float64)).diagonal()[:2].tolist()
    return {
        "infinity - infinity": _word(multiply, plus, math.nan),
        "-infinity + infinity": _word(multiply, minus, math.nan),
    }


_NANS: Questions = {
    "NaN in a": ([Term(0, math.nan, 1.0)], 1.0), "-NaN in a": ([Term(0, -math.nan, 1.0)], 1.0),
    "NaN in b": ([Term(0, 1.0, math.nan)], 1.0), "-NaN in b": ([Term(0, 1.0, -math.nan)], 1.0),
}  # fmt: skip


def _zeros(multiply: Multiplier, i: int, j: int, K: int, *, keeps_subnormals: bool) -> Questions:
    """Ask for zeros, whose signs follow if a sum begins with +0, and for negative numbers too small for their format.

    Too small to be stored where a sum has more range; too small for the sum itself in a chain of fused multiply-adds,
    which makes -0 of each. (Units that align products drop them instead, or round them down.)
    """
    asked: dict[str, tuple[Sum, float]] = {
        "1 - 1": ([Term(i, 1.0, 1.0), Term(j, -1.0, 1.0)], 1.0),
        "0 - 0": ([Term(i, -0.0, 1.0)], 1.0),
        "a sum of -0": ([Term(k, -0.0, 1.0) for k in range(K)], 1.0),
    }
    if multiply.format in ("float32", "float64"):
        half = -100 if multiply.format == "float32" else -1000
        asked[f"a sum of -2^{2 * half}"] = ([Term(k, -(2.0**half), 2.0**half) for k in range(K)], -1.0)
    elif multiply.dtype in (torch.float16, torch.bfloat16) and keeps_subnormals:
        numbers = FORMATS[multiply.format]
        eighth = numbers.min_exponent - numbers.bits - 2  # of the least number
        asked[f"-2^{eighth}"] = ([Term(0, -(2.0 ** (eighth // 2)), 2.0 ** (eighth - eighth // 2))], -1.0)
    return asked


# Answers -------------------------------------------------------------------------------------------------------------


def _answers(multiply: Multiplier, asked: Questions, right: float, K: int) -> dict[str, str]:
    """Return a word for each answer, in a call of its own; `right` is what is right, but for the sign."""
    got = sums(multiply, [terms for terms, _ in asked.values()], K).tolist()
    return {name: _word(multiply, x, sign * right) for x, (name, (_, sign)) in zip(got, asked.items(), strict=True)}


def _word(multiply: Multiplier, x: float, right: float) -> str:
    """Return "kept" if a number is the right one; "largest" if it is the largest of that sign; or what it is."""
    if str(x) == str(right):  # of zeros the sign as well, and of NaN not
        return "kept"
    if math.copysign(x, right) == x and abs(x) == torch.finfo(multiply.result).max:
        return "largest"
    if x == 0.0:
        return "-0" if math.copysign(1.0, x) < 0 else "+0"
    return str(x).replace("inf", "infinity")


def _in_words(answers: Mapping[str, str], kept: str = "kept") -> str | None:
    """Return the answer that all questions have, or those that are not right, each with its questions.

    Args:
        answers: by question.
        kept: what to call "kept", if all are.
    """
    if not answers:
        return None
    if len(set(answers.values())) == 1:
        (answer,) = set(answers.values())
        return kept if answer == "kept" else answer
    wrong: dict[str, list[str]] = {}
    for name, answer in answers.items():
        if answer != "kept":
            wrong.setdefault(answer, []).append(name)
    return "; ".join(f"{answer} ({', '.join(names)})" for answer, names in wrong.items())


def named(answer: str) -> str:
    """Return an answer as it stands in a sentence."""
    return answer.replace("largest", "the largest number").replace("nan", "NaN")


def _code(value: torch.Tensor) -> str | None:
    if not bool(value.isnan().all()):
        return None
    width = 2 * value.element_size()
    return f"{int(bits(value)[0]) & ((1 << 4 * width) - 1):0{width}x}"
