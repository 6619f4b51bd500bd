# SPDX-License-Identifier: Apache-2.0
"""A device is held to what its backend declares; where that is assumed, to what is measured."""

from dataclasses import replace

import pytest

import hal
from hal.contract import Contract
from hal_conformance import suite
from hal_conformance.execution import subject
from hal_conformance.execution.plan import Catalogue, Selection, plan
from hal_conformance.execution.subject import Subject
from hal_conformance.recordings import recording
from hal_conformance.recordings.compare import compare
from hal_conformance.report import table

SELECTION = Selection(("layer.unaligned", "head.norm"), ("float16",), "tiny")
TASKS = plan(SELECTION, Catalogue().all())


@pytest.mark.parametrize(("basis", "colour"), [("known", "red"), ("assumed", "green")])
def test_a_promise_that_is_known_must_be_kept_and_one_that_is_assumed_is_measured(basis, colour):
    report = suite.run([Subject(basis)], TASKS, SELECTION, opener="fake_cases:open_silent")
    assert {row.status.colour for row in report.results} == {colour}, report.results
    (opened,) = report.subjects
    out = table.console()
    with out.capture() as capture:
        table.show(report, out)
    sentence = "float16: the contract promises all operands, those below 6.10352e-05 count as zero"
    for text in (opened["contract"]["evidence"], " ".join(capture.get().split())):
        assert (sentence in text) == (basis == "assumed"), text
    assert opened["contract"]["basis"] == {"known": "known", "assumed": "measured"}[basis]


def test_a_recording_is_judged_by_what_its_recorder_measured():
    data, _ = suite.record(Subject("assumed"), TASKS, SELECTION, opener="fake_cases:open_silent")
    read = recording.parse(data, "a.st", Catalogue())
    assert read.facts["contract"]["basis"] == "measured"
    assert read.facts["contract"]["matmul"]["float16"]["flushes_below"] == 2.0**-14
    assert {row.status.colour for row in compare([read]).report.results} == {"green"}


def test_what_is_known_is_not_measured(monkeypatch):
    monkeypatch.setattr("hal.probe.measured.measured_contract", lambda device: pytest.fail("it was measured"))
    with hal.open_device("cpu") as device:
        assert subject.contract(device) is device.contract
        assert device.contract.basis == "known"


def test_a_device_that_cannot_be_measured_is_held_to_what_is_assumed(monkeypatch):
    def fails(device):
        raise RuntimeError("the driver\nis gone")

    monkeypatch.setattr("hal.probe.measured.measured_contract", fails)
    with hal.open_device("cpu") as device:
        device.contract = Contract(evidence="a guess", basis="assumed")
        found = subject.contract(device)
    assert found == replace(device.contract, evidence="a guess; not measured: RuntimeError: the driver is gone")
