# SPDX-License-Identifier: Apache-2.0
"""Small installed distributions, made on the spot: a module, its metadata and its entry points."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hal import plugins

STUB = """
from hal.backend import Backend, Claim, DeviceInfo, Discovery, Specificity

class Stub(Backend):
    plugin_api = (1, 0)
    name = "{name}"
    vendor = "nobody"

    def discover(self):
        info = DeviceInfo(id="{name}:0", backend="{name}", vendor="nobody", name=None, arch=None, total_memory=None,
                          torch_device="{torch_device}", evidence=("a stub",))
        return Discovery((Claim(info, Specificity.{specificity}),))

    def open(self, info, changes):
{open}

backend = Stub()
"""

OPENS_ON_CPU = """
        from hal_cpu.backend import backend as cpu
        return cpu.open(info, changes)
"""


class Distributions:
    """Makes distributions that this process and its children see as installed."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.monkeypatch = monkeypatch
        self.modules: list[str] = []

    def add(
        self, module: str, code: str, entries: dict[str, dict[str, str]], *, dist: str, version: str = "1.0"
    ) -> Path:
        """Install a module under entry points {group: {name: value}}; return the folder that was put on the path."""
        # A folder for each: importlib.metadata caches a folder's listing.
        site = self.folder / dist
        info = site / f"{dist.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (site / f"{module}.py").write_text(code)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: {version}\n")
        lines = [
            line
            for group, pairs in entries.items()
            for line in (f"[{group}]", *(f"{name} = {value}" for name, value in pairs.items()))
        ]
        (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
        self.monkeypatch.syspath_prepend(site)
        inherited = os.environ.get("PYTHONPATH")
        self.monkeypatch.setenv("PYTHONPATH", str(site) if not inherited else f"{site}{os.pathsep}{inherited}")
        self.modules.append(module)
        return site

    def backend(self, name: str, code: str, *, dist: str | None = None, version: str = "1.0") -> str:
        """Install a module that is registered as a backend; return the distribution as hal names it."""
        dist = dist or f"dist-{name}"
        module = "fake_" + dist.replace("-", "_")
        self.add(module, code, {"hal.backends": {name: f"{module}:backend"}}, dist=dist, version=version)
        return f"{dist} {version}"

    def stub(self, name: str, *, opens: str = OPENS_ON_CPU, torch_device: str | None = None,
             specificity: str = "PLATFORM") -> str:  # fmt: skip
        """Install a backend with one device, whose `open` runs the given lines."""
        body = textwrap.indent(textwrap.dedent(opens).strip(), " " * 8)
        code = STUB.format(name=name, open=body, torch_device=torch_device or f"{name}:0", specificity=specificity)
        return self.backend(name, code)

    def malformed(self, dist: str, text: str = "[hal.backends]\nthis is no entry point\n") -> str:
        """Install a distribution whose entry points cannot be read; return it as hal names it."""
        site = self.add(f"fake_{dist}", "", {}, dist=dist)
        (site / f"{dist}-1.0.dist-info" / "entry_points.txt").write_text(text)
        return f"{dist} 1.0"

    def forget(self) -> None:
        """Drop the modules from this process."""
        for module in self.modules:
            sys.modules.pop(module, None)
        # Loaded plug-ins stay for the life of a process; here a name means another module in the next test.
        for key in [key for key in plugins._loaded if "fake_" in key[1]]:
            del plugins._loaded[key]


@pytest.fixture
def distributions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Distributions]:
    monkeypatch.delenv("HAL_BACKENDS", raising=False)
    monkeypatch.delenv("HAL_DEVICE", raising=False)
    made = Distributions(tmp_path / "sites", monkeypatch)
    yield made
    made.forget()


@pytest.fixture
def hal_command() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the `hal` command in a process of its own."""

    def run(*arguments: str, **environment: str) -> Any:
        return subprocess.run(
            [sys.executable, "-m", "hal.cli.main", *arguments],
            env={**os.environ, **environment}, capture_output=True, text=True, check=False, timeout=300,
        )  # fmt: skip

    return run
