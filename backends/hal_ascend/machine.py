# SPDX-License-Identifier: Apache-2.0
"""What a machine shows of its NPUs before one is opened: files, environment, installed packages."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata

from hal import machine


@dataclass(frozen=True)
class Machine(machine.Machine):
    """Where evidence is looked for.

    Attributes:
        packages: versions of installed distributions; None: those of this environment.
    """

    packages: Mapping[str, str] | None = None

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
            match = re.search(r"[Vv]ersion\D*?(\d[\w.]*)", self.read(f"{folder}/{name}") or "")
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
        text = self.read("/usr/local/Ascend/driver/version.info") or ""
        match = re.search(r"^Version=(\S+)", text, re.MULTILINE)
        return match[1] if match else None
