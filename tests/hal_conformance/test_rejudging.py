# SPDX-License-Identifier: Apache-2.0
"""What this host finds in a recording is not lost, what it could not look at is not counted, what is not there is free."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from test_recording import OPENED, observed, recorded

from hal.contract import Contract
from hal_conformance.cases import ALL
from hal_conformance.execution.judging import Made
from hal_conformance.execution.observation import Observation
from hal_conformance.execution.plan import Catalogue, Selection, plan
from hal_conformance.execution.subject import Subject
from hal_conformance.recordings import columns, recording, sampling
from hal_conformance.recordings.bundle import Unreadable
from hal_conformance.recordings.compare import compare
from hal_conformance.recordings.rejudging import Rejudge, agreed
from hal_conformance.verdicts import Judgement, Status

GREEN = (Status.EXACT, Status.PASS, Status.PASS_AMBIGUOUS)


@pytest.mark.parametrize("claim", GREEN)
@pytest.mark.parametrize("own", [Status.NONDET, Status.DEGRADED, Status.FAIL_DISCRETE])
def test_of_amber_or_red_here_and_a_green_claim_the_worse_one_stands(claim, own):
    verdict = agreed(Judgement(claim), Judgement(own, detail="what was seen"))
    assert (verdict.status, verdict.detail) == (own, f"what was seen (the recorder had {claim.value})")


@pytest.mark.parametrize("own", [*GREEN, Status.NONDET])
def test_a_red_claim_stands_whatever_is_seen_here(own):
    assert agreed(Judgement(Status.FAIL_NUMERIC), Judgement(own)).status is Status.FAIL_NUMERIC
    assert agreed(Judgement(Status.NONDET), Judgement(Status.PASS)).status is Status.NONDET


def test_a_bit_of_the_second_run_that_differs_is_seen_in_what_is_held():
    def flipped(outputs):
        again = outputs["y_TD/1"].copy()
        again.view(np.uint32)[0, 0] ^= 1  # the first element is held
        return {**outputs, "y_TD/1": again}

    selection = Selection(("determinism.repeated[mixtral-8x7b]",), ("float32",), "tiny")
    read, honest = recorded(selection, flipped), recorded(selection)
    object.__setattr__(read.entries[0], "claim", honest.entries[0].claim)
    (row,) = compare([read]).report.results
    assert row.status is Status.NONDET


@pytest.mark.parametrize(
    ("case", "dtype"), [("fp8.cast_e4m3fn", "bfloat16"), ("router.topk_set", "float32"), ("contract.ties", "float32")]
)
def test_codes_and_choices_count_as_judged(case, dtype):
    (entry,) = recorded(Selection((case,), (dtype,), "tiny")).entries[:1]
    rejudge = Rejudge(entry.task)
    assert rejudge(entry, Contract()).status.colour == "green"
    assert rejudge.coverage.judged >= 24  # of four tokens, where logits are sampled


def test_nan_where_the_oracle_cannot_know_is_not_judged():
    selection = Selection(("layer.forward_free[qwen2-moe]",), ("float32",), "tiny")

    def nan(outputs):
        weights = outputs["weights_TK"].copy()
        weights[:] = np.nan
        return {**outputs, "weights_TK": weights}

    counted = []
    for change in (lambda outputs: outputs, nan):
        (entry,) = recorded(selection, change).entries
        rejudge = Rejudge(entry.task)
        rejudge(entry, Contract())
        counted.append(rejudge.coverage.judged)
    assert 100 < counted[1] <= counted[0]


def test_no_inputs_are_made_for_what_has_no_outputs(monkeypatch):
    selection = Selection(("experts.backward",), ("float32",), "tiny")
    seen = [Observation(task, Status.UNSUPPORTED, "it has none", {}, {}) for task in plan(selection, ALL)]
    data = recording.write(Subject("cpu"), OPENED, selection, seen)
    monkeypatch.setattr(Made, "of", lambda task: pytest.fail("inputs were made"))
    found = compare([recording.parse(data, "a", Catalogue())])
    assert {row.status for row in found.report.results} == {Status.UNSUPPORTED}


def test_more_elements_than_any_recording_holds_are_refused(monkeypatch):
    selection = Selection(("router.topk_set[mixtral-8x7b]",), ("float32",), "tiny")
    (task, *_) = plan(selection, ALL)
    seen = observed(task)
    large = {**seen.outputs, "experts_TK": np.zeros((1000, 1000), np.int64)}
    data = recording.write(Subject("cpu"), OPENED, selection, [replace(seen, outputs=large)])
    assert len(data) < 50_000
    monkeypatch.setattr(columns, "MAX_HELD", 100_000)
    with pytest.raises(Unreadable, match="hold more than 100000 elements"):
        recording.parse(data, "a", Catalogue())


def test_nan_that_is_expected_counts_where_everything_is_held(monkeypatch):
    monkeypatch.setattr(sampling, "WHOLE", 4096)
    monkeypatch.setattr(sampling, "grid", sampling.grid.__wrapped__)  # and not what it remembers
    (entry,) = recorded(Selection(("gradients.clip_nan",), ("float32",), "tiny")).entries
    rejudge = Rejudge(entry.task)
    assert rejudge(entry, Contract()).status.colour == "green"
    assert rejudge.coverage.judged == rejudge.coverage.shown > 0


def test_what_the_contract_does_not_promise_is_no_agreement_and_was_not_judged():
    (entry,) = recorded(Selection(("attention.heads_cancel",), ("float32",), "tiny")).entries
    rejudge = Rejudge(entry.task)
    assert rejudge(entry, replace(Contract(), matmul={})).status is Status.UNSUPPORTED
    assert rejudge.coverage.judged == 0


def test_inputs_that_are_others_were_not_judged():
    (entry,) = recorded(Selection(("attention.heads_cancel",), ("float32",), "tiny")).entries
    rejudge = Rejudge(entry.task)
    rejudge(replace(entry, hashes=dict.fromkeys(entry.hashes, "0" * 64)), Contract())
    assert rejudge.coverage.judged == 0
