# SPDX-License-Identifier: Apache-2.0
"""What a recording does not hold is not judged, and neither is what follows from it."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from hal.contract import Contract
from hal.moe.presets import preset
from hal_conformance import inputs as make
from hal_conformance.case import Params
from hal_conformance.cases import by_name
from hal_conformance.numerics import absent, witness
from hal_conformance.numerics.bounds import Bounded
from hal_conformance.numerics.detectors import ExactMeter, Meter, exact, judge
from hal_conformance.oracle.layer import ROUTED, layer
from hal_conformance.recordings.packed import Packed
from hal_conformance.verdicts import Status

DTYPES = [np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.float64)]


def holed(values, holes, dtype=np.float32):
    array = np.array(absent.blank(np.shape(values), np.dtype(dtype)))
    kept = np.ones(array.shape, bool)
    kept[holes] = False
    array[kept] = np.asarray(values, dtype)[kept]
    return array


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_absent_element_is_known_after_slicing_copying_and_widening(dtype):
    array = holed(np.arange(12.0).reshape(3, 4), (1, slice(1, 3)), dtype)
    want = np.zeros((3, 4), bool)
    want[1, 1:3] = True
    assert (absent.is_absent(array) == want).all()
    assert (absent.is_absent(array.T[::-1]) == want.T[::-1]).all()
    assert (absent.is_absent(np.asarray(array[[1, 0]], np.float64)) == want[[1, 0]]).all()
    assert (absent.is_absent(np.stack([array, array])) == want).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_another_nan_is_not_absent(dtype):
    assert not absent.is_absent(np.array([np.nan, np.inf, 1.0]).astype(dtype)).any()


def test_detectors_judge_what_is_there_and_count_it():
    got = holed([[1.0, 2.0], [3.0, 5.0]], ([0, 1], [1, 0]))
    value = np.array([[1.0, 99.0], [99.0, 4.0]])
    with absent.partial() as coverage:
        assert exact("y", got, value).detail.startswith(
            "y: 1 of 2 elements differ where the result is exact, first at [1, 1]"
        )
        finding = judge("y", got, Bounded(value, np.full((2, 2), 0.5), np.ones((2, 2))))
    assert (finding.status, finding.margin, finding.rms, finding.bias) == (Status.FAIL_NUMERIC, 2.0, None, None)
    assert "1 of 2 elements beyond their bound, in 1 rows (1); worst at [1, 1]" in finding.detail
    assert (coverage.judged, coverage.shown) == (4, 8)


def test_what_follows_from_an_absent_element_is_not_judged():
    given = np.asarray(holed([1.0, 2.0], [0]), np.float64)
    with absent.partial() as coverage:
        value = 2.0 * given
        assert judge("y", np.float32([2.0, 4.0]), Bounded(value, np.abs(value) / 8, value)).status is Status.PASS
        assert exact("y", np.float32([7.0, 4.0]), value).status is Status.EXACT
    assert coverage.judged == 2


def test_without_a_recording_every_element_is_judged():
    got = holed([1.0, 2.0], [0])
    assert exact("y", got, np.array([1.0, 2.0])).status is Status.FAIL_NUMERIC


def test_the_worst_elements_are_found_in_views_and_in_copies_of_rows():
    y = np.zeros((4, 3), np.float32)
    y[3, 1] = 0.75
    w = np.zeros((6, 2, 2), np.float32)
    w[5, 0, 1], w[2, 1, 0] = 9.0, np.nan
    outputs = {"y_TD": y, "dw1_EFD": w}
    ones = np.ones((4, 3))
    with witness.watching(outputs) as seen:
        meter = Meter("y")
        meter.add(y[2:].T, Bounded(np.zeros((3, 2)), ones[:3, :2], ones[:3, :2]))
        parts = ExactMeter("dw1_EFD")
        parts.add(w[[2, 5]], np.zeros((2, 2, 2)), np.array([2, 5]))
        judge("derived", np.float32([1.0]), Bounded(np.zeros(1), np.ones(1), np.ones(1)))
    assert seen.worst("y_TD").tolist() == [10]
    assert seen.worst("dw1_EFD").tolist() == [2 * 4 + 2, 5 * 4 + 1]
    assert seen.worst("another").tolist() == []


def test_of_a_layer_only_what_is_needed_is_computed_and_that_is_the_same():
    """Tokens 2 and 5, and the weights of one expert: what the oracle says of these is what it says of a whole layer."""
    case, p = by_name("layer.backward_replayed"), Params("ling-lite", "float32", "tiny", 3)
    model, given = preset(p.preset), case.inputs(p)
    experts = model.router.num_experts
    tokens = len(given["x_TD"])
    logits = np.asarray(make.normal(0, "needed", tokens, experts), np.float32)
    chosen = np.argsort(-logits, 1)[:, : model.router.top_k].astype(np.int64)
    observed = {
        "logits_TE": logits, "scores_TE": np.full_like(logits, 1 / experts), "experts_TK": chosen,
        "weights_TK": np.full(chosen.shape, 0.25, np.float32),
    }  # fmt: skip
    expert = int(chosen[0, 0])

    def computed(needed):
        weights = {}

        def on_experts(of, gradients):
            made = gradients.weights
            weights.update({int(e): [part[at] for part in made] for at, e in enumerate(of)})

        with absent.partial(needed):
            found = layer(given, observed, model, "float32", "float32", "float32", Contract(), on_experts=on_experts)
        return found, weights

    (whole, all_weights), (part, weights) = (
        computed(needed) for needed in (None, absent.Needed(frozenset({expert}), frozenset({2, 5})))
    )
    assert set(all_weights) == set(np.unique(chosen).tolist())
    assert set(weights) == {expert}
    # Sums in another order; no number of these is computed from more than a thousand terms.
    for a, b in zip(weights[expert], all_weights[expert], strict=True):
        np.testing.assert_allclose(a.value, b.value, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(a.var, b.var, rtol=1e-9)
    for a, b in ((part.y, whole.y), (part.gradients["x_TD"], whole.gradients["x_TD"])):
        np.testing.assert_allclose(a.value[[2, 5]], b.value[[2, 5]], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(a.var[[2, 5]], b.var[[2, 5]], rtol=1e-9)
        assert not np.isnan(b.value).any()
        untouched = [t for t in range(tokens) if t not in (2, 5) and not set(chosen[t].tolist()) <= {expert}]
        assert untouched
        assert np.isnan(a.value[untouched]).all()
    assert np.isnan(part.gradients["gate_ED"].value).all(), "made of all tokens"


def test_weights_that_are_not_computed_are_counted_as_shown():
    case, p = by_name("experts.backward"), Params("mixtral-8x7b", "float32", "tiny", 3)
    given = case.inputs(p)
    outputs = {
        name: np.array(absent.blank(given[of].shape, np.dtype(np.float32)))
        for name, of in (("y_RD", "x_RD"), ("dx_RD", "x_RD"), *((f"d{name}", name) for name in ROUTED))
    }
    shown = []
    for needed in (None, absent.Needed(frozenset(), frozenset())):
        with absent.partial(needed) as coverage:
            assert case.judge(given, outputs, p, Contract()).status is Status.PASS
        shown.append((coverage.judged, coverage.shown))
    assert shown[0] == shown[1]


def test_an_output_of_no_elements_has_no_rows_however_many_it_says():
    nothing = np.empty(0, np.float32)
    forged = Packed("float32", (2**31, 0), b"", True, None, np.arange(0), nothing, np.empty(0, np.uint32))
    assert forged.held_rows().tolist() == []
