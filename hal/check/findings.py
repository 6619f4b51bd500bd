# SPDX-License-Identifier: Apache-2.0
"""What a check found, and the parent process, which outlives whatever a backend does to the child."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from typing import Literal

from hal import plugins
from hal._process import run_python
from hal.errors import Absent, Broken, HalError, PluginError
from hal.explain import TIMEOUT_S
from hal.registry import AUTOLOAD, find_plugin
from hal.surveys import survey

MARK = "hal-check "
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

    plugin = find_plugin(name)
    answer = survey(plugin)
    if answer.error is not None:
        raise answer.error if isinstance(answer.error, (Absent, Broken, PluginError)) else _broken(name, answer.error)
    if not answer.discovery.claims:
        raise Absent("; ".join(answer.discovery.left) or "it found no device", device=name)
    return _run(plugin, PARTS, timeout_s)


def _broken(name: str, error: HalError) -> Broken:
    broken = Broken(error.message, device=name, expected=error.expected, hint=error.hint)
    broken.__cause__ = error
    return broken


def _run(plugin: plugins.Plugin, parts: tuple[str, ...], timeout_s: float) -> list[Finding]:
    environment = {**os.environ, AUTOLOAD: "0", "HAL_BACKENDS": plugin.name}
    ending = run_python(
        "from hal.check.child import main; main(sys.argv[1])", plugin.name, environment=environment, timeout_s=timeout_s
    )
    found: dict[str, Finding] = {}
    running = None
    for line in ending.output.splitlines():
        if not line.startswith(MARK):
            continue
        try:
            said = json.loads(line.removeprefix(MARK))
        except ValueError:  # a line that a dying child did not finish
            continue
        if not isinstance(said, dict):
            continue
        if "refused" in said:
            raise (Absent if said["absent"] else Broken)(said["refused"], device=plugin.name)
        running = said.get("running", running)
        if "part" in said:
            found[said["part"]] = Finding(**said)
    fault = f"the process {ending.fault or 'ended'}" + (f": {ending.last_line()}" if ending.last_line() else "")
    findings = []
    for part in parts:
        if part in found:
            findings.append(found[part])
        elif part == running:
            findings.append(Finding(part, "fails", fault))
        else:
            findings.append(Finding(part, "fails", f"not tried: {fault} at {running}"))
    return findings
