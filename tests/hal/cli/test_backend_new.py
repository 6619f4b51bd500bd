# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import ast
import re
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


@pytest.mark.parametrize("torch_type", ["cpu", "cuda", "flagos"])
def test_the_device_takes_at_most_thirty_lines_and_nothing_is_left_unfilled(tmp_path: Path, torch_type: str) -> None:
    made = write_package("my_chip2", tmp_path, torch_type)
    for path in made.rglob("*.*"):
        assert "$" not in path.read_text()
    module = (made / "hal_my_chip2" / "__init__.py").read_text()
    assert len(module.splitlines()) <= 30
    assert f'torch_type = "{torch_type}"' in module
    ast.parse((made / "tests" / "test_interface.py").read_text())


@pytest.mark.parametrize("torch_type", ["cpu", "cuda", "flagos"])
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
    write = Path.write_text

    def full(self: Path, text: str, **options: Any) -> int:
        if self.name == "test_interface.py":
            raise OSError(28, "No space left on device")
        return write(self, text, **options)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ConfigError, match="No space"):
        write_package("mychip", tmp_path, "cpu")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name",
    [
        "", "My", "1chip", "my-chip", "my chip", "../up", "class", "cpu", "auto", "all", "conformance", "ünï", "a/b",
        "chip_", "_chip", "my__chip", "a" * 51, "a" * 260, "chip\n",
    ],
)  # fmt: skip
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


@given(st.from_regex(r"[a-z_0-9]{1,60}", fullmatch=True))
def test_whatever_name_is_taken_makes_a_distribution_that_can_be_built(tmp_path_factory: Any, name: str) -> None:
    folder = tmp_path_factory.mktemp("new")
    try:
        made = write_package(name, folder, "cpu")
    except ConfigError:
        return
    # https://packaging.python.org/en/latest/specifications/name-normalization/, which hatchling insists on
    assert re.fullmatch(r"[a-z0-9]+([-_.][a-z0-9]+)*", made.name)


def test_a_type_that_torch_has_built_in_needs_no_package(tmp_path: Path) -> None:
    module = (write_package("mychip", tmp_path, "cuda") / "hal_mychip" / "__init__.py").read_text()
    assert "package =" not in module
    assert "PRODUCT" in module, "or it would contest each device with whoever takes them all"
    assert (
        'package = "torch_flagos"'
        in (write_package("other", tmp_path, "flagos") / "hal_other" / "__init__.py").read_text()
    )


def installed(distributions: Any, tmp_path: Path, torch_type: str = "cpu", **changes: str) -> Path:
    """Write the package of `mychip`, change its module's text, install it; return its folder."""
    made = write_package("mychip", tmp_path, torch_type)
    module = (made / "hal_mychip" / "__init__.py").read_text()
    for old, new in changes.items():
        assert old in module
        module = module.replace(old, new)
    distributions.add("hal_mychip", module, {"hal.backends": {"mychip": "hal_mychip:backend"}}, dist="hal-mychip")
    return made


def own_test(made: Path) -> tuple[int, str]:
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", str(made / "tests")]
    done = subprocess.run(command, cwd=made, capture_output=True, text=True, check=False, timeout=300)
    return done.returncode, done.stdout


def test_its_own_test_skips_only_where_there_is_no_such_hardware(distributions: Any, tmp_path: Path) -> None:
    status, said = own_test(installed(distributions, tmp_path, "cuda"))
    assert (status, "1 skipped" in said) == (0, True), said
    assert "there is no /dev/mychip" in said


def test_its_own_test_fails_where_the_package_is_not_installed(tmp_path: Path) -> None:
    status, said = own_test(write_package("mychip", tmp_path, "cpu"))
    assert (status, "no backend of this name is registered" in said) == (1, True), said


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"from hal.torch_backend import TorchBackend": "raise OSError('a bug at import')"}, "a bug at import"),
        ({"return 1,": "raise OSError('a bug in listing')\n        return 1,"}, "a bug in listing"),
        ({"plugin_api = (1, 0)": "plugin_api = (2, 0)"}, "interface 2.0"),
        ({"return 1,": "import os; os._exit(5)\n        return 1,"}, "ended with status 5"),
    ],
)
def test_its_own_test_fails_where_the_backend_is_broken(
    distributions: Any, tmp_path: Path, changes: dict[str, str], said: str
) -> None:
    status, output = own_test(installed(distributions, tmp_path, **changes))
    assert (status, said in output) == (1, True), output


def test_a_folder_that_cannot_be_written_is_wrong_usage(hal_command: Any, tmp_path: Path) -> None:
    for folder in ("/proc", str(tmp_path / ("long" * 100))):
        done = hal_command("backend", "new", "mychip", "--dir", folder)
        assert (done.returncode, done.stdout) == (2, ""), done.stderr


def test_wrong_usage_has_status_two(hal_command: Any, tmp_path: Path) -> None:
    assert hal_command("backend", "new").returncode == 2
    assert hal_command("backend", "new", "cpu", "--dir", str(tmp_path)).returncode == 2
    assert hal_command("backend", "new", "mychip", "--dir", str(tmp_path / "nowhere")).returncode == 2
    assert list(tmp_path.iterdir()) == []
