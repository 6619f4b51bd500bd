# SPDX-License-Identifier: Apache-2.0
"""The child process of `hal.explain`: imports, lists, opens and uses one backend, and reports each step at once.

`hal.explain` runs `main(NAME)`. Each report is one line on stdout that starts with `hal-report `.
"""

from __future__ import annotations

import json
import sys
import traceback
from typing import Any

from hal import plugins
from hal.errors import Absent, HalError
from hal.registry import open_device, survey


def report(**facts: Any) -> None:
    """Report facts now: the next step may kill this process."""
    # A plug-in may have printed half a line before.
    sys.stdout.write("\nhal-report " + json.dumps(facts) + "\n")
    sys.stdout.flush()


def _fail(error: BaseException, status: str = "broken") -> None:
    cause = error.__cause__ or error
    report(
        status=status,
        reason=str(error) if isinstance(error, HalError) else f"{type(error).__name__}: {error}",
        detail=""
        if status == "absent"
        else "".join(traceback.format_exception(type(cause), cause, cause.__traceback__)),
    )


def main(name: str) -> None:
    """Examine one backend, and report even what nobody foresaw."""
    try:
        _examine(name)
    except (Exception, SystemExit) as error:  # noqa: BLE001  this is what the parent wants to know
        _fail(error)


def _examine(name: str) -> None:
    plugin = next(p for p in plugins.allowed() if p.name == name)
    answer = survey(plugin)
    if answer.error is not None:
        _fail(answer.error, "absent" if isinstance(answer.error, Absent) else "broken")
        return
    claims = answer.discovery.claims
    report(
        devices=[claim.info.as_json() for claim in claims],
        specificity=[int(claim.specificity) for claim in claims],
        left=list(answer.discovery.left),
        advice=list(plugins.load(plugin).advice()),
    )
    if not claims:
        report(status="absent", reason="; ".join(answer.discovery.left) or "it found no device")
        return
    # Devices of one backend share driver and libraries; the first one stands for them.
    first = claims[0].info
    report(stage=f"opening {first.id}")
    try:
        with open_device(first.id) as device:
            import torch

            report(stage=f"computing on {first.id}")
            twos = torch.ones(64, 64, device=device.torch_device) @ torch.full(
                (64, 64), 2.0, device=device.torch_device
            )
            device.synchronize()
            total = float(twos.cpu().sum())
            if total != 64 * 64 * 128:
                report(status="broken", reason=f"{first.id} computed {total} where {64 * 64 * 128} is exact")
                return
    except HalError as error:
        # A device that was listed and then refuses as absent is no failure of the backend.
        _fail(error, "absent" if isinstance(error, Absent) else "broken")
    except (Exception, SystemExit) as error:  # noqa: BLE001
        _fail(error)
    else:
        report(status="found", reason=f"{len(claims)} found, {first.id} opened and computed")
