# SPDX-License-Identifier: Apache-2.0
"""Each detector sees what it is for, and stays silent on honest errors at the edge of what is admitted."""

import ml_dtypes
import numpy as np
import pytest

from hal_conformance import inputs as make
from hal_conformance.numerics.bounds import Bounded
from hal_conformance.numerics.budget import SHARE, bias_threshold, level, rms_threshold
from hal_conformance.numerics.detectors import ExactMeter, Finding, Meter, discrete, exact, judge, merge, structure
from hal_conformance.verdicts import Status, worst

SHAPE = (64, 64)


def expected(dtype="float32"):
    """Values from 1 to 2, known but for their storage: the errors are uniform within half an ulp."""
    value = 1.0 + make.words(0, "value", *SHAPE) / 2.0**32
    return Bounded.exact(value).stored(dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_correct_rounding_passes_and_comes_close_to_the_bound(dtype):
    want = expected(dtype)
    finding = judge("y", make.store(want.value, dtype), want, bias=True)
    assert finding.status is Status.PASS
    assert 0.9 < finding.margin <= 1
    assert 0.8 < finding.rms < 1
    assert abs(finding.bias) < 1


def test_one_element_beyond_its_bound_is_a_failure_that_names_it():
    want = expected()
    got = make.store(want.value, "float32")
    got[17, 5] += np.float32(1e-3)
    finding = judge("y", got, want)
    assert finding.status is Status.FAIL_NUMERIC
    assert finding.margin > 1000
    assert "[17, 5]" in finding.detail
    assert "in 1 rows (17)" in finding.detail


def test_truncation_within_the_bound_is_degraded_by_its_bias():
    want = expected("bfloat16")
    wide = Bounded(want.value, 2 * want.bound, 4 * want.var)  # a bound that a truncated store stays within
    cut = (want.value.astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)
    finding = judge("y", make.store(cut, "bfloat16"), wide, bias=True)
    assert finding.status is Status.DEGRADED
    assert finding.bias < -1
    assert judge("y", make.store(want.value, "bfloat16"), wide, bias=True).status is Status.PASS


def test_errors_twice_as_large_as_their_deviation_are_degraded_by_their_rms():
    want = expected()
    error = 2 * np.sqrt(want.var) * make.normal(1, "error", *SHAPE)
    wide = Bounded(want.value, 10 * want.bound, want.var)
    finding = judge("y", want.value + error, wide)
    assert finding.status is Status.DEGRADED
    assert finding.rms > 1.5
    # With four independent errors, twice the deviation proves nothing.
    assert judge("y", want.value + error, wide, independent=4).status is Status.PASS


def test_thresholds_are_not_exceeded_by_independent_errors_more_often_than_they_say():
    """10,000 draws of the largest admitted variance; at one in 10 ** 11 each, none may exceed."""
    errors = make.normal(2, "draws", 10_000, 64)
    assert np.sqrt((errors**2).mean(1)).max() < rms_threshold(64, 64)
    assert np.abs(errors.sum(1) / 8).max() < bias_threshold()
    assert np.abs(errors).max() < level(errors.size).deviations
    assert SHARE < 1e-10


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_where_a_number_is_expected_is_its_own_verdict(bad):
    want = expected()
    got = make.store(want.value, "float32")
    got[3, 4] = bad
    finding = judge("y", got, want)
    assert finding.status is Status.FAIL_NONFINITE
    assert "[3, 4]" in finding.detail


def test_a_nan_is_right_where_the_oracle_has_one():
    want = expected()
    value = want.value.copy()
    value[0, 0] = np.nan
    got = make.store(value, "float32")
    assert judge("y", got, Bounded(value, want.bound, want.var)).status is Status.PASS
    got[0, 0] = 1.0
    assert judge("y", got, Bounded(value, want.bound, want.var)).status is Status.FAIL_NONFINITE


def test_overflow_is_admitted_only_where_the_bound_reaches_beyond_the_largest_number():
    edge = Bounded.exact(np.array([65519.0, 65500.0, 100.0])).stored("float16")
    got = np.array([np.inf, 65504.0, 100.0], np.float16)
    assert judge("y", got, edge).status is Status.PASS
    got = np.array([65504.0, 65504.0, np.inf], np.float16)
    assert judge("y", got, edge).status is Status.FAIL_NONFINITE


def test_an_empty_array_passes():
    want = Bounded.exact(np.zeros((0, 4))).stored("float32")
    assert judge("y", np.zeros((0, 4), np.float32), want).status is Status.PASS


def test_exact_sees_one_bit_and_takes_both_zeros_for_one():
    want = np.array([0.0, 1.0, np.nan], np.float32)
    assert exact("y", np.array([-0.0, 1.0, np.nan], np.float32), want).status is Status.EXACT
    finding = exact("y", np.array([0.0, np.nextafter(np.float32(1), np.float32(2)), np.nan], np.float32), want)
    assert (finding.status, finding.exact) == (Status.FAIL_NUMERIC, 1 / 3)
    assert discrete("ids", np.array([1, 3]), np.array([1, 2])).status is Status.FAIL_DISCRETE


def test_the_verdict_is_the_worst_of_the_findings_with_its_detail():
    judgement = merge(
        [Finding(Status.PASS, 0.9), Finding(Status.DEGRADED, 0.1, 1.2, -3.0, detail="b"), Finding(Status.EXACT)]
    )
    assert judgement.status is Status.DEGRADED
    assert judgement.margin == 0.9
    assert judgement.detectors == {"bound": 0.9, "rms": 1.2, "bias": -3.0, "exact": None}
    assert judgement.detail == "b"


@pytest.mark.parametrize(
    "outputs",
    [
        {},
        {"y": [1.0]},
        {"y": np.zeros(3, np.float32)},
        {"y": np.zeros((2, 2), np.float64)},
        {"y": np.zeros((2, 2), object)},
    ],
)
def test_wrong_keys_types_shapes_and_dtypes_are_structure(outputs):
    assert structure(outputs, {"y": ((2, 2), "float32")}).status is Status.FAIL_STRUCTURE


def test_nothing_judged_is_invalid_and_an_unknown_status_too():
    assert worst([]) is Status.INVALID
    assert Status.parse("FINE") is Status.INVALID
    assert {status.colour for status in Status} == {"green", "amber", "red", "neutral"}


def test_an_array_judged_in_parts_is_judged_as_a_whole():
    rng = np.random.default_rng(0)
    value = rng.normal(size=(6, 5))
    want = Bounded.exact(value).stored("bfloat16")
    got = value.astype(ml_dtypes.bfloat16)
    for at in (None, (4, 2)):
        if at is not None:
            got[at] = 7.0
        meter, exactly = Meter("y", independent=6, bias=True), ExactMeter("y")
        for first in (0, 2, 3):
            part = slice(first, {0: 2, 2: 3, 3: 6}[first])
            meter.add(got[part], Bounded(value[part], want.bound[part], want.var[part]), first)
            exactly.add(got[part], value[part].astype(ml_dtypes.bfloat16), first)
        whole = judge("y", got, want, independent=6, bias=True)
        parts = meter.finding()
        assert (parts.status, parts.margin, parts.detail) == (whole.status, whole.margin, whole.detail)
        assert parts.rms == pytest.approx(whole.rms)
        assert exactly.finding() == exact("y", got, value.astype(ml_dtypes.bfloat16))
