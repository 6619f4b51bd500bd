# SPDX-License-Identifier: Apache-2.0
"""The child process of `hal backend check`: opens the first device and reports each part as soon as it is tried."""

from __future__ import annotations

import json
import sys
import warnings
from typing import Any

from hal import plugins
from hal.check import checks
from hal.check.findings import MARK
from hal.errors import Absent, HalError, Unsupported
from hal.registry import open_device


def say(**facts: Any) -> None:
    """Report facts now: the next part may kill this process."""
    sys.stdout.write(f"\n{MARK}{json.dumps(facts)}\n")
    sys.stdout.flush()


def main(name: str) -> None:
    """Check the one backend that HAL_BACKENDS admits."""
    backend = plugins.load(plugins.allowed()[0])
    for part, before in checks.BEFORE_OPEN.items():
        _try(part, before, backend)
    state = checks.process_state()
    try:
        device = open_device(backend.discover().claims[0].info.id)
    except HalError as error:
        say(refused=str(error).removeprefix(f"{name}: "), absent=isinstance(error, Absent))
        return
    for part, opened in checks.OPENED.items():
        _try(part, opened, device)
    device.close()
    for part, closed in checks.CLOSED.items():
        _try(part, closed, device, state)


def _try(part: str, check: Any, *arguments: Any) -> None:
    say(running=part)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outcome, detail = "fulfilled", check(*arguments)
    except Unsupported as error:
        outcome, detail = "unsupported", error.reason
    except checks.Failed as error:
        outcome, detail = "fails", str(error)
    except (Exception, SystemExit) as error:  # noqa: BLE001  any other error is a finding
        first = (str(error).strip().splitlines() or [""])[0]
        outcome, detail = "fails", f"raised {type(error).__name__}: {first}"
    say(part=part, outcome=outcome, detail=detail)
