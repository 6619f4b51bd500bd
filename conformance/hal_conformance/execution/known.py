# SPDX-License-Identifier: Apache-2.0
"""Faults of somebody else's that are documented, and the evidence that a red result is one of them: KNOWN, amber.

A fault excuses nothing by its name. It must show in an example on this very machine. What is red must have its symptom
and no other. Then it is run again in new processes (`retrial`), of which some have not the one thing that brings the
fault on: it must not be red in any of these, and must have the symptom in each of the others.

oneDNN issue 5717 (fixed by its pull request 5723, of July 2026): on processors with AMX, a bfloat16 product whose K is
no multiple of 32 may read past the end of its rows, depending on its other sizes. What lies there is multiplied by
zero, which leaves NaN and infinities: a row of NaN makes a neighbour NaN, and so does what lies behind a matrix that is
part of another. Without AMX (`AVOIDED`), which the library's own switch turns off for all of a process, it does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from hal_conformance.execution.judging import judge_outputs
from hal_conformance.numerics.absent import blank, can_be_absent, is_absent, partial
from hal_conformance.verdicts import Status

if TYPE_CHECKING:
    from hal.contract import Contract
    from hal_conformance.case import Array
    from hal_conformance.execution.observation import Observation
    from hal_conformance.execution.plan import Task

FLAG = "faults.onednn_5717"

AVOIDED = {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}
"""Environment of a process that has not what brings the fault on."""

_SHOWN, _NOT_SHOWN = "shown", "not shown"
WHERE = "https://github.com/uxlfoundation/oneDNN/issues/5717"


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
    rest, leaked = dict(outputs), False
    for name, array in outputs.items():
        # Of an output that is too large nothing was held: one element in memory, however many it has (`Packed.array`).
        if can_be_absent(array.dtype) and (array.size < 2 or any(array.strides)):
            lost = ~np.isfinite(array) & ~is_absent(array)
            if lost.any():
                rest[name], leaked = np.where(lost, blank(array.shape, array.dtype), array), True
    if not leaked:
        return False
    with partial(None, whole=False):
        return judge_outputs(task, rest, hashes, contract).status.colour != "red"


def suspected(facts: Mapping[str, Any], contract: Contract, observation: Observation, status: Status) -> bool:
    """Return whether what is red on a device may be its fault: the device has it, and this is the symptom."""
    task, outputs = observation.task, observation.outputs
    return shows(facts, task.params.dtype) and is_symptom(task, status, outputs, observation.hashes, contract)
