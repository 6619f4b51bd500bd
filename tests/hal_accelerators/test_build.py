# SPDX-License-Identifier: Apache-2.0
"""What a torch was built for is read from its files; one that does not say it is broken, and not absent."""

import json
import os
import subprocess
import sys

import pytest

import hal_cuda.build
from hal import Broken
from hal_cuda.build import TorchBuild, torch_build


@pytest.fixture
def first_on_the_path(tmp_path, monkeypatch):
    """Put a folder `torch` with these files before the one that is installed, in a process that has not imported it."""

    def put(**files):
        (tmp_path / "torch").mkdir()
        for name, text in files.items():
            (tmp_path / "torch" / f"{name}.py").write_bytes(text)
        monkeypatch.syspath_prepend(tmp_path)
        for module in [name for name in sys.modules if name == "torch" or name.startswith("torch.")]:
            monkeypatch.delitem(sys.modules, module)
        return tmp_path

    return put


def test_the_build_is_read_without_importing_torch(first_on_the_path):
    first_on_the_path(
        __init__=b"raise OSError", version=b"__version__ = '2.9.1+rocm6.4'\ncuda = None\nhip: str = '6.4'"
    )
    assert torch_build() == TorchBuild("2.9.1+rocm6.4", None, "6.4")


BROKEN = {
    "a file that is missing": {"__init__": b""},
    "a file that is empty": {"__init__": b"", "version": b""},
    "a file that is no Python": {"__init__": b"", "version": b"__version__ = "},
    "a file that is no text": {"__init__": b"", "version": b"\x00\xff"},
    "a folder that is no package": {"leftover": b""},
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_torch_that_does_not_say_it_is_broken(first_on_the_path, what):
    folder = first_on_the_path(**BROKEN[what])
    if what == "a folder that is no package":  # Python prefers a package that comes later on the path
        sys.path[:] = [str(folder)]
    with pytest.raises(Broken, match=r"torch: .*version\.py does not tell its build"):
        torch_build()


def test_no_torch_at_all_is_none(monkeypatch):
    monkeypatch.setattr(hal_cuda.build.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "torch.version", raising=False)
    assert torch_build() is None


def test_backends_that_cannot_tell_do_not_say_that_torch_is_not_installed(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise OSError('damaged')")
    environment = {**os.environ, "HAL_BACKENDS": "cpu,cuda,rocm", "PYTHONPATH": str(tmp_path)}
    inherited = os.environ.get("PYTHONPATH")
    if inherited:
        environment["PYTHONPATH"] += os.pathsep + inherited
    done = subprocess.run(
        [sys.executable, "-m", "hal.cli.main", "devices", "--json"], env=environment, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert [device["id"] for device in json.loads(done.stdout)["devices"]] == ["cpu"]
    assert "not installed" not in done.stderr
    for name in ("cuda", "rocm"):
        assert f"{name}: BROKEN: torch: {tmp_path}" in done.stderr
