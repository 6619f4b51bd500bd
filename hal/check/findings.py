# SPDX-License-Identifier: Apache-2.0
"""What a check found, and the parent process, which outlives whatever a backend does to the child."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any, Literal

from hal._process import run_python
from hal._report import read_reports
from hal.autoload import AUTOLOAD
from hal.entry_points import Plugin
from hal.errors import Absent, Broken
from hal.explanation import TIMEOUT_S
from hal.registry import find_plugin

Outcome = Literal["fulfilled", "unsupported", "fails"]


@dataclass(frozen=True)
class Finding:
    """One part of the interface.

    Attributes:
        part: `facet.what`.
        outcome: "fulfilled": it was tried and is right; "unsupported": the backend says that it lacks it;
            "fails": it does something else than the interface says.
        detail: what was seen.
    """

    part: str
    outcome: Outcome
    detail: str

    def as_json(self) -> dict[str, str]:
        """Return it as plain JSON values."""
        return asdict(self)


def check_backend(name: str, *, timeout_s: float = TIMEOUT_S) -> list[Finding]:
    """Try every part of the interface on a backend's first device, in a child process.

    Args:
        name: of the backend.
        timeout_s: how long all of it may take.

    Raises:
        UnknownDevice: no such backend is registered, or HAL_BACKENDS does not admit it.
        Absent: it finds no device here, so there is nothing to try it on.
        Broken: it cannot be loaded, or cannot list or open its device.
    """
    from hal.check.checks import PARTS

    plugin: Plugin = find_plugin(name)
    environment = {**os.environ, AUTOLOAD: "0", "HAL_BACKENDS": plugin.name}
    ending = run_python(
        "from hal.check.child import main; main(sys.argv[1])", plugin.name, environment=environment, timeout_s=timeout_s
    )
    fault = f"the process {ending.fault or 'ended'}" + (f": {ending.last_line()}" if ending.last_line() else "")
    said: dict[str, Any] = {"stage": "starting Python", "running": None}
    found: dict[str, Finding] = {}
    for report in read_reports(ending.output):
        if "part" in report:
            found[report["part"]] = Finding(**report)
        said.update(report)
    if "refused" in said:
        raise (Absent if said["absent"] else Broken)(said["refused"], device=name)
    if said["stage"] is not None:  # it died before there was a device to try anything on
        raise Broken(f"{said['stage']}: {fault}", device=name)
    findings = []
    for part in PARTS:
        if part in found:
            findings.append(found[part])
        elif part == said["running"]:
            findings.append(Finding(part, "fails", fault))
        else:
            findings.append(Finding(part, "fails", f"not tried: {fault} at {said['running']}"))
    return findings
