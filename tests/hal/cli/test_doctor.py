# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import hal


def doctor(hal_command: Any, *arguments: str, **environment: str) -> tuple[int, dict[str, Any]]:
    done = hal_command("doctor", "--json", *arguments, **{"HAL_BACKENDS": "cpu", **environment})
    assert "Traceback" not in done.stderr, done.stderr
    report = json.loads(done.stdout)
    assert report["schema"] == "hal.doctor/1"
    return done.returncode, report


def torch_plugin(distributions: Any, name: str, code: str) -> None:
    module = f"fake_torch_{name}"
    distributions.add(module, code, {"torch.backends": {name: f"{module}:load"}}, dist=f"torch-{name}")


def test_a_machine_with_only_a_cpu_is_healthy(distributions: Any, hal_command: Any) -> None:
    status, report = doctor(hal_command)
    assert (status, report["healthy"], report["problems"]) == (0, True, []), report
    assert [answer["status"] for answer in report["backends"]] == ["found"]
    assert report["versions"]["hal"] == hal.__version__
    assert report["versions"]["torch"] == report["torch"]["version"] != None  # noqa: E711
    assert report["versions"]["python"].startswith(sys.version.split()[0])


def test_hardware_that_is_absent_is_no_fault_and_a_broken_backend_is(distributions: Any, hal_command: Any) -> None:
    distributions.stub("gone", opens="from hal.errors import Absent\nraise Absent('taken out', device='gone:0')")
    status, report = doctor(hal_command, HAL_BACKENDS="gone")
    assert (status, report["backends"][0]["status"]) == (0, "absent")
    distributions.stub("dead", opens="raise OSError('no firmware')")
    status, report = doctor(hal_command, HAL_BACKENDS="gone,dead")
    assert (status, report["backends"][1]["status"]) == (3, "broken")
    assert "no firmware" in report["backends"][1]["reason"]


def test_a_backend_that_hangs_while_it_lists_is_said_to_do_that(distributions: Any, hal_command: Any) -> None:
    distributions.stub("mychip")
    distributions.backend(
        "slow", "from fake_dist_mychip import Stub\nimport time\nclass Slow(Stub):\n    name = 'slow'\n"
        "    def discover(self): time.sleep(3600)\nbackend = Slow()",
    )  # fmt: skip
    status, report = doctor(hal_command, "--timeout", "10", HAL_BACKENDS="slow")
    assert status == 3
    assert report["backends"][0]["reason"] == "listing its devices: the process did not answer within 10 s"


def test_advice_is_told_for_hardware_that_seems_absent_too(distributions: Any, hal_command: Any) -> None:
    distributions.stub("mychip")
    distributions.backend(
        "gone", "from fake_dist_mychip import Stub\nfrom hal.errors import Absent\nclass Gone(Stub):\n"
        "    name = 'gone'\n    def discover(self): raise Absent('no build for it', device='gone')\n"
        "    def advice(self): return ['a driver is here: install a build for it']\nbackend = Gone()",
    )  # fmt: skip
    _, report = doctor(hal_command, HAL_BACKENDS="gone")
    assert report["backends"][0]["status"] == "absent"
    assert report["backends"][0]["advice"] == ["a driver is here: install a build for it"]


def test_the_timeout_ends_a_backend_that_hangs(distributions: Any, hal_command: Any) -> None:
    distributions.stub("mychip", opens="import time; time.sleep(3600)")
    status, report = doctor(hal_command, "--timeout", "10", HAL_BACKENDS="mychip")
    assert status == 3
    assert report["backends"][0]["reason"] == "opening mychip:0: the process did not answer within 10 s"


def test_a_torch_plugin_that_raises_is_named_with_what_to_do(distributions: Any, hal_command: Any) -> None:
    torch_plugin(distributions, "good", "def load(): pass")
    torch_plugin(distributions, "bad", "raise ImportError('libruntime.so: cannot open shared object file')")
    status, report = doctor(hal_command, TORCH_DEVICE_BACKEND_AUTOLOAD="1")
    assert status == 3
    assert report["torch"]["fault"] is None
    faults = {plugin["name"]: plugin["fault"] for plugin in report["torch"]["plugins"]}
    assert faults["good"] is None
    assert "libruntime.so" in faults["bad"]
    text = "\n".join(report["problems"])
    assert "`import torch` fails" in text
    assert "torch-bad 1.0" in text
    assert "torch-good" not in text
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in text
    assert report["environment"]["TORCH_DEVICE_BACKEND_AUTOLOAD"] == "1"
    assert report["backends"][0]["status"] == "found"


def test_a_torch_plugin_that_kills_the_process_is_survived(distributions: Any, hal_command: Any) -> None:
    torch_plugin(distributions, "bad", "import os, signal\ndef load(): os.kill(os.getpid(), signal.SIGKILL)")
    status, report = doctor(hal_command)
    assert status == 3
    assert report["torch"]["plugins"][0]["fault"] == "the process was killed by SIGKILL"


def test_torch_plugins_that_work_are_no_problem(distributions: Any, hal_command: Any) -> None:
    torch_plugin(distributions, "good", "def load(): pass")
    status, report = doctor(hal_command)
    assert (status, report["problems"]) == (0, [])
    assert [plugin["owner"] for plugin in report["torch"]["plugins"]] == ["torch-good 1.0"]


def test_it_works_when_torch_itself_cannot_be_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, distributions: Any, hal_command: Any
) -> None:
    (tmp_path / "torch.py").write_text("raise OSError('libtorch_cpu.so: undefined symbol')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    status, report = doctor(hal_command)
    assert status == 3
    assert "undefined symbol" in report["torch"]["fault"]
    assert any("even without plug-ins" in problem for problem in report["problems"])
    assert report["backends"][0]["status"] == "broken"
    assert "undefined symbol" in report["backends"][0]["reason"]


def test_it_works_when_torch_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, distributions: Any, hal_command: Any
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "from importlib.machinery import PathFinder\nfind = PathFinder.find_spec\n"
        "def hide(cls, name, path=None, target=None):\n"
        "    return None if name.partition('.')[0] == 'torch' else find(name, path, target)\n"
        "PathFinder.find_spec = classmethod(hide)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    status, report = doctor(hal_command)
    assert status == 3
    assert report["torch"]["installed"] is False
    assert any("torch is not installed" in problem for problem in report["problems"])


def test_a_malformed_distribution_is_a_problem_and_stops_nothing(distributions: Any, hal_command: Any) -> None:
    distributions.malformed("bad")
    status, report = doctor(hal_command, TORCH_DEVICE_BACKEND_AUTOLOAD="1")
    assert (status, report["backends"][0]["status"]) == (3, "found")
    assert any(problem.startswith("bad 1.0: its entry points cannot be read") for problem in report["problems"])
    # torch reads the same files when it looks for its own plug-ins.
    assert any("`import torch` fails" in problem for problem in report["problems"])


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("HAL_BACKENDS", "cpu,nope", "HAL_BACKENDS='cpu,nope' names 'nope'"),
        ("HAL_DEVICE", "nope", "HAL_DEVICE=nope names no backend"),
        ("HAL_DEVICE", "cpu:4", "HAL_DEVICE=cpu:4 cannot be opened"),
    ],
)
def test_settings_that_lead_nowhere_are_problems(
    distributions: Any, hal_command: Any, variable: str, value: str, said: str
) -> None:
    status, report = doctor(hal_command, **{variable: value})
    assert status == 3
    assert any(said in problem for problem in report["problems"])


def test_the_text_says_the_same(distributions: Any, hal_command: Any) -> None:
    distributions.stub("dead", opens="raise OSError('no firmware')")
    done = hal_command("doctor", HAL_BACKENDS="cpu,dead", HAL_DEVICE="dead")
    assert done.returncode == 3
    assert "found   cpu" in done.stdout
    assert "broken  dead" in done.stdout
    assert "no firmware" in done.stdout
    assert "Broken: dead." in done.stdout
    assert "HAL_DEVICE=dead cannot be opened" in done.stdout


@pytest.mark.parametrize("timeout", ["0", "-1", "soon"])
def test_a_timeout_that_is_none_is_wrong_usage(hal_command: Any, timeout: str) -> None:
    assert hal_command("doctor", "--timeout", timeout).returncode == 2
