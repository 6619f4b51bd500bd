# SPDX-License-Identifier: Apache-2.0
"""The child process of `hal.explain`: imports, lists, opens and uses one backend, and reports each step at once."""

from __future__ import annotations

import traceback

from hal import plugins
from hal._report import Reporter
from hal.backend import Backend, advice_of
from hal.errors import Absent, HalError, described
from hal.registry import find_plugin, open_device
from hal.surveys import survey


def main(name: str) -> None:
    """Examine one backend, and report even what nobody foresaw."""
    reporter = Reporter()
    try:
        _examine(name, reporter)
    except BaseException as error:  # noqa: BLE001  this is what the parent wants to know
        _fail(reporter, error)


def _fail(reporter: Reporter, error: BaseException) -> None:
    cause = error.__cause__ or error
    # A device that was listed and then refuses as absent is no failure of the backend.
    absent = isinstance(error, Absent)
    reporter.say(
        status="absent" if absent else "broken",
        reason=str(error) if isinstance(error, HalError) else described(error),
        detail="" if absent else "".join(traceback.format_exception(type(cause), cause, cause.__traceback__)),
    )


def _advice(backend: Backend) -> list[str]:
    """Return the backend's advice; if it gives none that can be read, the advice to mend that."""
    try:
        return list(advice_of(backend))
    except Exception as error:  # noqa: BLE001  what it has to say decides nothing about whether its devices work
        return [f"the plug-in is at fault: advice() failed with {described(error)}"]


def _examine(name: str, reporter: Reporter) -> None:
    plugin = find_plugin(name)
    answer = survey(plugin, lambda stage: reporter.say(stage=stage))
    claims = answer.discovery.claims
    reporter.say(
        devices=[claim.info.as_json() for claim in claims],
        specificity=[int(claim.specificity) for claim in claims],
        left=list(answer.discovery.left),
    )
    if not answer.broken:
        # Where the hardware seems absent, too: what is missing may be only the right build of a library.
        reporter.say(stage="asking for its advice")
        reporter.say(advice=_advice(plugins.load(plugin)))
    if answer.error is not None:
        _fail(reporter, answer.error)
        return
    if not claims:
        reporter.say(status="absent", reason="; ".join(answer.discovery.left) or "it found no device")
        return
    # Devices of one backend share driver and libraries; the first one stands for them.
    first = claims[0].info
    reporter.say(stage=f"opening {first.id}")
    with open_device(first.id) as device:
        import torch

        reporter.say(stage=f"computing on {first.id}")
        twos = torch.ones(64, 64, device=device.torch_device) @ torch.full((64, 64), 2.0, device=device.torch_device)
        device.synchronize()
        total = float(twos.cpu().sum())
    if total != 64 * 64 * 128:
        reporter.say(status="broken", reason=f"{first.id} computed {total} where {64 * 64 * 128} is exact")
        return
    reporter.say(status="found", reason=f"{len(claims)} found, {first.id} opened and computed")
