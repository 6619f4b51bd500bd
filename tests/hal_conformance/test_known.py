# SPDX-License-Identifier: Apache-2.0
"""A documented fault of somebody else's is KNOWN where it shows, and excuses nothing else."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import recordings
import torch

from hal.contract import Contract
from hal_conformance import arrays, known, suite
from hal_conformance.cases import ALL
from hal_conformance.compare import compare
from hal_conformance.plan import Catalogue, Selection, plan
from hal_conformance.subject import Subject
from hal_conformance.verdicts import Status

INNER_LENGTHS = known.inner_lengths
FAKE = Catalogue("fake_cases")
SELECTION = Selection(("double.one[a]",), scale="tiny")
DTYPES = ("float32", "bfloat16")


@pytest.fixture(autouse=True)
def _path(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setattr(known, "CASES", {"double.one"})
    monkeypatch.setattr(known, "inner_lengths", lambda task: {33})


def run(impl, opener):
    tasks = plan(SELECTION, FAKE.all())
    told = []
    report = suite.run([Subject("fake:0", f"fake_cases:{impl}")], tasks, SELECTION, catalogue=FAKE,
                       opener=f"fake_cases:{opener}", on_result=lambda _, row: told.append(row))  # fmt: skip
    assert sorted(map(str, told)) == sorted(map(str, report.results))  # each once, as it ends
    return report, {row.dtype: row for row in report.results}


def test_what_is_green_without_the_fault_is_known_and_amber():
    report, rows = run("leaking", "open_leaking")
    assert [rows[dtype].status for dtype in DTYPES] == [Status.EXACT, Status.KNOWN]
    assert rows["bfloat16"].detail.startswith(
        "EXACT without oneDNN, whose fault it is (https://github.com/uxlfoundation/"
    )
    assert "; with it FAIL-" in rows["bfloat16"].detail
    assert (report.exit_status(), report.exit_status(strict=True)) == (0, 1)
    assert report.subjects[0]["flags"][known.FLAG] == "shown"


@pytest.mark.parametrize("impl", ["wrong", "wrong_with_the_library", "leaking_once", "leaking_at_times"])
def test_an_implementation_that_is_wrong_by_itself_stays_red(impl):
    _, rows = run(impl, "open_leaking")
    assert rows["bfloat16"].status.colour == "red"


def test_a_case_in_which_nothing_could_leak_stays_red(monkeypatch):
    monkeypatch.setattr(known, "CASES", {"double.two"})
    _, rows = run("leaking", "open_leaking")
    assert rows["bfloat16"].status.colour == "red"


def test_the_cases_that_may_show_it_exist():
    names = {case.name for case in ALL}
    assert {"experts.nonfinite_rows", "experts.nan_backward", "layer.degenerate", "layer.sliced"} <= names


@pytest.mark.parametrize(("length", "status"), [(32, "FAIL-NONFINITE"), (64, "FAIL-NONFINITE"), (48, "KNOWN")])
def test_a_product_whose_length_cannot_have_it_stays_red(monkeypatch, length, status):
    monkeypatch.setattr(known, "inner_lengths", lambda task: {8, length})
    _, rows = run("leaking", "open_leaking")
    assert rows["bfloat16"].status.colour == ("amber" if status == "KNOWN" else "red")


def test_what_leaks_once_only_stays_red_whenever_it_stops():
    _, rows = run("leaking_twice", "open_leaking")
    assert rows["bfloat16"].status.colour == "red"


def test_the_inner_lengths_are_those_of_the_weights_and_of_a_backward_pass_all():
    tasks = plan(Selection(("experts.nonfinite_rows[ling-lite]", "experts.nan_backward[ling-lite]"), ("bfloat16",),
                           "small"), ALL)  # fmt: skip
    lengths = {task.case.name: INNER_LENGTHS(task) for task in tasks}
    forward, backward = lengths["experts.nonfinite_rows"], lengths["experts.nan_backward"]
    assert all(K % 32 == 0 for K in forward if K > 32)
    assert any(K > 32 and K % 32 for K in backward)


def test_where_the_fault_does_not_show_it_excuses_nothing():
    report, rows = run("leaking", "open_sound")
    assert rows["bfloat16"].status.colour == "red"
    assert report.subjects[0]["flags"][known.FLAG] == "not shown"


def recorded(impl, opener):
    data, _ = suite.record(
        Subject("fake:0", f"fake_cases:{impl}"), plan(SELECTION, FAKE.all()), SELECTION, catalogue=FAKE,
        opener=f"fake_cases:{opener}",
    )  # fmt: skip
    return data


def test_a_recording_carries_the_evidence():
    data = recorded("leaking", "open_leaking")
    found = compare([recordings.parse(data)])
    assert [row.status for row in found.report.results] == [Status.EXACT, Status.KNOWN]
    assert found.exit_status() == 0


@pytest.mark.parametrize("flags", [{}, {known.FLAG: "not shown"}, [], "shown", {known.FLAG: ["shown"]}])
def test_a_claim_without_it_is_worth_nothing(flags):
    def change(manifest):
        manifest["flags"] = copy.deepcopy(flags)

    forged = recordings.with_manifest(recorded("leaking", "open_leaking"), change)
    found = compare([recordings.parse(forged)])
    assert [row.status.colour for row in found.report.results] == ["green", "red"]


def facts(**changed):
    return {"info": {"torch_device": "cpu"}, "versions": {"instructions": "amx_bf16, avx2"}, "flags": {known.FLAG: "shown"},
            **changed}  # fmt: skip


def test_only_a_cpu_with_amx_can_have_it_and_only_in_bfloat16():
    assert known.shows(facts(), "bfloat16")
    assert known.shows(facts(versions={"instructions": None}), "bfloat16")
    assert not known.shows(facts(), "float32")
    for changed in (
        {"info": {"torch_device": "cuda:0"}}, {"versions": {"instructions": "avx2"}}, {"flags": {}}, {"flags": None},
        {"info": []}, {"versions": "amx"}, {"flags": {known.FLAG: "not shown"}},
    ):  # fmt: skip
        assert not known.shows(facts(**changed), "bfloat16"), changed


@pytest.mark.parametrize(("value", "expected"), [(np.nan, True), (np.inf, True), (7.0, False), (None, False)])
def test_the_symptom_is_nothing_but_nan_and_infinities(value, expected):
    (task,) = (task for task in plan(SELECTION, FAKE.all()) if task.params.dtype == "bfloat16")
    inputs = task.case.inputs(task.params)
    y = inputs["x"] + inputs["x"]
    if value is not None:
        y.flat[1] = value
    hashes = arrays.digests(inputs)
    assert known.is_symptom(task, Status.FAIL_NUMERIC, {"y": y}, hashes, Contract()) == expected
    assert not known.is_symptom(task, Status.CRASH, {"y": y}, hashes, Contract())
    if value is np.nan:
        y.flat[0] += 1  # and something else is wrong, too
        assert not known.is_symptom(task, Status.FAIL_NUMERIC, {"y": y}, hashes, Contract())


def test_the_example_shows_the_fault_where_it_is_and_nothing_without_the_library():
    with known.avoided():
        assert not known._leaks()
        assert not torch._C._get_mkldnn_enabled()
    assert torch._C._get_mkldnn_enabled()
