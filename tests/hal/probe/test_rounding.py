# SPDX-License-Identifier: Apache-2.0
"""Bits and roundings that were built in are found, and what comes of operands."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from probe_kernels import ROUNDINGS, chain, multiplier, one_after_another, rounded, with_operands

from hal.matrix_unit import FORMATS
from hal.probe import special
from hal.probe.rounding import rounding
from hal.probe.tree import leaf, node
from hal.probe.unit import unit_facts

K = 8


def found(multiply, tree=None):
    return rounding(multiply, tree or chain(range(K)), FORMATS[multiply.format].bits)


@given(st.integers(8, 24), st.sampled_from(sorted(ROUNDINGS)),
       st.sampled_from(["bfloat16", "float16", "float32", "float8_e4m3fn", "float8_e5m2"]))  # fmt: skip
def test_an_accumulator_is_found_as_it_was_built(bits, how, format):
    seen = found(multiplier(one_after_another(bits, how), format))
    assert (seen.group, seen.accumulator_bits, seen.at_least, seen.sums) == (1, bits, False, how)
    assert (seen.alignment_bits, seen.aligned) == (None, None)
    assert seen.small_sum == ("dropped" if how.startswith("nearest") else "rounded down")
    if format != "float8_e5m2":  # whose squares are too short to be rounded
        assert seen.products == "exact"


@given(st.integers(8, 24), st.sampled_from(sorted(ROUNDINGS)))
def test_a_whole_probe_finds_the_same(bits, how):
    facts = unit_facts(multiplier(one_after_another(bits, how)), K, {})
    assert facts.order == "one product after another, k ascending"
    assert (facts.accumulator_bits, facts.sums, facts.input_bits) == (bits, how, 8)


@pytest.mark.parametrize("order", [range(K)[::-1], [3, 1, 4, 0, 5, 2, 7, 6]], ids=["descending", "irregular"])
def test_rounding_is_found_in_any_order(order):
    sum_ = one_after_another(13, "toward zero", lambda K: order)
    seen = found(multiplier(sum_), chain(order))
    assert (seen.accumulator_bits, seen.sums, seen.products) == (13, "toward zero", "exact")


@pytest.mark.parametrize(
    ("format", "bits"), [("bfloat16", 8), ("float16", 11), ("float32", 24), ("float32", 11), ("bfloat16", 12)]
)
def test_products_that_are_rounded_first_are_found(format, bits):
    assert found(multiplier(one_after_another(24, of_products=bits), format)).products == "rounded"
    assert found(multiplier(one_after_another(24), format)).products == "exact"


@pytest.mark.parametrize("format", ["float16", "float32"])
def test_products_are_exact_in_an_accumulator_narrower_than_its_operands(format):
    assert found(multiplier(one_after_another(9, "toward zero"), format)).products == "exact"


def test_an_accumulator_beyond_the_range_of_the_format_has_so_many_bits_or_more():
    seen = found(multiplier(one_after_another(48), "float16"))
    assert seen.at_least
    assert 24 < seen.accumulator_bits < 48
    assert seen.sums is None


def test_two_products_are_too_few_to_see_an_accumulator():
    seen = rounding(multiplier(one_after_another()), chain(range(2)), 8)
    assert (seen.accumulator_bits, seen.sums) == (None, None)


def aligned(group, below, how, bits, sums):
    """Return a sum of groups that are aligned to their largest number, and rounded to `bits` with each group."""
    cut = {"cut": np.trunc, "rounded down": np.floor, "nearest": np.round}[how]

    def sum_(products):
        total = np.zeros(products.shape[1:])
        for start in range(0, len(products), group):
            parts = np.concatenate([total[None], products[start : start + group]])
            exponents = np.where(parts == 0, -900, np.frexp(parts)[1]).max(0) - 1 - below
            total = rounded(np.ldexp(cut(np.ldexp(parts, -exponents)).sum(0), exponents), bits, sums)
        return total

    return sum_


@given(st.sampled_from(["cut", "rounded down", "nearest"]), st.integers(14, 26), st.integers(10, 12),
       st.sampled_from(["toward zero", "nearest, ties to even"]))  # fmt: skip
def test_products_that_are_added_at_once_are_found_as_they_are_aligned(how, below, bits, sums):
    tree = node([node([leaf(k) for k in range(4)]), *map(leaf, range(4, 8))])
    for start in (8, 12):
        tree = node([tree, *map(leaf, range(start, start + 4))])
    seen = rounding(multiplier(aligned(4, below, how, bits, sums)), tree, 8)
    assert (seen.group, seen.alignment_bits, seen.aligned) == (4, below, how)
    assert (seen.accumulator_bits, seen.sums) == (bits, sums)
    assert seen.exponents == "normalised"  # as numpy's own are
    if how == "cut":
        assert (seen.products_under_sum, seen.rest_under_sum) == (below, "cut")
        # A sum of few bits is rounded before it meets a product.
        assert seen.sum_under_product == (below if sums == "toward zero" else min(below, 2 * bits - 1))


@pytest.mark.parametrize("how", ["nearest, ties to even", "nearest, ties away", "toward zero", "down"])
@pytest.mark.parametrize("format", ["bfloat16", "float16"])
def test_the_rounding_of_a_result_is_found(format, how):
    exact = one_after_another(24)
    multiply = multiplier(lambda products: rounded(exact(products), FORMATS[format].bits, how), format)
    assert found(multiply).stored == how
    assert found(multiplier(exact, "float32")).stored is None


@pytest.mark.parametrize(
    ("bits", "how", "words"),
    [(11, "toward zero", "cut"), (11, "nearest, ties to even", "nearest, ties to even"),
     (12, "nearest, ties to even", "nearest, ties to even"), (12, "nearest, ties away", "nearest, ties away"),
     (8, "toward zero", "cut")],
)  # fmt: skip
def test_bits_of_float32_operands_and_their_rounding_are_found(bits, how, words):
    multiply = with_operands(multiplier(one_after_another(), "float32"), lambda x: rounded(x, bits, how))
    seen = special.operands(multiply, K)
    assert (seen.bits, seen.rounding, seen.subnormals) == (bits, words, "kept")
    facts = unit_facts(multiply, K, {})
    assert (facts.input_bits, facts.input_rounding, facts.accumulator_bits) == (bits, words, 24)
    assert facts.products == "exact"


@pytest.mark.parametrize("format", sorted(set(FORMATS) - {"tf32", "hf32"}))
def test_operands_that_are_whole_have_no_rounding(format):
    # Where the format's smallest numbers are float64's own, all that a sum may do is nothing.
    seen = special.operands(multiplier(lambda products: products.sum(0), format), K)
    assert (seen.bits, seen.rounding, seen.subnormals) == (FORMATS[format].bits, None, "kept")


@pytest.mark.parametrize("side", ["left", "right"])
def test_one_operand_that_is_cut_is_enough(side):
    multiply = multiplier(one_after_another(), "float32")

    def low(x):
        return (x.view(torch.int32) & -(1 << 13)).view(x.dtype)

    def kernel(a, b):
        return multiply.kernel(low(a), b) if side == "left" else multiply.kernel(a, low(b))

    assert special.operands(replace(multiply, kernel=kernel), K).bits == 11


@pytest.mark.parametrize("format", ["bfloat16", "float16", "float32"])
def test_flushed_operands_and_results_are_found(format):
    least = 2.0 ** FORMATS[format].min_exponent

    def flush(x):
        return np.where(np.abs(x) < least, 0.0, x)

    operands = with_operands(multiplier(one_after_another(), format), flush)
    results = multiplier(lambda products: flush(one_after_another()(products)), format)
    assert special.operands(operands, K).subnormals == "flushed"
    assert special.extremes(operands, (0, 1), K).subnormal_results == "kept"
    assert special.operands(results, K).subnormals == "kept"
    assert special.extremes(results, (0, 1), K).subnormal_results == "flushed"


def test_what_happens_beyond_the_range_is_found():
    plain = one_after_another()

    def float32(products):
        with np.errstate(over="ignore", invalid="ignore"):
            total = np.zeros(products.shape[1:], np.float32)
            for each in products:
                total = total + each.astype(np.float32)
            return total

    def saturated(products):
        return np.nan_to_num(products, nan=0.0, posinf=1e38, neginf=-1e38).sum(0)

    kept = special.extremes(multiplier(lambda products: products.sum(0)), (0, 1), K)
    assert (kept.overflow, kept.infinity) == ("cancels", "kept")
    assert special.extremes(multiplier(plain), (0, 1), K).overflow == "cancels"
    assert special.extremes(multiplier(float32), (0, 1), K).overflow == "infinity"
    other = special.extremes(multiplier(saturated), (0, 1), K)
    assert other.infinity.startswith("9.969")
    assert other.infinity.endswith("e+37 (-infinity in a, -infinity in b)")
    assert other.nan == "+0"
    # Infinity times zero is NaN, a NaN none.
    dropped = with_operands(multiplier(float32), lambda x: np.where(np.isnan(x), 0.0, x))
    found = special.extremes(dropped, (0, 1), K)
    assert (found.nan, found.nan_bits) == ("+0 (NaN in a, -NaN in a, NaN in b, -NaN in b)", kept.nan_bits)
    # Of a format without infinities, a NaN is what is asked.
    narrow = special.extremes(multiplier(lambda products: products.sum(0), "float8_e4m3fn"), (0, 1), K)
    assert (narrow.infinity, narrow.overflow, narrow.subnormal_results) == (None, None, None)
    assert (narrow.overflow_stored, narrow.nan, len(narrow.nan_bits)) == (None, "kept", 8)


@pytest.mark.parametrize("how", ["toward zero", "nearest, ties to even"])
def test_operands_that_are_a_sum_of_two_bfloat16_keep_16_or_17_bits(how):
    def two(x):
        with np.errstate(invalid="ignore"):
            first = rounded(x, 8, how)
            return first + rounded(np.where(np.isfinite(x), x - first, 0.0), 8, how)

    found = special.operands(with_operands(multiplier(one_after_another(), "float32"), two), 8)
    assert found.bits in (16, 17)
    assert found.rounding is not None
