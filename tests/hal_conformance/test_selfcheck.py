# SPDX-License-Identifier: Apache-2.0
"""`hal conformance selfcheck`: what it counts as flagged, and that it fails when the suite does."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hal_conformance import selfcheck
from hal_conformance.cases import ALL
from hal_conformance.execution.plan import Selection, plan
from hal_conformance.faults import VARIATIONS
from hal_conformance.faults.catalogue import Variation, fault
from hal_conformance.faults.parts import Parts
from hal_conformance.result import Result
from hal_conformance.selfcheck import Outcome, exit_status, flagged_by
from hal_conformance.verdicts import Status

NOTHING = {"bound": None, "rms": None, "bias": None, "exact": None}


def row(status, case="experts.random[a]", **detectors):
    return Result(case, "experts", "cpu", "m:o", "float32", status, None, NOTHING | detectors, "why", 0.0)


@pytest.mark.parametrize(
    ("result", "by"),
    [
        (row(Status.PASS, bound=0.9, rms=0.5), set()),
        (row(Status.UNSUPPORTED), set()),
        (row(Status.FAIL_NUMERIC, bound=7.0, rms=0.5), {"bound"}),
        (row(Status.FAIL_NUMERIC, bound=7.0, rms=3.0, bias=-2.0), {"bound", "rms", "bias"}),
        (row(Status.FAIL_NUMERIC, exact=0.1), {"exact"}),
        (row(Status.FAIL_NUMERIC), {"bound"}),  # a margin that is not finite is None
        (row(Status.DEGRADED, bound=0.8, bias=1.5), {"bias"}),
        (row(Status.FAIL_DISCRETE, exact=0.1), {"discrete"}),
        (row(Status.FAIL_NONFINITE), {"nonfinite"}),
        (row(Status.FAIL_STRUCTURE), {"structure"}),
        (row(Status.HANG), {"crash"}),
    ],
)
def test_what_speaks_against_a_subject(result, by):
    assert flagged_by(result) == by


def test_a_fault_that_nothing_flags_and_a_benign_variation_that_something_does_are_wrong():
    missed, alarmed = Outcome(VARIATIONS["drops_a_token"]), Outcome(VARIATIONS["reversed"])
    missed.add(row(Status.PASS))
    alarmed.add(row(Status.PASS))
    assert (missed.right, alarmed.right) == (False, True)
    assert exit_status([missed, alarmed]) == 1
    missed.add(row(Status.DEGRADED, rms=1.1))
    assert exit_status([missed, alarmed]) == 0
    alarmed.add(row(Status.DEGRADED, rms=1.1))
    assert exit_status([missed, alarmed]) == 1
    missed.add(row(Status.INVALID))
    assert not missed.right, "a judge that failed has judged nothing"
    silent = Outcome(VARIATIONS["reversed"])
    silent.add(row(Status.UNSUPPORTED))
    assert not silent.right, "nothing was judged"


def test_every_variation_says_what_it_is_and_no_name_occurs_twice():
    assert all(isinstance(v, Variation) and v.what and v.make() for v in VARIATIONS.values())
    with pytest.raises(TypeError, match="name is taken"):
        fault()(type("Reversed", (), {"__doc__": "Once more."}))
    with pytest.raises(TypeError, match="no docstring"):
        fault()(type("Nameless", (), {}))


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "hal.cli.main", "conformance", "selfcheck", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip


def test_the_command_shows_fault_by_detector_and_ends_with_0(tmp_path):
    report, page = tmp_path / "r.json", tmp_path / "r.md"
    files = ("--json", str(report), "--markdown", str(page))
    done = command("low_z_loss", "wide_losses", "--case", "losses", *files)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(report.read_text())
    assert found["schema"] == "hal.selfcheck/1"
    assert found["faults"] == {"total": 1, "flagged": 1}
    assert found["benign"] == {"total": 1, "green": 1}
    assert "losses.z" in found["outcomes"][0]["cases"]
    assert found["outcomes"][0]["by"]["bound"] > 0
    assert "1 of 1 faults flagged, 1 of 1 benign variations green" in done.stdout
    assert "| low\\_z\\_loss | The z-loss is computed in the logits' dtype |" in page.read_text()
    assert max(map(len, done.stdout.splitlines())) <= 100


@pytest.mark.skipif(sys.platform == "win32", reason="signals and /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_a_check_that_is_ended(number, monkeypatch, eventually):
    monkeypatch.setenv("HAL_TEST_ENDED", str(int(number)))  # what a child's children have, too
    check = subprocess.Popen(
        [str(Path(sys.executable).parent / "hal"), "conformance", "selfcheck", "--jobs", "2", "experts*", "route*"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        assert eventually(lambda: len(_marked("HAL_TEST_ENDED", number)) >= 5)  # itself, two that judge, two workers
        check.send_signal(number)
        check.wait(timeout=300)
        assert eventually(lambda: not _marked("HAL_TEST_ENDED", number))
    finally:
        check.kill()
        check.wait()


def _marked(name, value):
    """Return the processes that have a variable in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"{name}={int(value)}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


def test_several_processes_say_the_same_as_one():
    selection = Selection(("losses", "norm.rms"), scale="tiny")
    names = ("low_z_loss", "wide_losses", *(f"{name}_norms" for name in ("wide", "blocked", "fused")))
    chosen = {VARIATIONS[name]: selfcheck.tasks(selection, ALL, VARIATIONS[name]) for name in names}
    seen = []
    one, two = (selfcheck.run(chosen, selection, jobs=jobs, on_outcome=seen.append) for jobs in (1, 2))
    assert [o.as_json() | {"seconds": 0} for o in one] == [o.as_json() | {"seconds": 0} for o in two]
    assert [outcome.variation.name for outcome in seen] == [*names, *names]
    assert exit_status(one) == 0


def test_a_fault_that_the_chosen_cases_cannot_see_makes_it_fail():
    done = command("low_z_loss", "--case", "dispatch.permutation")
    assert done.returncode == 1
    assert "nothing was judged" in done.stdout
    assert command("no_such_*").returncode == 2


def test_cases_without_any_of_the_presets_are_run_all_the_same():
    selection, whole = Selection(scale="tiny"), VARIATIONS["built_from_parts"]
    assert not whole.families, "it changes nothing of which it could be told"
    every = [task for task in plan(selection, ALL) if set(task.case.needs) <= set(dir(Parts))]
    assert {task.case.name for task in selfcheck.tasks(selection, ALL, whole)} == {task.case.name for task in every}


def test_only_the_cases_of_what_a_variation_changes_are_run():
    assert VARIATIONS["low_z_loss"].families == ("losses", "layer", "determinism")
    assert VARIATIONS["split_k"].families == ("experts", "layer", "determinism", "trajectory")
    assert VARIATIONS["wide_norms"].families == ("norm",)
    for variation in VARIATIONS.values():
        chosen = selfcheck.tasks(Selection(scale="tiny"), ALL, variation)
        assert chosen, variation.name
        families = {task.case.family for task in chosen}
        assert families <= set(variation.families) or not variation.families, variation.name
