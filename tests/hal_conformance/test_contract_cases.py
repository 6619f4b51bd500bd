# SPDX-License-Identifier: Apache-2.0
"""Probes of the contract against emulated arithmetic whose bits and rounding are known, and against forged results."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hal.contract import Arithmetic, Contract
from hal_conformance import inputs as make
from hal_conformance.case import Params
from hal_conformance.cases import by_name
from hal_conformance.cases.stores import POINTS, output
from hal_conformance.numerics.bounds import SIGNIFICANDS
from hal_conformance.verdicts import Status

PRODUCTS, SPECIAL, TIES, STORES = (by_name(f"contract.{name}") for name in ("products", "special", "ties", "stores"))


def at(dtype, seed=0):
    return Params("ling-lite", dtype, "tiny", seed)


def rounded(x, bits, rounding):
    """Return x in `bits` significand bits."""
    mantissa, exponent = np.frexp(x)
    scaled = np.ldexp(mantissa, bits)
    kept = np.rint(scaled) if rounding == "nearest" else np.trunc(scaled)
    return np.ldexp(kept, exponent - bits)


def product(a, b, bits, rounding, order, kept=None):
    """Return a @ b with an accumulator of so many bits, adding in some order; inputs cut to `kept` bits."""
    a, b = (x if kept is None else rounded(x, kept, "truncate") for x in (a, b))
    total = np.zeros((a.shape[0], b.shape[1]))
    for k in order:
        total = rounded(total + a[:, k, None] * b[None, k], bits, rounding)
    return total


def found(dtype, seed, contract, bits, rounding, kept=None):
    p = at(dtype, seed)
    inputs = PRODUCTS.inputs(p)
    a = {name: np.asarray(array, np.float64) for name, array in inputs.items()}
    order = np.random.default_rng(seed).permutation(a["rows_MK"].shape[1])
    outputs = {
        "left_MN": product(a["rows_MK"], a["ones_KN"], bits, rounding, order, kept),
        "right_NM": product(a["ones_KN"].T, a["rows_MK"].T, bits, rounding, order, kept),
        "sums_M": product(a["sums_MK"], a["scales_KN"][:, :1], bits, rounding, order, kept)[:, 0],
    }
    return PRODUCTS.judge(inputs, {n: make.store(array, dtype) for n, array in outputs.items()}, p, contract)


def promise(dtype, **named):
    return Contract(matmul={dtype: Arithmetic(**named)})


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_bits_and_rounding_of_an_emulated_unit_are_found_and_a_promise_of_more_is_red(data):
    dtype = data.draw(st.sampled_from(["float32", "bfloat16", "float16"]))
    # Of fewer bits than the dtype an accumulator loses inputs, which is another finding.
    bits = data.draw(st.integers(SIGNIFICANDS[dtype], 25))
    rounding = data.draw(st.sampled_from(["nearest", "truncate"]))
    seed = data.draw(st.integers(0, 2**31))
    held = promise(dtype, accumulator_bits=bits, rounding=rounding)
    verdict = found(dtype, seed, held, bits, rounding)
    assert verdict.status is Status.PASS
    assert f"sums {bits}, {'rounded to nearest' if rounding == 'nearest' else 'cut'}" in verdict.detail
    more = found(dtype, seed, promise(dtype, accumulator_bits=bits + 1, rounding=rounding), bits, rounding)
    assert more.status is Status.FAIL_NUMERIC
    assert f"sums keep {bits} bits, not {bits + 1}" in more.detail
    other = found(dtype, seed, promise(dtype, accumulator_bits=bits), bits, rounding)
    assert (other.status is Status.FAIL_NUMERIC) == (rounding == "truncate")


@pytest.mark.parametrize("kept", [8, 11, 16, 23])
def test_reduced_inputs_are_found(kept):
    verdict = found("float32", 3, promise("float32", input_bits=kept), 24, "nearest", kept)
    assert verdict.status is Status.PASS
    assert f"products keep {kept} of 24 bits" in verdict.detail
    verdict = found("float32", 3, promise("float32"), 24, "nearest", kept)
    assert verdict.status is Status.FAIL_NUMERIC
    assert f"products keep {kept} bits, not 24" in verdict.detail


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_lost_special_numbers_are_named_and_red_where_they_are_promised(dtype):
    p = at(dtype)
    inputs = SPECIAL.inputs(p)
    with np.errstate(all="ignore"):
        a, b = (np.asarray(inputs[name], np.float64) for name in ("rows_MK", "powers_KN"))
        y = make.store(a @ b, dtype)
    kept, flushed, clamped = (y.copy() for _ in range(3))
    small = (np.abs(np.asarray(y, np.float64)) > 0) & (np.abs(np.asarray(y, np.float64)) < 2.0**-14)
    flushed[:2][small[:2]] = 0
    clamped[5] = y[5, 2]  # the largest number itself, times one
    whole = Contract(subnormals="preserved")
    assert SPECIAL.judge(inputs, {"y_MN": kept}, p, whole).detail == "keeps subnormal numbers, infinities and NaN"
    assert "loses subnormal" in SPECIAL.judge(inputs, {"y_MN": flushed}, p, Contract()).detail
    assert SPECIAL.judge(inputs, {"y_MN": flushed}, p, whole).status is Status.FAIL_NUMERIC
    red = SPECIAL.judge(inputs, {"y_MN": clamped}, p, Contract())
    assert red.status is Status.FAIL_NUMERIC
    assert "overflow to infinity lost" in red.detail
    assert SPECIAL.judge(inputs, {"y_MN": clamped}, p, Contract(nonfinite="saturate")).status is Status.PASS


def test_the_order_of_ties_is_held_against_the_contract():
    p = at("float32")
    inputs = TIES.inputs(p)
    x = np.asarray(inputs["x_TE"], np.float64)
    lower = np.argsort(-x, axis=1, kind="stable")[:, : TIES.K].astype(np.int64)
    higher = (x.shape[1] - 1 - np.argsort(-x[:, ::-1], axis=1, kind="stable")[:, : TIES.K]).astype(np.int64)
    wrong = np.argsort(x, axis=1, kind="stable")[:, : TIES.K].astype(np.int64)
    promised = Contract(topk_ties="lower_index")
    assert TIES.judge(inputs, {"index_TK": lower}, p, promised).status is Status.PASS
    assert TIES.judge(inputs, {"index_TK": higher}, p, Contract()).status is Status.PASS
    assert TIES.judge(inputs, {"index_TK": higher}, p, promised).status is Status.FAIL_NUMERIC
    assert TIES.judge(inputs, {"index_TK": wrong}, p, Contract()).status is Status.FAIL_DISCRETE


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("stored", [c for n in range(4) for c in itertools.combinations(POINTS, n)])
def test_where_an_implementation_rounds_is_named(dtype, stored):
    for seed in range(3):
        p = replace(at(dtype, seed), preset="mixtral-8x7b")
        inputs = STORES.inputs(p)
        verdict = STORES.judge(inputs, {"y_RD": output(inputs, dtype, stored)}, p, Contract())
        assert verdict.status is Status.PASS
        assert verdict.detail == f"experts round {', '.join(stored) or 'nothing inside'}"
