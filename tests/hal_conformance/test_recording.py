# SPDX-License-Identifier: Apache-2.0
"""What a recording holds of the real cases is judged as the whole outputs are, and no less strictly."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import recordings
import torch

from hal.contract import Contract
from hal_conformance import arrays
from hal_conformance.case import Footprint, Params
from hal_conformance.cases import ALL
from hal_conformance.execution.observation import Observation
from hal_conformance.execution.plan import Catalogue, Selection, Task, plan
from hal_conformance.execution.subject import Subject
from hal_conformance.portable import portable
from hal_conformance.recordings import bundle, recording, sampling
from hal_conformance.recordings.bundle import Unreadable
from hal_conformance.recordings.compare import compare
from hal_conformance.recordings.rejudging import Rejudge
from hal_conformance.verdicts import Judgement, Status

OPENED = {**recordings.OPENED, "contract": Contract().as_json()}
GRADIENTS = Selection(("experts.backward[mixtral-8x7b]",), ("float32",), "small")


def observed(task, change=lambda outputs: outputs):
    inputs = task.case.inputs(task.params)
    tensors = {name: arrays.to_torch(array, torch.device("cpu")) for name, array in inputs.items()}
    returned = task.case.run(portable, tensors, task.params)
    outputs = {name: arrays.from_torch(tensor) for name, tensor in returned.items()}
    return Observation(task, None, outputs=change(outputs), hashes=arrays.digests(inputs))


def recorded(selection, change=lambda outputs: outputs, name="a"):
    seen = [observed(task, change) for task in plan(selection, ALL)]
    data = recording.write(Subject("cpu"), OPENED, selection, seen)
    return recording.parse(data, name, Catalogue())


def some_tasks():
    """Return one task of every case; the dtypes take turns."""
    for number, case in enumerate(ALL):
        if "tiny" in case.scales(case.presets()[0]):
            dtypes = case.dtypes()
            yield Task(case, Params(case.presets()[0], dtypes[number % len(dtypes)], "tiny", 7))


@pytest.mark.parametrize("task", list(some_tasks()), ids=str)
def test_what_is_held_of_an_honest_device_is_judged_as_the_whole_is(task):
    selection = Selection((task.name,), (task.params.dtype,), "tiny", 7)
    data = recording.write(Subject("cpu"), OPENED, selection, [observed(task)])
    read = recording.parse(data, "a", Catalogue())
    claim = read.entries[0].claim
    assert claim.status.colour == "green", claim.detail
    (row,) = compare([read]).report.results
    assert (row.status, row.detail) == (claim.status, claim.detail)


def test_most_elements_are_not_held_and_those_that_are_have_the_right_bits():
    (entry,) = recorded(GRADIENTS).entries
    whole = observed(entry.task).outputs
    for name, packed in entry.outputs.items():
        indices, values = packed.held()
        assert arrays.same_bits(values, whole[name].reshape(-1)[indices])
        assert packed.digest.hex() == arrays.digest(whole[name])
        assert len(packed.values) < packed.size / 50


def test_a_wrong_element_is_recorded_although_no_sample_meets_it():
    def wrong(outputs):
        gradient = outputs["dw1_EFD"].copy()
        held = set(sampling.grid("dw1_EFD", gradient.shape, 0).indices.tolist())
        index = next(i for i in range(gradient.size) if i not in held)
        gradient.reshape(-1)[index] += 1.0
        return {**outputs, "dw1_EFD": gradient}

    read = recorded(GRADIENTS, wrong)
    assert read.entries[0].claim.status is Status.FAIL_NUMERIC
    assert len(read.entries[0].outputs["dw1_EFD"].worst)
    (row,) = compare([read]).report.results
    assert row.status is Status.FAIL_NUMERIC


def test_the_recorder_need_not_be_believed():
    def wrong(outputs):
        return {name: array * np.float32(1.25) for name, array in outputs.items()}

    read = recorded(GRADIENTS, wrong)
    (entry,) = read.entries
    object.__setattr__(entry, "claim", recorded(GRADIENTS).entries[0].claim)
    (row,) = compare([read]).report.results
    assert row.status is Status.FAIL_NUMERIC
    assert row.detail.endswith("(the recorder had PASS)")


def test_a_claim_that_what_is_held_does_not_show_stands():
    def swapped(outputs):
        y = outputs["y_RD"].copy()
        rows = [r for r in range(len(y)) if r not in sampling.grid("y_RD", y.shape, 0).rows][:2]
        y[rows] = y[rows[::-1]]
        return {**outputs, "y_RD": y}

    good, bad = recorded(GRADIENTS), recorded(GRADIENTS, swapped, "b")
    for packed in bad.entries[0].outputs.values():
        object.__setattr__(packed, "worst", packed.worst[:0])
        object.__setattr__(packed, "values", packed.held()[1])
    found = compare([good, bad])
    assert [row.status for row in found.report.results] == [Status.PASS, Status.FAIL_NUMERIC]
    assert "the recorder's verdict; the elements that it recorded are PASS" in found.report.results[1].detail
    (difference,) = found.differences
    assert (difference.output, difference.share) == ("y_RD", 0.0)
    assert difference.detail.startswith("rows ")


def test_nan_where_the_manifest_says_finite_is_refused():
    selection = Selection(("double.one[a]",), ("float32",), "tiny")
    data = recordings.make(selection, change=lambda y: y * np.float32(np.nan))

    def lie(manifest):
        manifest["outputs"][0][4] = True

    assert recordings.parse(data).entries[0].claim.status is Status.FAIL_NUMERIC
    with pytest.raises(Unreadable, match="said to be finite"):
        recordings.parse(recordings.with_manifest(data, lie))


def test_elements_that_do_not_have_their_digest_are_refused():
    data = recordings.make()
    changed = bundle.deflate(np.float32([0, 2, 4, 6, 8, 11]).tobytes())
    forged = recordings.with_json(data, recordings.manifest_of(data), **{"outputs/values/float32": changed})
    with pytest.raises(Unreadable, match="do not have its digest"):
        recordings.parse(forged)


def test_an_output_of_a_forged_size_costs_no_memory_and_is_structure():
    selection = Selection(("losses.z[mixtral-8x7b]",), ("float32",), "tiny")
    (task,) = plan(selection, ALL)

    def forge(manifest):
        line = next(line for line in manifest["outputs"] if line[0] == "dlogits_TE")
        line[2] = [12, 2**28]  # of few rows all are held

    seen = observed(task)
    grown = np.zeros((200, 8), np.float32)
    seen = Observation(task, None, outputs={**seen.outputs, "dlogits_TE": grown}, hashes=seen.hashes)
    data = recording.write(Subject("cpu"), OPENED, selection, [seen])
    with pytest.raises(Unreadable, match="too short"):
        recording.parse(recordings.with_manifest(data, forge), "a", Catalogue())
    (entry,) = recording.parse(data, "a", Catalogue()).entries
    packed = entry.outputs["dlogits_TE"]
    object.__setattr__(packed, "shape", (2**31, 2**9))
    assert packed.array(1 << 20).strides == (0, 0)
    (row,) = compare([recording.parse(data, "a", Catalogue())]).report.results
    assert row.status is Status.FAIL_STRUCTURE


@pytest.mark.parametrize(
    "case",
    ["experts.backward[ling-lite]", "experts.random[ling-lite]", "layer.backward_free[ling-lite]",
     "layer.capacity[ling-2.0-mini]", "determinism.repeated[qwen2-moe]"],
)  # fmt: skip
def test_experts_that_nothing_held_depends_on_are_not_computed_and_nothing_else_is_lost(case, monkeypatch):
    (entry,) = recorded(Selection((case,), ("bfloat16",), "tiny", 1)).entries
    counted = []
    for needed in (Rejudge._needed, lambda *_: None):
        monkeypatch.setattr(Rejudge, "_needed", needed)
        rejudge = Rejudge(entry.task)
        verdict = rejudge(entry, Contract())
        counted.append((verdict.status.colour, rejudge.coverage.judged))
    assert counted[0] == counted[1]
    assert counted[0][0] == "green"
    assert counted[0][1] > 60


def test_the_order_in_which_a_case_names_its_arrays_changes_no_byte():
    seen = observed(*(Task(entry.task.case, entry.task.params) for entry in recorded(GRADIENTS).entries))
    other = replace(
        seen, outputs=dict(reversed(seen.outputs.items())), hashes=dict(reversed(list(seen.hashes.items())))
    )
    first, second = (recording.write(Subject("cpu"), OPENED, GRADIENTS, [one]) for one in (seen, other))
    assert first == second


def test_what_does_not_fit_into_this_hosts_memory_is_the_recorders_word(monkeypatch):
    (entry,) = recorded(GRADIENTS).entries
    monkeypatch.setattr(type(entry.task.case), "footprint", lambda *_: Footprint(1 << 60, 0))
    rejudge = Rejudge(entry.task)
    verdict = rejudge(entry, Contract())
    assert verdict.status is Status.PASS
    assert verdict.detail.startswith("(the recorder's verdict; here it needs about ")
    assert rejudge.coverage.judged == 0


def test_digests_of_inputs_that_have_another_shape_are_refused():
    for shape in ((1, 3200), (3200,), (100, 31)):
        data = recordings.with_json(
            recordings.make(), recordings.manifest_of(recordings.make()), **{"inputs/sha256": np.zeros(shape, np.uint8)}
        )
        with pytest.raises(Unreadable, match=r"digests of its inputs have another shape than \[n, 32\]"):
            recordings.parse(data)


@pytest.mark.parametrize("name", ["info", "contract", "kernels"])
def test_a_manifest_that_is_nested_without_end_is_refused(name):
    def change(manifest):
        for _ in range(20):
            manifest[name] = {"x": [manifest[name]]}

    with pytest.raises(Unreadable, match="nested more than 16 deep"):
        recordings.parse(recordings.with_manifest(recordings.make(), change))


def test_a_manifest_of_long_names_over_many_others_takes_little_memory():
    def change(manifest):
        manifest["kernels"] = {"k" * 100_000: {str(n): n for n in range(40_000)}}

    hostile = recordings.parse(recordings.with_manifest(recordings.make(), change))
    tracemalloc.start()
    try:
        found = compare([hostile, recordings.parse(recordings.make(), "b")])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 200 << 20  # 4 GB of names, if each were whole
    assert all(len(fact.name) <= 80 for fact in found.facts)


def test_one_large_output_under_many_names_takes_the_memory_of_one(monkeypatch):
    entry = recordings.parse(recordings.make()).entries[0]
    packed = next(iter(entry.outputs.values()))
    large = replace(packed, shape=(64, 1024), grid=sampling.grid("y", (64, 1024), 0), values=np.zeros(0, np.float32))
    large = replace(large, values=np.zeros(large.grid.size, np.float32))
    seen = {}
    monkeypatch.setattr("hal_conformance.recordings.rejudging.judge_outputs", lambda task, outputs, *_: seen.update(outputs) or
                        Judgement(Status.PASS))  # fmt: skip
    rejudge = Rejudge(entry.task)
    monkeypatch.setattr(rejudge, "_limit", 3 * large.size * 4)
    rejudge(replace(entry, outputs={f"o{n}": large for n in range(100)}), Contract())
    assert len(seen) == 100
    assert sum(array.flags.c_contiguous for array in seen.values()) == 3  # the others have one element's memory


def test_a_trajectory_beyond_all_honest_runs_is_degraded_in_a_recording_too_and_nothing_else_is():
    claim = Judgement(Status.DEGRADED, 1.25, {"bound": 1.25}, "further out than all 199 honest runs")
    selection = Selection(("trajectory.band_ling", "norm.rms"), ("float32",), "tiny")
    tasks = {task.case.family: task for task in plan(selection, ALL)}
    written = {family: recording._claim_to_json(task, claim) for family, task in tasks.items()}
    assert recording._claim_from_json(written["trajectory"], tasks["trajectory"]).detectors["bound"] == 1.25
    with pytest.raises(Unreadable, match="contradicts itself"):
        recording._claim_from_json(written["norm"], tasks["norm"])
    passed = recording._claim_to_json(tasks["trajectory"], replace(claim, status=Status.PASS))
    with pytest.raises(Unreadable, match="contradicts itself"):
        recording._claim_from_json(passed, tasks["trajectory"])


def test_outputs_of_nothing_but_zeros_are_one_array_whether_held_whole_or_not():
    """`weights_TK` is held whole, `dweights_TK` of the same shape is sampled: a kernel that did not launch leaves both."""
    selection = Selection(("router.long[*]", "combine.long_backward[*]"), ("float32",), "tiny")
    zeros = lambda outputs: {name: np.zeros_like(array) for name, array in outputs.items()}  # noqa: E731
    found = recorded(selection, zeros)
    held = [(packed.shape, packed.grid is None) for entry in found.entries for packed in entry.outputs.values()]
    assert any((shape, True) in held and (shape, False) in held for shape, _ in held)
    assert {row.status.colour for row in compare([found]).report.results} == {"red"}


@pytest.mark.parametrize("rms", [1.0 + 1e-9, 1.0000004, 1.2345678])
def test_a_verdict_just_beyond_its_limit_is_still_beyond_it_when_it_is_read(rms):
    task = next(some_tasks())
    found = Judgement(Status.DEGRADED, 0.5, {"bound": 0.5, "rms": rms, "bias": None, "exact": None})
    claim = recording._claim_from_json(recording._claim_to_json(task, found), task)
    assert claim.detectors["rms"] > 1.0
    assert claim.detectors["rms"] == pytest.approx(rms, abs=5e-6)  # half of the sixth digit
