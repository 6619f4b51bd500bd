# SPDX-License-Identifier: Apache-2.0
"""Counts, exit statuses, and what hostile text becomes in each form of the report."""

from __future__ import annotations

import io
import json
import os
import stat
import threading
import xml.etree.ElementTree as ET

import pytest
from fake_cases import ALL
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from hal.contract import Contract
from hal.errors import ConfigError
from hal_conformance import atomic
from hal_conformance.case import Params
from hal_conformance.execution.judging import result
from hal_conformance.execution.plan import Selection, Task, matches, plan
from hal_conformance.execution.subject import Subject, choose, unmet
from hal_conformance.report import table
from hal_conformance.report.document import to_json
from hal_conformance.report.junit import junit
from hal_conformance.report.markdown import markdown
from hal_conformance.report.report import NotRun, Report
from hal_conformance.text import plain
from hal_conformance.verdicts import Judgement, Status

HOSTILE = "]]>&<b>|x|`y`\x1b[2J\u202e[red]z\n\ud800\x00"


def row(status, detail="", margin=None, subject="cpu"):
    task = Task(ALL[0], Params("a", "float32", "tiny"))
    return result(task, Judgement(status, margin, {"bound": margin}, detail), subject, "torch", 0.5)


def report(*rows, **more):
    subjects = [{"id": "cpu", "impl": "torch", "info": {"name": HOSTILE},
                 "contract": Contract(evidence=HOSTILE, basis="measured").as_json()}]  # fmt: skip
    return Report("tiny", 0, subjects, list(rows), **more)


@pytest.mark.parametrize(
    ("statuses", "strict", "expected"),
    [
        ([], False, 1),
        ([Status.UNSUPPORTED, Status.SKIPPED], False, 1),
        ([Status.EXACT], False, 0),
        ([Status.PASS, Status.PASS_AMBIGUOUS, Status.SKIPPED], True, 0),
        ([Status.PASS, Status.DEGRADED], False, 0),
        ([Status.PASS, Status.DEGRADED], True, 1),
        ([Status.PASS, Status.INVALID], False, 1),
    ],
)
def test_the_exit_status_says_whether_something_was_judged_and_nothing_is_red(statuses, strict, expected):
    assert report(*map(row, statuses)).exit_status(strict=strict) == expected


def test_every_red_status_fails():
    reds = [status for status in Status if status.colour == "red"]
    assert len(reds) == 7
    assert all(report(row(Status.PASS), row(status)).exit_status() == 1 for status in reds)


def test_a_missing_device_weighs_more_than_a_red_result():
    red = row(Status.CRASH)
    assert report(red, not_run=[NotRun("rocm:0", "absent", "none", True)]).exit_status() == 3
    assert report(red, not_run=[NotRun("rocm:0", "absent", "none", False)]).exit_status() == 1
    assert report(red, required_missing=["rocm:*"]).exit_status() == 3


@pytest.mark.parametrize("margin", [float("inf"), float("nan"), -float("inf")])
def test_what_is_not_finite_is_null_in_json_and_named_in_the_detail(margin):
    found = row(Status.FAIL_NUMERIC, "far off", margin)
    document = json.loads(to_json(report(found).as_json()))
    (entry,) = document["results"]
    assert entry["margin"] is None
    assert entry["detectors"] == {"bound": None, "rms": None, "bias": None, "exact": None}
    assert entry["detail"].startswith("far off; margin is ")
    assert document["summary"] == {"FAIL-NUMERIC": 1}


def test_hostile_text_stays_text_in_every_form():
    made = report(
        row(Status.CRASH, HOSTILE), row(Status.UNSUPPORTED, HOSTILE), not_run=[NotRun(HOSTILE, "broken", HOSTILE, True)]
    )
    made.required_missing.append(HOSTILE)
    tree = ET.fromstring(junit(made))
    assert tree.find(".//failure").attrib["message"].startswith("CRASH: ]]>&<b>|x|")
    assert len(tree.findall(".//error")) == 2
    text = markdown(made).decode()
    assert "<b>" not in text
    assert "\x1b" not in text
    rows = [line for line in text.splitlines() if line.startswith("| CRASH")]
    assert rows[0].replace("\\|", "").count("|") == 6
    stream = io.StringIO()
    table.show(made, Console(file=stream, width=100, markup=False, highlight=False))
    assert "\x1b" not in stream.getvalue()
    assert "[red]z" in stream.getvalue()
    assert max(map(len, stream.getvalue().splitlines())) <= 100
    json.loads(to_json(made.as_json()))


@given(st.text() | st.binary().map(lambda b: b.decode("utf-8", "surrogateescape")))
def test_plain_text_is_one_printable_line_of_bounded_length(text):
    line = plain(text)
    assert line.isprintable()
    assert len(line) <= 500
    assert plain(line) == line or "  " in line


def test_plain_text_of_megabytes_is_cut():
    assert len(plain("x" * 10_000_000)) == 500


def test_brackets_in_a_case_name_are_not_special_in_a_glob():
    case = ALL[0]
    assert matches("double.one[a]", case, "a")
    assert matches("double.*[a]", case, "a")
    assert matches("combine", case, "a")
    assert matches("double.?ne", case, "a")
    assert not matches("double.one[ab]", case, "a")
    assert not matches("double", case, "a")


def test_the_plan_is_ordered_and_filtered():
    tasks = plan(Selection(("layer",), ("bfloat16",)), ALL)
    assert [str(task) for task in tasks] == ["double.two[a] bfloat16", "double.two[b] bfloat16"]


def info(name, simulated=False):
    from hal.backend import DeviceInfo

    return DeviceInfo(name, name, "v", None, None, None, "cpu", simulated)


def test_without_a_device_every_real_one_is_run_and_two_simulated_ones_and_all_adds_the_rest():
    found = [info("cpu"), info("sim:h200", True), info("sim:v100", True), info("sim:mi300x", True)]
    beside = [Subject(name, named=False, beside=True) for name in ("sim:h200", "sim:mi300x")]
    assert choose([], [], found) == [Subject("cpu", named=False), *beside]
    assert choose(["cpu", "cpu"], ["torch", "a:b"], []) == [Subject("cpu"), Subject("cpu", "a:b")]
    assert choose(["sim:v100", "cpu"], [], []) == [Subject("cpu"), Subject("sim:v100")]
    simulated = [Subject(f"sim:{chip}", named=False) for chip in ("h200", "v100", "mi300x")]
    assert choose(["all", "cpu"], [], found) == [Subject("cpu"), *simulated]


def test_a_required_glob_needs_a_judged_device():
    assert unmet(["rocm:*", "c*"], ["cpu"]) == ["rocm:*"]


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "f"
    path.write_bytes(b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        atomic.write(path, b"new")
    assert path.read_bytes() == b"old"
    monkeypatch.undo()
    atomic.write(path, b"new")
    assert path.read_bytes() == b"new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["f"]


def test_what_is_no_file_is_written_into_and_stays_what_it_is(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    atomic.check_writable(pipe)
    got = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    atomic.write(pipe, b"x" * 300_000)
    reader.join(timeout=30)
    assert got == [b"x" * 300_000]
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert [entry.name for entry in tmp_path.iterdir()] == ["pipe"]


def test_a_link_stays_one_and_leads_to_what_was_written(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    link, target = tmp_path / "link", tmp_path / "elsewhere" / "f"
    link.symlink_to(target)
    for content in (b"first", b"second"):
        atomic.check_writable(link)
        atomic.write(link, content)
        assert link.is_symlink()
        assert target.read_bytes() == content
    assert atomic.same(link, target)
    assert atomic.same(tmp_path / "elsewhere" / ".." / "new", tmp_path / "new")
    assert not atomic.same(link, tmp_path / "new")
    os.link(target, tmp_path / "hard")
    assert atomic.same(link, tmp_path / "hard")


def test_links_that_lead_nowhere_are_wrong_usage(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    a.symlink_to(b)
    b.symlink_to(a)
    with pytest.raises(ConfigError, match=r"cannot write .*a: Too many levels of symbolic links"):
        atomic.check_writable(a)
    with pytest.raises(ConfigError, match="cannot write"):
        atomic.check_writable(tmp_path / ("n" * 300))
    (tmp_path / "c").symlink_to(tmp_path / "no" / "such")
    with pytest.raises(ConfigError, match="there is no folder"):
        atomic.check_writable(tmp_path / "c")
