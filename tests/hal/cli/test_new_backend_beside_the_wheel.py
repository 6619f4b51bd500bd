# SPDX-License-Identifier: Apache-2.0
"""The third job, start to end: a plug-in made outside the checkout, installed beside the wheel, checked, judged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def run(*command: str | Path, cwd: Path, status: int = 0) -> str:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HAL_", "PYTHON", "COV_", "TORCH_"))}
    done = subprocess.run(command, cwd=cwd, env=kept, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == status, f"{command}: {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the two wheels; what they depend on is borrowed from this one, through a .pth file."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("outside")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    # A path line does not follow the .pth files of the other environment, so the checkout stays out.
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder / "wheels", cwd=ROOT)
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "-q"]
    run(*install, *(folder / "wheels").glob("moe_hal-*.whl"), cwd=folder)
    hal = folder / "venv" / "bin" / "hal"
    run(hal, "backend", "new", "mychip", "--torch-type", "cpu", cwd=folder)
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder / "wheels", cwd=folder / "hal-mychip")
    run(*install, *(folder / "wheels").glob("hal_mychip-*.whl"), cwd=folder)
    return folder


def hal(environment: Path, *arguments: str, status: int = 0) -> str:
    return run(environment / "venv" / "bin" / "hal", *arguments, cwd=environment, status=status)


def test_the_wheel_runs_without_the_checkout(environment: Path) -> None:
    python = environment / "venv" / "bin" / "python"
    where = run(
        python, "-c", "import hal, hal_cpu, hal_conformance as c; print(hal.__file__, c.__file__)", cwd=environment
    )
    assert all(str(environment) in path for path in where.split())


def test_the_new_device_is_listed_and_found(environment: Path) -> None:
    listed = json.loads(hal(environment, "devices", "--json"))["devices"]
    assert {"cpu", "mychip:0"} <= {device["id"] for device in listed}
    python = environment / "venv" / "bin" / "python"
    code = "import hal; print([e.status for e in hal.explain() if e.backend == 'mychip'])"
    assert run(python, "-c", code, cwd=environment) == "['found']\n"


def test_what_a_stub_lacks_is_said_and_nothing_fails(environment: Path) -> None:
    findings = json.loads(hal(environment, "backend", "check", "mychip", "--json"))["findings"]
    outcomes = {finding["part"]: finding["outcome"] for finding in findings}
    assert "fails" not in outcomes.values()
    assert {part for part, outcome in outcomes.items() if outcome == "unsupported"} == {
        "allocator", "memory.stats", "memory.allocated", "memory.peak", "memory.empty_cache", "memory.limit",
        "memory.snapshot", "precision.reduced", "random.seed", "random.state", "streams",
    }  # fmt: skip


def test_its_own_test_passes(environment: Path) -> None:
    run(environment / "venv" / "bin" / "python", "-m", "pytest", "-q", cwd=environment / "hal-mychip")


def test_the_suite_runs_on_it_and_judges_it(environment: Path) -> None:
    hal(environment, "conformance", "run", "--device", "mychip:0", "--require", "mychip:*", "--scale", "tiny",
        "--dtype", "float32", "--json", "results.json")  # fmt: skip
    report = json.loads((environment / "results.json").read_text())
    assert {result["subject"] for result in report["results"]} == {"mychip:0"}
    assert set(report["summary"]) <= {"EXACT", "PASS", "PASS-AMBIGUOUS", "UNSUPPORTED", "SKIPPED"}
    assert report["summary"]["PASS"] > 0
