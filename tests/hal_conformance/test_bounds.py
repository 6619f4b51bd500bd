# SPDX-License-Identifier: Apache-2.0
"""Honest orders of summation never exceed the bound; known wrong arithmetic does."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hal.contract import Arithmetic
from hal_conformance import inputs as make
from hal_conformance.case import DTYPES, SCALES, Params
from hal_conformance.cases import ALL, step
from hal_conformance.cases.sized import TokenCounts
from hal_conformance.cases.step import expected_structure
from hal_conformance.numerics.bounds import Bounded, flushed, half_ulp, matmul, positive_sum, sigmoid, softmax
from hal_conformance.numerics.budget import FALSE_ALARMS_PER_RUN, SHARE, TESTS_PER_RUN, level, rms_threshold


def summed(a, b, blocks, seed):
    """[M, K] @ [K, N] in float32: K in a random order, each block in sequence, blocks added in sequence."""
    order = make.permutation(seed, "order", a.shape[1])
    parts = []
    for block in np.array_split(order, blocks):
        total = np.zeros((len(a), b.shape[1]), np.float32)
        for k in block:
            total = total + a[:, k : k + 1] * b[k : k + 1]
        parts.append(total)
    result = parts[0]
    for part in parts[1:]:
        result = result + part
    return result


@given(
    seed=st.integers(0, 2**32 - 1),
    inner=st.integers(1, 300),
    blocks=st.integers(1, 16),
    kind=st.sampled_from(["normal", "positive", "heavy"]),
)
def test_no_order_of_summation_exceeds_the_bound(seed, inner, blocks, kind):
    a, b = make.normal(seed, "a", 8, inner), make.normal(seed, "b", inner, 8)
    if kind == "positive":
        a, b = np.abs(a), np.abs(b)
    elif kind == "heavy":
        a = make.activations(seed, "a", 8, inner)
    a, b = a.astype(np.float32), b.astype(np.float32)
    expected = matmul(a.astype(np.float64), b.astype(np.float64), Arithmetic(), level(64)).stored("float32")
    error = np.abs(summed(a, b, min(blocks, inner), seed) - expected.value)
    assert (error <= expected.bound).all()


def test_the_bound_is_not_loose_and_bfloat16_accumulation_exceeds_it():
    a, b = make.normal(0, "a", 64, 256).astype(np.float32), make.normal(0, "b", 256, 64).astype(np.float32)
    expected = matmul(a.astype(np.float64), b.astype(np.float64), Arithmetic(), level(4096))
    honest = np.abs(summed(a, b, 1, 0) - expected.value) / expected.bound
    assert 1 / 14 < honest.max() < 1, "measured elsewhere: the largest honest error is within 14 times of the bound"
    low = np.zeros((64, 64), np.float32)
    for k in range(256):
        low = make.store(low + a[:, k : k + 1] * b[k : k + 1], "bfloat16").astype(np.float32)
    assert (np.abs(low - expected.value) / expected.bound).max() > 100


def test_a_truncating_contract_admits_truncation_and_a_rounding_one_does_not():
    a, b = np.abs(make.normal(1, "a", 32, 512)), np.abs(make.normal(1, "b", 512, 32))
    a, b = a.astype(np.float32), b.astype(np.float32)
    total = np.zeros((32, 32))
    for k in range(512):
        exact = total + a[:, k : k + 1].astype(np.float64) * b[k : k + 1]
        m, e = np.frexp(exact)
        total = np.ldexp(np.trunc(np.ldexp(m, 24)), e - 24)
    wide = (a.astype(np.float64), b.astype(np.float64))
    assert (np.abs(total - wide[0] @ wide[1]) > matmul(*wide, Arithmetic(), level(1024)).bound).any()
    admitted = matmul(*wide, Arithmetic(rounding="truncate"), level(1024))
    assert (np.abs(total - admitted.value) <= admitted.bound).all()


@given(seed=st.integers(0, 2**32 - 1), n=st.sampled_from([8, 60, 256]), size=st.sampled_from([0.1, 3.0, 30.0]))
def test_float32_softmax_and_sigmoid_stay_within_their_bounds(seed, n, size):
    x = (make.normal(seed, "x", 16, n) * size).astype(np.float32)
    e = np.exp(x - x.max(1, keepdims=True))
    p = softmax(x.astype(np.float64), level(x.size)).stored("float32")
    assert (np.abs(e / e.sum(1, keepdims=True, dtype=np.float32) - p.value) <= p.bound).all()
    s = sigmoid(x.astype(np.float64)).stored("float32")
    with np.errstate(over="ignore"):
        got = 1 / (1 + np.exp(-x))
    assert (np.abs(got - s.value) <= s.bound).all()


@given(value=st.floats(-1e30, 1e30, allow_nan=False), dtype=st.sampled_from(["float32", "bfloat16"]))
def test_rounding_to_storage_is_within_half_an_ulp(value, dtype):
    stored = float(make.store(np.array([value]), dtype)[0])
    single = float(np.float32(value))  # to bfloat16 by way of float32
    assert abs(stored - single) <= half_ulp(np.array([value]), dtype)[0] or dtype == "float32"
    assert Bounded.exact(np.array([value])).stored(dtype).bound[0] == half_ulp(np.array([value]), dtype)[0]


def test_stagnation_of_skewed_positive_terms_is_admitted():
    terms = np.concatenate([[1.0], np.full(2**16, 2.0**-26)])
    total = np.float32(0)
    for t in terms.astype(np.float32)[:4097]:  # each small term is lost whole
        total = np.float32(total + t)
    part = terms[:4097]
    assert abs(float(total) - part.sum()) / part.sum() <= positive_sum(part.sum(), part, 0, level(1))


def test_the_budget_covers_the_largest_run():
    """Three statistical tests on each array of a result, and at most nine arrays; a training step shows hundreds, and a sweep over
    token counts 32 times as many."""
    results = sum(len(case.presets()) * len(case.dtypes()) for case in ALL)
    steps = sum(
        len(case.dtypes()) * len(expected_structure(case.model, case.recipe(Params("ling-lite", "float32", "tiny")), "float32"))
        for case in step.CASES
    )  # fmt: skip
    sweeps = 32 * sum(len(case.presets()) * len(case.dtypes()) for case in ALL if isinstance(case, TokenCounts))
    assert ((results + sweeps) * 9 + steps) * 3 <= TESTS_PER_RUN
    assert pytest.approx(FALSE_ALARMS_PER_RUN) == SHARE * TESTS_PER_RUN
    assert SCALES == ("tiny", "small", "full")
    assert DTYPES == ("float32", "bfloat16", "float16")


def test_the_rms_threshold_falls_with_the_number_of_elements():
    thresholds = [rms_threshold(n, n) for n in (1, 16, 256, 4096, 2**20)]
    assert thresholds == sorted(thresholds, reverse=True)
    assert 1 < thresholds[-1] < 1.01


@given(seed=st.integers(0, 2**32 - 1), inner=st.integers(1, 40))
@settings(max_examples=60)
def test_what_a_unit_flushes_is_never_more_than_its_contract_says(seed, inner):
    """Exact products of operands of which small ones are zero: the error is what was lost, and nothing else."""
    rng = np.random.default_rng(seed)
    below = 2.0**-14
    a, b = (rng.normal(size=shape) * 2.0 ** rng.integers(-20, 3, shape) for shape in ((4, inner), (inner, 5)))
    rule = Arithmetic(flushes_below=below)
    # Of this test's own sums in float64, of which there are three.
    rounding = 3 * (inner + 1) * 2.0**-53 * (np.abs(a) + 1) @ np.abs(b)
    error = np.abs(a @ b - np.where(np.abs(a) < below, 0, a) @ np.where(np.abs(b) < below, 0, b)) - rounding
    lost = flushed(a, b, rule)
    assert (error <= (0.0 if lost is None else lost)).all()
    assert (error <= matmul(a, b, rule, level(20)).bound).all()
    assert flushed(a, b, Arithmetic()) is None
    # Operands that are known to a spread only, and whose true values are anywhere in it.
    spread = 2.0**-15
    moved = a + spread * rng.uniform(-1, 1, a.shape)
    error = np.abs(moved @ b - np.where(np.abs(moved) < below, 0, moved) @ np.where(np.abs(b) < below, 0, b)) - rounding
    wider = flushed(a, b, rule, spread)
    assert (error <= (0.0 if wider is None else wider)).all()
