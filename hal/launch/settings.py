# SPDX-License-Identifier: Apache-2.0
"""What `hal run` tells the processes of a run, through their environment."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, MutableMapping
from dataclasses import asdict, dataclass
from pathlib import Path

from hal.autoload import AUTOLOAD

VARIABLE = "HAL_RUN"
FIRST = "HAL_RUN_FIRST"
LAUNCHER = "HAL_RUN_LAUNCHER"
SITE = str(Path(__file__).parent / "site")


@dataclass(frozen=True)
class Settings:
    """One run.

    Attributes:
        device: as for `hal.adopt`; None leaves it to HAL_DEVICE.
        strict: refuse what may change results.
        report: the file for the report, absolute, or None.
        folder: where each process leaves its part of the report.
        command: what was asked to run, for the report.
        autoload: TORCH_DEVICE_BACKEND_AUTOLOAD as the user has it.
    """

    device: str | None
    strict: bool
    report: str | None
    folder: str
    command: tuple[str, ...]
    autoload: str | None = None

    def into(self, environ: MutableMapping[str, str], first: int | None) -> None:
        """Write the settings into an environment; `first` is the process that starts with the device open."""
        environ[VARIABLE] = json.dumps(asdict(self))
        environ["PYTHONPATH"] = os.pathsep.join(filter(None, (SITE, environ.get("PYTHONPATH"))))
        if first is None:
            environ.pop(FIRST, None)
        else:
            environ[FIRST] = str(first)
        if self.autoload is None:
            environ.pop(AUTOLOAD, None)
        else:
            environ[AUTOLOAD] = self.autoload


def from_environment(environ: Mapping[str, str]) -> Settings | None:
    """Return the settings of the run that this process belongs to, or None."""
    text = environ.get(VARIABLE)
    if text is None:
        return None
    fields = json.loads(text)
    return Settings(**{**fields, "command": tuple(fields["command"])})
