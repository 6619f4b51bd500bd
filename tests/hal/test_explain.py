# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import hal


@pytest.fixture
def explained(monkeypatch: pytest.MonkeyPatch) -> Any:
    def explain(name: str, timeout_s: float = 60.0) -> hal.Explanation:
        monkeypatch.setenv("HAL_BACKENDS", name)
        (answer,) = hal.explain(timeout_s=timeout_s)
        assert answer.backend == name
        return answer

    return explain


def test_the_cpu_is_found_opened_and_computes(explained: Any) -> None:
    answer = explained("cpu")
    assert answer.status == "found", answer
    assert [info.id for info in answer.devices] == ["cpu"]
    assert answer.owners == (f"moe-hal {hal.__version__}",)


def test_a_backend_that_opens_on_the_host_is_found(distributions: Any, explained: Any) -> None:
    distributions.stub("mychip")
    assert explained("mychip").status == "found"


@pytest.mark.parametrize(
    ("opens", "reason"),
    [
        ("raise RuntimeError('firmware too old')", "firmware too old"),
        ("raise SystemExit(5)", "SystemExit"),
        ("import os; os._exit(7)", "opening mychip:0: the process ended with status 7"),
        (
            "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
            "opening mychip:0: the process was killed by SIGKILL",
        ),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "the process was killed by SIGSEGV"),
        ("return None", "opening"),
    ],
)
def test_a_backend_that_fails_or_dies_while_opening_is_broken_and_says_how(
    distributions: Any, explained: Any, opens: str, reason: str
) -> None:
    distributions.stub("mychip", opens=opens)
    answer = explained("mychip")
    assert answer.status == "broken"
    assert reason in answer.reason
    assert [info.id for info in answer.devices] == ["mychip:0"]


def test_a_backend_that_hangs_is_broken_and_leaves_no_process(
    distributions: Any, explained: Any, tmp_path: Path
) -> None:
    marks = tmp_path / "grandchild"
    # The grandchild keeps the child's stdout open, which must not keep us waiting.
    opens = f"""
import subprocess, time
grandchild = subprocess.Popen(["sleep", "3600"])
open({str(marks)!r}, "w").write(str(grandchild.pid))
time.sleep(3600)
"""
    distributions.stub("mychip", opens=opens)
    # Long enough for the child to reach open() on a slow machine: it only imports hal.
    answer = explained("mychip", timeout_s=15.0)
    assert (answer.status, answer.reason) == (
        "broken",
        "opening mychip:0: the process did not answer within 15 s",
    )
    pid = int(marks.read_text())
    state = Path(f"/proc/{pid}/stat")
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


def test_an_interrupt_ends_the_children_at_once(
    distributions: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    mark = tmp_path / "child"
    opens = (
        f"import os, time\nwith open({str(mark)!r}, 'w') as file:\n    file.write(str(os.getpid()))\ntime.sleep(3600)"
    )
    distributions.stub("mychip", opens=opens)
    monkeypatch.setenv("HAL_BACKENDS", "mychip")
    # A process that a shell started in the background ignores SIGINT, and so would its children.
    driver = "import signal, hal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\nhal.explain()"
    asking = subprocess.Popen([sys.executable, "-c", driver], stderr=subprocess.PIPE, text=True)
    while not (mark.exists() and mark.read_text()):
        assert asking.poll() is None, asking.communicate()
        time.sleep(0.05)
    asking.send_signal(signal.SIGINT)
    _, said = asking.communicate(timeout=60)  # half of what the child might take
    assert "KeyboardInterrupt" in said
    assert not Path(f"/proc/{mark.read_text()}").exists()


@pytest.mark.parametrize("code", ["raise OSError('no library')", "import os; os._exit(3)"])
def test_a_backend_that_fails_while_it_is_imported_is_broken(distributions: Any, explained: Any, code: str) -> None:
    distributions.backend("mychip", code)
    answer = explained("mychip")
    assert answer.status == "broken"
    assert "no library" in answer.reason or "importing it: the process ended with status 3" in answer.reason


def test_a_backend_without_hardware_is_absent(distributions: Any, explained: Any) -> None:
    distributions.stub("mychip")
    distributions.backend(
        "gone", "from fake_dist_mychip import Stub\nfrom hal.errors import Absent\nclass Gone(Stub):\n"
        "    name = 'gone'\n    def discover(self):\n        raise Absent('no card in any slot', device='gone')\n"
        "backend = Gone()",
    )  # fmt: skip
    answer = explained("gone")
    assert answer.status == "absent"
    assert "no card in any slot" in answer.reason
    assert answer.detail == ""


def test_a_device_that_turns_out_to_be_absent_is_not_broken(distributions: Any, explained: Any) -> None:
    distributions.stub("mychip", opens="from hal.errors import Absent\nraise Absent('taken', device='mychip:0')")
    answer = explained("mychip")
    assert (answer.status, "taken" in answer.reason) == ("absent", True)


@pytest.mark.parametrize(
    ("advice", "said"),
    [
        ("return 'reinstall it'", "TypeError: advice() returned 'reinstall it'; expected: a sequence of str"),
        ("return None", "TypeError: advice() returned None"),
        ("return [1]", "TypeError: advice() returned [1]"),
        ("return (text for text in 'ab')", "TypeError: advice() returned <generator"),
        ("raise KeyError('driver')", "KeyError: 'driver'"),
    ],
)
def test_advice_that_cannot_be_read_is_told_and_decides_nothing(
    distributions: Any, explained: Any, advice: str, said: str
) -> None:
    distributions.stub("mychip")
    with (distributions.folder / "dist-mychip" / "fake_dist_mychip.py").open("a") as module:
        module.write(f"def advice(self):\n    {advice}\nStub.advice = advice\n")
    answer = explained("mychip")
    assert answer.status == "found", answer
    assert [text.startswith(f"the plug-in is at fault: advice() failed with {said}") for text in answer.advice] == [
        True
    ]


def test_what_a_backend_prints_does_not_disturb_the_report(distributions: Any, explained: Any) -> None:
    noise = "import sys\nprint('hal-report {')\nprint('hal-report null')\nsys.stdout.write('half a line')\n"
    distributions.stub(
        "mychip", opens=noise + "from hal_cpu.backend import backend as cpu\nreturn cpu.open(info, changes)"
    )
    assert explained("mychip").status == "found"


def test_a_contested_device_is_explained(distributions: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    distributions.stub("general", torch_device="cuda:0")
    distributions.stub("special", torch_device="cuda:0", specificity="PRODUCT")
    monkeypatch.setenv("HAL_BACKENDS", "general,special")
    general, special = hal.explain()
    assert (general.status, special.status) == ("absent", "found")
    assert general.reason == "general:0: cuda:0 is special:0, a more specific claim"
    assert general.devices == ()


def test_a_broken_special_backend_does_not_hide_behind_the_general_one(
    distributions: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    distributions.stub("general", torch_device="cuda:0")
    distributions.stub("special", torch_device="cuda:0", specificity="PRODUCT", opens="raise OSError('dead')")
    monkeypatch.setenv("HAL_BACKENDS", "general,special")
    assert [answer.status for answer in hal.explain()] == ["absent", "broken"]


def test_files_in_the_current_folder_are_not_imported(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('a file of the current folder was imported')")
    code = "import sys; sys.path[:] = [p for p in sys.path if p]; import hal; print(hal.explain()[0].status)"
    environment = {**os.environ, "HAL_BACKENDS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "found\n"
