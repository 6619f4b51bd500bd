# SPDX-License-Identifier: Apache-2.0
"""What a machine shows of its NPUs before one is opened: files, environment, installed packages."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path


@dataclass(frozen=True)
class Machine:
    """Where evidence is looked for. The fields are what a test replaces.

    Attributes:
        root: of the file system.
        environ: environment variables; None: those of this process.
        packages: versions of installed distributions; None: those of this environment.
    """

    root: Path = Path("/")
    environ: Mapping[str, str] | None = None
    packages: Mapping[str, str] | None = None

    def variable(self, name: str) -> str | None:
        """Return an environment variable."""
        return (os.environ if self.environ is None else self.environ).get(name)

    def files(self, pattern: str) -> list[str]:
        """Return the files that match, by number."""
        found = ["/" + str(path.relative_to(self.root)) for path in self.root.glob(pattern.lstrip("/"))]
        return sorted(found, key=lambda name: [int(n) for n in re.findall(r"\d+", name)])

    def version(self, package: str) -> str | None:
        """Return the version of an installed package."""
        if self.packages is not None:
            return self.packages.get(package)
        try:
            return metadata.version(package.replace("_", "-"))
        except metadata.PackageNotFoundError:
            return None

    def toolkit(self) -> str | None:
        """Return the folder of CANN: what its `set_env.sh` sets, or its usual place."""
        for name in ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME"):
            value = self.variable(name)
            if value:
                return value
        usual = "/usr/local/Ascend/ascend-toolkit/latest"
        return usual if (self.root / usual.lstrip("/")).exists() else None

    def toolkit_version(self) -> str | None:
        """Return CANN's version, from its own file."""
        folder = self.toolkit()
        if folder is None:
            return None
        for name in ("version.cfg", "compiler/version.info", "runtime/version.info"):
            try:
                text = (self.root / folder.lstrip("/") / name).read_text(encoding="utf-8", errors="replace")
            except OSError:
                continue
            match = re.search(r"[Vv]ersion\D*?(\d[\w.]*)", text)
            if match:
                return match[1]
        return None

    def visible(self, count: int) -> int:
        """Return how many of `count` devices ASCEND_RT_VISIBLE_DEVICES shows, as torch_npu reads it.

        What is no digit or comma ends the list, as does a number that is too large; numbers that do not ascend
        empty it (torch_npu/npu/__init__.py, `_parse_visible_devices` and `_device_count_ascend_hal`).
        """
        setting = self.variable("ASCEND_RT_VISIBLE_DEVICES")
        if setting is None:
            return count
        shown: list[int] = []
        for entry in re.match(r"[0-9,]*", setting)[0].split(","):  # type: ignore[index]  # it always matches
            if not entry:
                break
            if shown and int(entry) <= shown[-1]:
                return 0
            if int(entry) >= count:
                break
            shown.append(int(entry))
        return len(shown)

    def driver_version(self) -> str | None:
        """Return the driver's version, from its own file."""
        try:
            text = (self.root / "usr/local/Ascend/driver/version.info").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None
        match = re.search(r"^Version=(\S+)", text, re.MULTILINE)
        return match[1] if match else None
