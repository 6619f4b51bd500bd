# SPDX-License-Identifier: Apache-2.0
"""Faults of somebody else's that are documented, and the evidence that a red result is one of them: KNOWN, amber.

A fault excuses nothing by its name. It must show in an example on this very machine. What is red must have its symptom
and no other. Then it is run again in two new processes that do the same in the same order, one of which has not the one
thing that brings the fault on: there it must be green, and in the other one the same elements must have the symptom. So
what comes and goes with time, or with what lies in memory, is another fault.

oneDNN issue 5717 (fixed by its pull request 5723, of July 2026): on processors with AMX, a bfloat16 product whose K is
no multiple of 32 may read past the end of its rows, depending on its other sizes. What lies there is multiplied by
zero, which leaves NaN and infinities: a row of NaN makes a neighbour NaN, and so does what lies behind a matrix that is
part of another. Without AMX (`AVOIDED`), which the library's own switch turns off for all of a process, it does not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from hal_conformance.absent import blank, can_be_absent, partial
from hal_conformance.judging import judge_outputs
from hal_conformance.results import Result
from hal_conformance.verdicts import Judgement, Status

if TYPE_CHECKING:
    from hal.contract import Contract
    from hal_conformance.case import Array
    from hal_conformance.plan import Task
    from hal_conformance.runner import Observation

Verdict = TypeVar("Verdict", Judgement, Result)

FLAG = "faults.onednn_5717"

AVOIDED = {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}
"""Environment of a process that has not what brings the fault on."""

_SHOWN, _NOT_SHOWN = "shown", "not shown"
_WHERE = "https://github.com/uxlfoundation/oneDNN/issues/5717"


def readings(device: Any) -> dict[str, str]:
    """Return for each fault that a device could have whether it shows there: for the manifest."""
    if device.torch_device.type != "cpu":
        return {}
    try:
        return {FLAG: _SHOWN if _leaks() else _NOT_SHOWN}
    except RuntimeError as error:  # no such product on this device, such as a simulated one
        return {FLAG: f"cannot be tried ({type(error).__name__})"}


def _leaks() -> bool:
    import torch

    rows = torch.ones(33, 33, dtype=torch.bfloat16)
    rows[32] = torch.nan
    return bool((rows @ torch.ones(48, 33, dtype=torch.bfloat16).T)[:32].isnan().any())


_OF_NUMBERS = frozenset({Status.FAIL_NUMERIC, Status.FAIL_DISCRETE, Status.FAIL_NONFINITE})


def shows(facts: Mapping[str, Any], dtype: str) -> bool:
    """Return whether a device has the fault, and results of a dtype can.

    Args:
        facts: the device's, as in a manifest; a forged one may hold anything.
        dtype: of the result.
    """
    info, versions, flags = (facts.get(part) for part in ("info", "versions", "flags"))
    if not (isinstance(info, dict) and isinstance(versions, dict) and isinstance(flags, dict)):
        return False
    on_amx = "amx" in str(versions.get("instructions") or "amx")  # an older torch does not say
    return dtype == "bfloat16" and info.get("torch_device") == "cpu" and on_amx and flags.get(FLAG) == _SHOWN


def avoids(facts: Mapping[str, Any]) -> bool:
    """Return whether the fault does not show in a process: the example there was right."""
    return bool(facts.get("flags", {}).get(FLAG) == _NOT_SHOWN)


def is_symptom(
    task: Task, status: Status, outputs: Mapping[str, Array], hashes: Mapping[str, str], contract: Contract
) -> bool:
    """Return whether nothing is wrong with outputs but NaN and infinities, in a case that multiplies matrices.

    The others are judged as if these were not held (absent.py): then nothing may be red.
    """
    if status not in _OF_NUMBERS or not task.case.multiplies:
        return False
    rest, leaked = {}, False
    for name, array in outputs.items():
        rest[name] = array
        if can_be_absent(array.dtype) and not (finite := np.isfinite(array)).all():
            rest[name] = np.where(finite, array, blank(array.shape, array.dtype))
            leaked = True
    if not leaked:
        return False
    with partial(None, whole=False):
        return judge_outputs(task, rest, hashes, contract).status.colour != "red"


def leak(facts: Mapping[str, Any], contract: Contract, observation: Observation, status: Status) -> str:
    """Return what tells one leak from another, the places of NaN and infinities, of what is red on a device.

    Empty if it cannot be its fault: the device does not have it, or this is not the symptom.
    """
    task, outputs = observation.task, observation.outputs
    if not shows(facts, task.params.dtype) or not is_symptom(task, status, outputs, observation.hashes, contract):
        return ""
    places = hashlib.sha256()
    for name, array in sorted(outputs.items()):
        if can_be_absent(array.dtype):
            places.update(f"{name} {array.shape}".encode() + np.isfinite(array).tobytes())
    return places.hexdigest()


def excused(found: Verdict, again: bool, without: Verdict) -> Verdict:
    """Return the verdict on what is red, and was run twice more.

    Args:
        found: the verdict on it.
        again: whether the same leaked when it was run once more.
        without: the verdict without what brings the fault on.
    """
    if not again or without.status.colour != "green":
        return found
    without_it = f"{without.status.value} without AMX, a fault of oneDNN's ({_WHERE})"
    detail = f"{without_it}; with it {found.status.value}: {found.detail}"
    return replace(found, status=Status.KNOWN, detail=detail)
