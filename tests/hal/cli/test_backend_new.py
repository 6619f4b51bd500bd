# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hal.errors import ConfigError
from hal.scaffold import write_package

FILES = {"pyproject.toml", "README.md", "hal_mychip/__init__.py", "hal_mychip/py.typed", "tests/test_interface.py"}


def files(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def test_a_package_is_complete_and_its_path_is_the_result(hal_command: Any, tmp_path: Path) -> None:
    done = hal_command("backend", "new", "mychip", "--dir", str(tmp_path))
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'hal-mychip'}\n")
    assert files(tmp_path / "hal-mychip") == FILES
    assert [p.name for p in tmp_path.iterdir()] == ["hal-mychip"]


@pytest.mark.parametrize("torch_type", ["cpu", "flagos"])
def test_the_device_takes_at_most_thirty_lines_and_nothing_is_left_unfilled(tmp_path: Path, torch_type: str) -> None:
    made = write_package("my_chip2", tmp_path, torch_type)
    for path in made.rglob("*.*"):
        assert "$" not in path.read_text()
    module = (made / "hal_my_chip2" / "__init__.py").read_text()
    assert len(module.splitlines()) <= 30
    assert f'torch_type = "{torch_type}"' in module
    ast.parse((made / "tests" / "test_interface.py").read_text())


@pytest.mark.parametrize("torch_type", ["cpu", "flagos"])
@pytest.mark.parametrize("tool", [("ruff", "check", "--isolated", "--select", "E,F,I,W,UP"), ("mypy", "--strict")])
def test_what_is_generated_is_clean(tmp_path: Path, torch_type: str, tool: tuple[str, ...]) -> None:
    made = write_package("mychip", tmp_path, torch_type)
    done = subprocess.run(
        [sys.executable, "-m", *tool, "hal_mychip"], cwd=made, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "hal-mychip").mkdir()
    (tmp_path / "hal-mychip" / "mine").write_text("work")
    with pytest.raises(ConfigError, match="is there already"):
        write_package("mychip", tmp_path, "cpu")
    assert files(tmp_path) == {"hal-mychip/mine"}


def test_a_failure_half_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "touch", full)
    with pytest.raises(OSError, match="No space"):
        write_package("mychip", tmp_path, "cpu")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name",
    ["", "My", "1chip", "my-chip", "my chip", "../up", "class", "cpu", "auto", "all", "conformance", "ünï", "a/b"],
)
def test_a_name_that_cannot_be_used_is_refused_and_nothing_is_written(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError):
        write_package(name, tmp_path, "cpu")
    assert list(tmp_path.iterdir()) == []


@given(st.text(max_size=12))
def test_whatever_the_torch_type_is_nothing_is_written_outside(tmp_path_factory: Any, torch_type: str) -> None:
    folder = tmp_path_factory.mktemp("new")
    try:
        made = write_package("mychip", folder, torch_type)
    except ConfigError:
        assert list(folder.iterdir()) == []
    else:
        ast.parse((made / "hal_mychip" / "__init__.py").read_text())


def test_wrong_usage_has_status_two(hal_command: Any, tmp_path: Path) -> None:
    assert hal_command("backend", "new").returncode == 2
    assert hal_command("backend", "new", "cpu", "--dir", str(tmp_path)).returncode == 2
    assert hal_command("backend", "new", "mychip", "--dir", str(tmp_path / "nowhere")).returncode == 2
    assert list(tmp_path.iterdir()) == []
