# SPDX-License-Identifier: Apache-2.0
"""A documented fault of somebody else's is KNOWN where it shows, and excuses nothing else."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import recordings
import torch

from hal_conformance import known, suite
from hal_conformance.compare import compare
from hal_conformance.plan import Catalogue, Selection, plan
from hal_conformance.subject import Subject
from hal_conformance.verdicts import Status

FAKE = Catalogue("fake_cases")
SELECTION = Selection(("double.one[a]",), scale="tiny")
DTYPES = ("float32", "bfloat16")


@pytest.fixture(autouse=True)
def _path(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


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


def test_an_implementation_that_is_wrong_by_itself_stays_red():
    _, rows = run("wrong", "open_leaking")
    assert [rows[dtype].status for dtype in DTYPES] == [Status.FAIL_NUMERIC] * 2


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


def test_other_dtypes_and_other_verdicts_are_not_excused():
    facts = {"flags": {known.FLAG: "shown"}}
    assert known.may_excuse(facts, "bfloat16", Status.FAIL_NONFINITE)
    assert not known.may_excuse(facts, "float32", Status.FAIL_NONFINITE)
    for status in Status:
        if status not in (Status.FAIL_NUMERIC, Status.FAIL_DISCRETE, Status.FAIL_NONFINITE):
            assert not known.may_excuse(facts, "bfloat16", status)


def test_the_example_shows_the_fault_where_it_is_and_nothing_without_the_library():
    with known.avoided():
        assert not known._leaks()
        assert not torch._C._get_mkldnn_enabled()
    assert torch._C._get_mkldnn_enabled()
