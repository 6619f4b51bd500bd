# SPDX-License-Identifier: Apache-2.0
"""For every known backend: found, absent or broken, and why, found out by opening it in a child process.

A plug-in that hangs or kills its process costs its own child, nothing else. Nothing is opened here.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from hal import plugins
from hal.backend import Claim, DeviceInfo, Discovery, Specificity
from hal.registry import AUTOLOAD, Survey, settle

TIMEOUT_S = 120.0
"""Generous: a cold import of torch and a first initialisation of a driver take tens of seconds."""


@dataclass(frozen=True)
class Explanation:
    """What is known about one backend on this machine.

    Attributes:
        backend: its name.
        owners: the distributions that register it.
        status: "found": at least one device opened and computed; "absent": no such hardware; "broken": it is
            there and does not work.
        reason: why, in one line.
        devices: what it found, whether or not it opened.
        left: devices that it saw and left to others, with the reason.
        advice: what the backend has to say about this machine.
        detail: the traceback, if there is one.
    """

    backend: str
    owners: tuple[str, ...]
    status: Literal["found", "absent", "broken"]
    reason: str
    devices: tuple[DeviceInfo, ...] = ()
    left: tuple[str, ...] = ()
    advice: tuple[str, ...] = ()
    detail: str = ""

    def as_json(self) -> dict[str, object]:
        """Return it as plain JSON values."""
        return {**self.__dict__, "owners": list(self.owners), "left": list(self.left), "advice": list(self.advice),
                "devices": [info.as_json() for info in self.devices]}  # fmt: skip


def explain(*, timeout_s: float = TIMEOUT_S) -> list[Explanation]:
    """Tell for every admitted backend whether it was found, is absent or is broken, and why.

    Args:
        timeout_s: how long one backend may take to import, list, open and compute.

    Raises:
        ConfigError: HAL_BACKENDS cannot be read.
    """
    admitted = plugins.allowed()
    with ThreadPoolExecutor(max_workers=max(1, min(len(admitted), os.cpu_count() or 1))) as pool:
        answers = list(pool.map(lambda plugin: _ask(plugin, timeout_s), admitted))
    surveys = [
        Survey(
            a.backend, a.owners, Discovery(tuple(Claim(i, s) for i, s in zip(a.devices, specific, strict=True))), None
        )
        for a, specific in answers
    ]
    lost = settle(surveys)[1]
    return [_without(answer, lost) for answer, _ in answers]


def _without(answer: Explanation, lost: dict[str, str]) -> Explanation:
    kept = tuple(info for info in answer.devices if info.id not in lost)
    gone = tuple(f"{info.id}: {lost[info.id]}" for info in answer.devices if info.id in lost)
    if not gone:
        return answer
    status, reason = (answer.status, answer.reason) if kept else ("absent", "; ".join(gone))
    return Explanation(
        answer.backend, answer.owners, status, reason, kept, answer.left + gone, answer.advice, answer.detail
    )  # fmt: skip


def _ask(plugin: plugins.Plugin, timeout_s: float) -> tuple[Explanation, list[Specificity]]:
    """Run `hal._child` for one plug-in and read what it reported before it ended, however it ended."""
    environment = {**os.environ, AUTOLOAD: "0", "HAL_BACKENDS": plugin.name}
    command = [sys.executable, "-m", "hal._child", plugin.name]
    try:
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout_s, check=False
        )
        code, output, errors = done.returncode, done.stdout, done.stderr
        ending = "" if code == 0 else _ending(code)
    except subprocess.TimeoutExpired as expired:
        output, errors = expired.stdout or b"", expired.stderr or b""
        ending = f"did not answer within {timeout_s:g} s"
    reports: dict[str, object] = {"stage": "importing it"}
    for line in output.decode(errors="replace").splitlines():
        # A plug-in may print; only lines with the mark are the child's own.
        if line.startswith("hal-report "):
            reports.update(json.loads(line.removeprefix("hal-report ")))
    devices = [DeviceInfo(**{**d, "evidence": tuple(d["evidence"])}) for d in reports.get("devices", [])]  # type: ignore[attr-defined]
    status, reason = reports.get("status"), str(reports.get("reason", ""))
    detail = str(reports.get("detail", ""))
    if status is None:
        status, reason = "broken", f"{reports['stage']}: the process {ending or 'ended without an answer'}"
        detail = errors.decode(errors="replace")[-4000:]
    specific = [Specificity(s) for s in reports.get("specificity", [])]  # type: ignore[attr-defined]
    answer = Explanation(
        plugin.name, plugin.owners, status, reason, tuple(devices),  # type: ignore[arg-type]
        tuple(reports.get("left", ())), tuple(reports.get("advice", ())), detail,  # type: ignore[arg-type]
    )  # fmt: skip
    return answer, specific


def _ending(code: int) -> str:
    if code < 0:
        try:
            return f"was killed by {signal.Signals(-code).name}"
        except ValueError:
            return f"was killed by signal {-code}"
    return f"ended with status {code}"
