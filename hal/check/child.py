# SPDX-License-Identifier: Apache-2.0
"""The child process of `hal backend check`: opens the first device and reports each part as soon as it is tried."""

from __future__ import annotations

import warnings
from typing import Any

from hal import plugins
from hal._report import Reporter
from hal.check import checks
from hal.check.state import ProcessState
from hal.errors import Absent, DeviceError, Unsupported
from hal.registry import find_plugin, open_device
from hal.surveys import survey


def main(name: str) -> None:
    """Check one backend, and report even what nobody foresaw."""
    reporter = Reporter()
    try:
        _check(name, reporter)
    except BaseException as error:  # noqa: BLE001  this is what the parent wants to know
        reason = error.reason if isinstance(error, DeviceError) else str(error)
        reporter.say(refused=reason or type(error).__name__, absent=isinstance(error, Absent))


def _check(name: str, reporter: Reporter) -> None:
    plugin = find_plugin(name)
    answer = survey(plugin, lambda stage: reporter.say(stage=stage))
    if answer.error is not None:
        raise answer.error
    if not answer.discovery.claims:
        raise Absent("; ".join(answer.discovery.left) or "it found no device", device=name)
    reporter.say(stage=None)
    backend = plugins.load(plugin)
    for part, unopened in checks.BEFORE_OPEN.items():
        _try(reporter, part, unopened, backend)
    before = ProcessState()
    first = answer.discovery.claims[0].info.id
    reporter.say(stage=f"opening {first}")
    device = open_device(first)
    reporter.say(stage=None)
    for part, just_opened in checks.JUST_OPENED.items():
        _try(reporter, part, just_opened, device, before)
    for part, opened in checks.OPENED.items():
        _try(reporter, part, opened, device)
    for part, closed in checks.CLOSED.items():
        _try(reporter, part, closed, device, before)


def _try(reporter: Reporter, part: str, check: Any, *arguments: Any) -> None:
    reporter.say(running=part)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outcome, detail = "fulfilled", check(*arguments)
    except Unsupported as error:
        outcome, detail = "unsupported", error.reason
    except checks.Failed as error:
        outcome, detail = "fails", str(error)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001  any other error is a finding
        first = (str(error).strip().splitlines() or [""])[0]
        outcome, detail = "fails", f"raised {type(error).__name__}: {first}"
    reporter.say(part=part, outcome=outcome, detail=detail)
