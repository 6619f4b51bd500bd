# SPDX-License-Identifier: Apache-2.0
"""A documented fault of somebody else's is KNOWN where it shows, and excuses nothing else."""

from __future__ import annotations

import copy
import dataclasses
import errno
import functools
from pathlib import Path

import numpy as np
import pytest
import recordings

from hal.contract import Contract
from hal_conformance import arrays, suite
from hal_conformance.cases import ALL
from hal_conformance.execution import known, process
from hal_conformance.execution.plan import Catalogue, Selection, plan
from hal_conformance.execution.retrial import Retrial
from hal_conformance.execution.subject import Subject
from hal_conformance.numerics.absent import blank
from hal_conformance.recordings.compare import compare
from hal_conformance.verdicts import Judgement, Status

FAKE = Catalogue("fake_cases")
SELECTION = Selection(("double.one[a]",), scale="tiny")
DTYPES = ("float32", "bfloat16")


@pytest.fixture(autouse=True)
def _path(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)


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
        "EXACT without AMX, a fault of oneDNN's (https://github.com/uxlfoundation/"
    )
    assert "; with it FAIL-" in rows["bfloat16"].detail
    assert (report.exit_status(), report.exit_status(strict=True)) == (0, 1)
    assert report.subjects[0]["flags"][known.FLAG] == "shown"


@pytest.mark.parametrize(
    "impl", ["wrong", "wrong_with_the_library", "leaking_once", "leaking_in_the_first_process",
             "leaking_in_two_processes", "leaking_at_every_second_call", "leaking_at_every_third_call", "nan_by_itself"],
)  # fmt: skip
def test_an_implementation_that_is_wrong_by_itself_stays_red(impl):
    _, rows = run(impl, "open_leaking")
    assert rows["bfloat16"].status.colour == "red"


def test_where_in_the_outputs_it_shows_may_differ_from_process_to_process():
    _, rows = run("leaking_at_times", "open_leaking")
    assert rows["bfloat16"].status is Status.KNOWN


def test_what_is_amber_without_the_fault_is_known():
    assert Retrial(Status.DEGRADED).of(Judgement(Status.FAIL_NONFINITE, detail="nan")).status is Status.KNOWN


def test_why_a_case_that_was_tried_again_stays_red_is_said():
    _, rows = run("leaking_once", "open_leaking")
    assert "nothing but NaN and infinities, as of a known fault" in rows["bfloat16"].detail
    assert "but without AMX it was FAIL-" in rows["bfloat16"].detail
    _, rows = run("leaking", "open_leaking_anyway")
    assert "but it shows in a process without AMX, too" in rows["bfloat16"].detail


@pytest.mark.parametrize("number", [2, 4])
def test_a_process_that_cannot_be_started_loses_nothing(number, monkeypatch):
    started = []
    original = process.subprocess.Popen

    def start(*args, **kwargs):
        started.append(args)
        if len(started) >= number:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        return original(*args, **kwargs)

    monkeypatch.setattr(process.subprocess, "Popen", start)
    _, rows = run("leaking", "open_leaking")
    assert [rows[dtype].status.colour for dtype in DTYPES] == ["green", "red"]
    assert "its process cannot be started" in rows["bfloat16"].detail


def test_a_case_that_multiplies_nothing_stays_red():
    (task,) = (task for task in plan(SELECTION, FAKE.all()) if task.params.dtype == "bfloat16")
    task = dataclasses.replace(task, case=dataclasses.replace(task.case, multiplies=False))
    y = np.full((2, 3), np.nan, task.case.inputs(task.params)["x"].dtype)
    assert not known.is_symptom(task, Status.FAIL_NONFINITE, {"y": y}, {}, Contract())


def test_where_the_fault_cannot_be_avoided_it_excuses_nothing():
    _, rows = run("leaking", "open_leaking_anyway")
    assert rows["bfloat16"].status.colour == "red"


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


@functools.cache
def _leaking():
    return recorded("leaking", "open_leaking")


def test_a_recording_carries_the_evidence():
    found = compare([recordings.parse(_leaking())])
    assert [row.status for row in found.report.results] == [Status.EXACT, Status.KNOWN]
    assert found.exit_status() == 0


def test_a_claim_with_an_output_of_a_huge_shape_takes_no_memory():
    (task,) = (task for task in plan(SELECTION, FAKE.all()) if task.params.dtype == "bfloat16")
    inputs = task.case.inputs(task.params)
    y = inputs["x"] + inputs["x"]
    y.flat[1] = np.nan
    outputs = {"y": y, "z": blank((1 << 20, 1 << 30), y.dtype)}
    assert known.is_symptom(task, Status.FAIL_NONFINITE, outputs, arrays.digests(inputs), Contract())


def test_what_a_recording_does_not_hold_is_no_symptom():
    (task,) = (task for task in plan(SELECTION, FAKE.all()) if task.params.dtype == "bfloat16")
    inputs = task.case.inputs(task.params)
    y = blank(inputs["x"].shape, inputs["x"].dtype).copy()
    assert not known.is_symptom(task, Status.FAIL_NUMERIC, {"y": y}, arrays.digests(inputs), Contract())


@pytest.mark.parametrize("flags", [{}, {known.FLAG: "not shown"}, [], "shown", {known.FLAG: ["shown"]}])
def test_a_claim_without_it_is_worth_nothing(flags):
    def change(manifest):
        manifest["flags"] = copy.deepcopy(flags)

    forged = recordings.with_manifest(_leaking(), change)
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


needs_the_fault = pytest.mark.skipif(not known._leaks(), reason="this processor has not the fault")
EXPERTS = Selection(
    ("experts.nonfinite_rows[mixtral-8x7b]", "experts.nan_backward[mixtral-8x7b]"), ("bfloat16",), "small"
)


def on_this_cpu(impl, selection=EXPERTS):
    return suite.run([Subject("cpu", f"known_impls:{impl}")], plan(selection, ALL), selection).results


@needs_the_fault
@pytest.mark.parametrize("impl", ["in_threads", "compiled"])
def test_whichever_way_an_honest_implementation_multiplies_it_is_not_red(impl):
    rows = on_this_cpu(impl)
    assert {row.status.colour for row in rows} <= {"green", "amber"}, rows
    assert Status.KNOWN in {row.status for row in rows}


@needs_the_fault
def test_nan_that_an_implementation_makes_by_itself_stays_red_where_the_fault_shows():
    selection = Selection(("experts.nonfinite_rows[ling-lite]",), ("bfloat16",), "small")
    (row,) = on_this_cpu("miscompiled", selection)
    assert row.status.colour == "red", row


@needs_the_fault
@pytest.mark.parametrize("seed", [0, 13])
def test_the_suite_is_never_red_for_it(seed):
    """With seed 13, the NaN of layer.nan_backward lies where a row is read that is not its own."""
    selection = Selection(("layer.nan_backward[deepseek-v2-lite]", "experts.nonfinite_rows[mixtral-8x7b]"), ("bfloat16",),
                          "small", seed)  # fmt: skip
    report = suite.run([Subject("cpu")], plan(selection, ALL), selection)
    assert {row.status.colour for row in report.results} <= {"green", "amber"}
    assert report.results[-1].status is Status.KNOWN or seed == 0
