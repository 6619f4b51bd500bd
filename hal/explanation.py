# SPDX-License-Identifier: Apache-2.0
"""For every known backend: found, absent or broken, and why, found out by opening it in a child process.

A plug-in that hangs or kills its process costs its own child, nothing else. Nothing is opened here.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

from hal import plugins
from hal._process import run_python
from hal._report import read_reports
from hal.autoload import AUTOLOAD
from hal.backend import Claim, DeviceInfo, Discovery, Specificity
from hal.entry_points import Plugin
from hal.errors import PluginError
from hal.surveys import Survey, settle

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


def explain(*, timeout_s: float = TIMEOUT_S, admitted: Sequence[Plugin] | None = None) -> list[Explanation]:
    """Tell for every admitted backend whether it was found, is absent or is broken, and why.

    Args:
        timeout_s: how long one backend may take to import, list, open and compute.
        admitted: whom to ask; by default everyone whom HAL_BACKENDS admits.

    Raises:
        ConfigError: HAL_BACKENDS cannot be read.
    """
    if admitted is None:
        admitted = plugins.allowed()
    stop = threading.Event()
    with ThreadPoolExecutor(max_workers=max(1, min(len(admitted), os.cpu_count() or 1))) as pool:
        try:
            answers = list(pool.map(lambda plugin: _ask(plugin, timeout_s, stop), admitted))
        finally:
            stop.set()  # after an interrupt, or the pool would wait for every child to come to its end
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


def _ask(plugin: Plugin, timeout_s: float, stop: threading.Event) -> tuple[Explanation, list[Specificity]]:
    """Run `hal._child` for one plug-in and read what it reported before it ended, however it ended."""
    try:
        plugins.check_name(plugin)
    except PluginError as error:  # the child is told its plug-in by name, in a list of names
        return Explanation(plugin.name, plugin.owners, "broken", str(error)), []
    environment = {**os.environ, AUTOLOAD: "0", "HAL_BACKENDS": plugin.name}
    ending = run_python(
        "from hal._child import main; main(sys.argv[1])", plugin.name, environment=environment, timeout_s=timeout_s,
        stop=stop,
    )  # fmt: skip
    reports: dict[str, Any] = {"stage": "starting Python"}
    for said in read_reports(ending.output):
        reports.update(said)
    devices = [DeviceInfo(**{**d, "evidence": tuple(d["evidence"])}) for d in reports.get("devices", [])]
    specific = [Specificity(s) for s in reports.get("specificity", [])]
    if "status" not in reports:
        reports["status"] = "broken"
        reports["reason"] = f"{reports['stage']}: the process {ending.fault or 'ended without an answer'}"
        reports["detail"] = ending.errors[-4000:]
    answer = Explanation(
        plugin.name, plugin.owners, reports["status"], reports["reason"], tuple(devices),
        tuple(reports.get("left", ())), tuple(reports.get("advice", ())), reports.get("detail", ""),
    )  # fmt: skip
    return answer, specific
