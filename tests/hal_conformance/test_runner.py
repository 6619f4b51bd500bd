# SPDX-License-Identifier: Apache-2.0
"""Workers are real processes here, and are really killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hal.errors import Absent, Broken, ConfigError, UnknownDevice
from hal_conformance import suite
from hal_conformance.execution.plan import Catalogue, Selection, plan
from hal_conformance.execution.runner import Runner
from hal_conformance.execution.subject import Subject
from hal_conformance.verdicts import Status

HERE = Path(__file__).parent
FAKE = Catalogue("fake_cases")
SELECTION = Selection(scale="tiny")


@pytest.fixture(autouse=True)
def _path(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))


def run(impl, *, device="fake:0", cases=("double.*",), case_s=20.0, **options):
    selection = Selection(cases, scale="tiny")
    tasks = plan(selection, FAKE.all())
    return suite.run(
        [Subject(device, f"fake_cases:{impl}" if impl else "torch")], tasks, selection,
        catalogue=FAKE, opener="fake_cases:open_device", case_s=case_s, **options,
    )  # fmt: skip


def statuses(report, dtype):
    return [row.status for row in report.results if row.dtype == dtype]


def test_a_right_implementation_is_exact_everywhere():
    report = run("good")
    assert statuses(report, "float32") == statuses(report, "bfloat16") == [Status.EXACT] * 4
    assert report.exit_status() == 0


def test_what_a_simulated_device_leaves_to_the_cpu_is_said_of_each_case():
    report = run("left_out")
    assert {row.status for row in report.results} == {Status.EXACT}
    assert all(row.detail.endswith("not simulated: addr (2 times)") for row in report.results)


def test_a_class_is_constructed():
    assert run("Constructed").exit_status() == 0


def test_a_wrong_implementation_fails_with_its_numbers():
    report = run("wrong")
    assert set(statuses(report, "float32")) == {Status.FAIL_NUMERIC}
    assert report.results[0].margin == 1.0
    assert report.results[0].detectors == {"bound": 1.0, "rms": None, "bias": None, "exact": None}
    assert report.exit_status() == 1


@pytest.mark.parametrize(
    ("impl", "status", "words"),
    [
        ("raises", Status.CRASH, r"raised ValueError: first line last line \x1b[2J (fake_cases.py:"),
        ("raises_unprintable", Status.CRASH, "whose __str__ raises RuntimeError"),
        ("exits", Status.CRASH, "exited with status 5"),
        ("sys_exits", Status.CRASH, "raised SystemExit"),
        ("interrupts", Status.CRASH, "raised KeyboardInterrupt"),
        ("killed", Status.CRASH, "killed by SIGKILL"),
        ("poisons", Status.CRASH, "raised RuntimeError: illegal memory access"),
        ("writes_to_wire", Status.CRASH, ""),
        ("mutates", Status.FAIL_STRUCTURE, "wrote into its input x"),
        ("on_meta", Status.FAIL_STRUCTURE, "y is on meta, not on cpu"),
        ("says_unsupported", Status.UNSUPPORTED, "has no doubling"),
        ("wrong_shape", Status.FAIL_STRUCTURE, "not the y"),
        ("wrong_dtype", Status.FAIL_STRUCTURE, "not the y"),
        ("wrong_keys", Status.FAIL_STRUCTURE, "not the y"),
        ("complex_dtype", Status.FAIL_STRUCTURE, "complex64 cannot be exchanged"),
        ("sparse", Status.FAIL_STRUCTURE, "layout torch.sparse_coo"),
        ("not_a_dict", Status.FAIL_STRUCTURE, "returned a Tensor"),
        ("not_a_tensor", Status.FAIL_STRUCTURE, "y is a list"),
        ("enormous", Status.FAIL_STRUCTURE, "bytes, more than"),
        ("replaces_torch", Status.FAIL_STRUCTURE, "left a function replaced that the suite computes with"),
        ("replaces_numpy", Status.CRASH, "left a function replaced that the suite computes with"),
        ("replaces_digests", Status.FAIL_STRUCTURE, "left a function replaced that the suite computes with"),
        ("limits_files", Status.CRASH, "raised ValueError: no room"),
        ("forges_nothing_more", Status.CRASH, "a message that answers nothing"),
        ("forges_no_seconds", Status.CRASH, "a message that answers nothing"),
        ("forges_seconds", Status.CRASH, "a message that answers nothing"),
        ("forges_a_status", Status.CRASH, "a message that answers nothing"),
        ("fake", Status.FAIL_STRUCTURE, "y is a FakeTensor, which has no elements of its own"),
        ("functional", Status.FAIL_STRUCTURE, "which has no elements of its own"),
        ("emptied", Status.FAIL_STRUCTURE, "which has no elements of its own"),
        ("leaks_a_transform", Status.FAIL_STRUCTURE, "which has no elements of its own"),
        ("nested", Status.FAIL_STRUCTURE, "y has the layout nested"),
        ("floods", Status.EXACT, ""),
        ("deletes_streams", Status.EXACT, ""),
        ("leaves_threads", Status.EXACT, ""),
        ("forks", Status.EXACT, ""),
    ],
)
def test_what_an_implementation_does_costs_its_own_case_and_no_other(impl, status, words):
    report = run(impl, cases=("double.one[a]",))
    bad, good = report.results
    assert (bad.dtype, bad.status) == ("float32", status)
    assert words in bad.detail
    assert bad.detail.isprintable()
    assert (good.dtype, good.status) == ("bfloat16", Status.EXACT)


@pytest.mark.parametrize(
    ("impl", "status", "words"),
    [
        (
            "leaves_no_grad",
            Status.FAIL_STRUCTURE,
            "left numpy's reactions to floating-point errors at {'divide': 'raise',",
        ),
        ("leaves_no_grad", Status.FAIL_STRUCTURE, "torch's gradient mode at False"),
        ("leaves_a_mode", Status.FAIL_STRUCTURE, "left torch's default device at cpu"),
        ("leaves_and_raises", Status.CRASH, "raised ValueError: and left it"),
        ("leaves_and_raises", Status.CRASH, "torch's gradient mode at False"),
        ("leaves_and_refuses", Status.FAIL_STRUCTURE, "has no doubling; left numpy's reactions"),
    ],
)
def test_what_a_case_leaves_changed_in_the_process_is_its_own_fault_and_no_other_cases(impl, status, words):
    first, *others = run(impl).results
    assert first.status is status
    assert words in first.detail
    assert {row.status for row in others} == {Status.EXACT}


def test_what_does_not_fit_this_host_is_skipped_with_its_size_and_not_run():
    report = run("good", cases=("huge.*[a]",))
    assert {row.status for row in report.results} == {Status.SKIPPED}
    first, *_, last = (row.detail for row in report.results)
    assert first.startswith(f"needs about {3 << 20:.1f} GiB of host memory, and ")
    assert last == f"its outputs have {1 << 10:.1f} GiB; a case may return 4"
    assert report.exit_status() == 1, "nothing was judged"


def test_one_worker_takes_several_implementations_and_a_death_costs_only_the_one_that_died():
    tasks = plan(Selection(("double.one[a]",), ("float32",), "tiny"), FAKE.all())
    found, workers = [], []
    with Runner(Subject("fake:0", "fake_cases:good"), FAKE, opener="fake_cases:open_device") as runner:
        runner.open()
        for impl in ("wrong", "good", "exits", "good"):
            runner.change(f"fake_cases:{impl}")
            workers.append(runner._worker)
            (observation,) = runner.observe(tasks)
            found.append((observation.status, {name: array.tolist() for name, array in observation.outputs.items()}))
    assert workers[0] is workers[1] is workers[2] is not workers[3]
    assert found[1] == found[3] != found[0]
    assert found[2] == (Status.CRASH, {})
    with Runner(Subject("fake:0", "fake_cases:good"), FAKE, opener="fake_cases:open_device") as runner:
        runner.open()
        with pytest.raises(ConfigError, match="cannot be loaded"):
            runner.change("fake_cases:there_is_none")


def test_a_hang_costs_its_time_limit_and_the_next_case_goes_on():
    report = run("hangs", cases=("double.one[a]",), case_s=1.0)
    assert [row.status for row in report.results] == [Status.HANG, Status.EXACT]
    assert "no result within 1 s" in report.results[0].detail


def test_a_case_that_keeps_hanging_is_not_tried_for_ever(monkeypatch):
    monkeypatch.setattr("hal_conformance.execution.runner.HANGS", 1)
    report = run("hangs", case_s=1.0)
    assert statuses(report, "float32") == [Status.HANG, Status.SKIPPED, Status.HANG, Status.SKIPPED]
    assert report.exit_status() == 1


def test_a_hang_takes_the_processes_that_it_started_with_it(eventually):
    run("orphans", cases=("double.one[a]",), case_s=2.0)
    assert eventually(lambda: not _running("hal-test-orphan"))


@pytest.mark.skipif(sys.platform == "win32", reason="sessions and /proc")
@pytest.mark.parametrize("end", ["the run", "its parent"])
def test_processes_that_left_the_workers_group_end_with_it(end, tmp_path, eventually):
    if end == "the run":
        assert run("starts_daemons", cases=("double.one[a]",)).exit_status() == 0
    else:
        script, said = tmp_path / "hal_test_driver.py", tmp_path / "said"
        script.write_text(DRIVER.format(here=str(HERE)).replace('"hangs"', '"starts_daemons_and_hangs"'))
        with said.open("w") as out:
            parent = subprocess.Popen([sys.executable, str(script)], stdout=out, stderr=out)
        try:
            begun = eventually(lambda: len(_running("hal-test-daemon")) == 2, meanwhile=lambda: parent.poll() is None)
            assert begun, (parent.poll(), said.read_text())
        finally:
            parent.kill()
            parent.wait()
    assert eventually(lambda: not _running("hal-test-daemon"))


def _running(word):
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                if state != "Z" and word.encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def test_a_missing_method_and_a_missing_dtype_are_unsupported_and_say_why():
    report = run("nothing", cases=("double.one[a]",))
    assert {row.status for row in report.results} == {Status.UNSUPPORTED}
    assert "has no double" in report.results[0].detail
    assert report.exit_status() == 1, "nothing was judged"
    report = run("good", device="fake:no-bf16", cases=("double.one[a]",))
    assert [row.status for row in report.results] == [Status.EXACT, Status.UNSUPPORTED]
    assert report.results[1].detail == "bfloat16: no such units"


@pytest.mark.parametrize(
    ("device", "error", "words"),
    [
        ("absent", Absent, "no such card"),
        ("broken", Broken, "the driver is dead"),
        ("unknown", UnknownDevice, "no such backend"),
        ("raises", Broken, "RuntimeError: vendor says no"),
        ("exits", Broken, "exited with status 7"),
        ("hangs", Broken, "nothing within"),
    ],
)
def test_a_device_that_does_not_open_says_why(device, error, words):
    start_s = 5.0 if device == "hangs" else None
    runner = Runner(Subject(device, "fake_cases:good"), FAKE, opener="fake_cases:open_device", start_s=start_s)
    with runner, pytest.raises(error, match=words):
        runner.open()


def test_a_named_device_that_is_absent_makes_the_run_exit_3_and_the_others_still_run():
    tasks = plan(SELECTION, FAKE.all())[:1]
    subjects = [Subject("absent", "fake_cases:good"), Subject("fake:0", "fake_cases:good")]
    options = {"catalogue": FAKE, "opener": "fake_cases:open_device"}
    report = suite.run(subjects, tasks, SELECTION, **options)
    assert [(entry.kind, entry.failed) for entry in report.not_run] == [("absent", True)]
    assert [row.status for row in report.results] == [Status.EXACT]
    assert report.exit_status() == 3
    unnamed = [Subject("absent", "fake_cases:good", named=False), subjects[1]]
    assert suite.run(unnamed, tasks, SELECTION, **options).exit_status() == 0
    assert suite.run(unnamed, tasks, SELECTION, required=["cuda:*"], **options).exit_status() == 3
    assert suite.run(unnamed, tasks, SELECTION, required=["fake:*"], **options).exit_status() == 0


def test_an_implementation_that_cannot_be_imported_is_wrong_usage():
    with pytest.raises(ConfigError, match="no_such_module"):
        suite.run(
            [Subject("fake:0", "no_such_module:x")], [], SELECTION, catalogue=FAKE, opener="fake_cases:open_device"
        )


def test_a_judge_that_raises_is_invalid():
    from fake_cases import BadJudge

    tasks = plan(SELECTION, [BadJudge()])[:1]
    report = suite.run(
        [Subject("fake:0", "fake_cases:good")], tasks, SELECTION, catalogue=FAKE, opener="fake_cases:open_device"
    )
    assert report.results[0].status is Status.INVALID
    assert report.results[0].detail == r"the judge raised ZeroDivisionError: the judge fell over \x1b[31m"


# A process that a shell started in the background ignores SIGINT, and so would its children.
DRIVER = """
import signal
import sys
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, {here!r})
from test_runner import run
print("started", flush=True)
run("hangs", case_s=600.0)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals and /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_worker_outlives_its_parent(number, tmp_path, eventually):
    script = tmp_path / "hal_test_driver.py"
    script.write_text(DRIVER.format(here=str(HERE)))
    parent = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        parent.stdout.readline()
        assert eventually(lambda: _children(parent.pid))
        children = _children(parent.pid)
        time.sleep(6)  # until it hangs within the case
        parent.send_signal(number)
        parent.wait(timeout=300)
        assert eventually(lambda: not [pid for pid in children if _alive(pid)])
    finally:
        parent.kill()
        parent.stdout.close()
        parent.wait()


def _children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_the_parent_imports_no_torch():
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import test_runner as t; r = t.run('good'); " + (
        "assert r.exit_status() == 0; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "HAL_BACKENDS": ""})
