# SPDX-License-Identifier: Apache-2.0
"""Faults of somebody else's that are documented, and the evidence that a red result is one of them: KNOWN, amber.

A fault excuses nothing by its name. It must show in an example on this very machine, and the case that is red must be
green when it is run once more without what has the fault. An implementation that is wrong by itself stays red.

oneDNN issue 5717 (fixed by its pull request 5723, of July 2026): on processors with AMX, a bfloat16 product whose K is
above 32 and no multiple of 32 reads past the end of its rows. What lies there is multiplied by zero, which leaves NaN
and infinities: a row of NaN makes a neighbour NaN, and so does what lies behind a matrix that is part of another.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from hal_conformance.results import Result
from hal_conformance.verdicts import Judgement, Status

FLAG = "faults.onednn_5717"
_SHOWN = "shown"
_WHERE = "https://github.com/uxlfoundation/oneDNN/issues/5717"


def readings(device: Any) -> dict[str, str]:
    """Return for each fault that a device could have whether it shows there: for the manifest."""
    if device.torch_device.type != "cpu":
        return {}
    try:
        return {FLAG: _SHOWN if _leaks() else "not shown"}
    except RuntimeError as error:  # no such product on this device, such as a simulated one
        return {FLAG: f"cannot be tried ({type(error).__name__})"}


def _leaks() -> bool:
    import torch

    rows = torch.ones(33, 33, dtype=torch.bfloat16)
    rows[32] = torch.nan
    return bool((rows @ torch.ones(48, 33, dtype=torch.bfloat16).T)[:32].isnan().any())


_OF_NUMBERS = frozenset({Status.FAIL_NUMERIC, Status.FAIL_DISCRETE, Status.FAIL_NONFINITE})


def may_excuse(facts: Mapping[str, Any], dtype: str, status: Status) -> bool:
    """Return whether a result may be due to a fault that shows on its device.

    Args:
        facts: the device's, as in a manifest; a forged one may hold anything.
        dtype: of the result.
        status: of the result.
    """
    flags = facts.get("flags")
    return status in _OF_NUMBERS and dtype == "bfloat16" and isinstance(flags, dict) and flags.get(FLAG) == _SHOWN


@contextlib.contextmanager
def avoided() -> Iterator[None]:
    """Compute without the library that has the fault."""
    import torch

    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)


Verdict = TypeVar("Verdict", Judgement, Result)


def excused(found: Verdict, without: Verdict) -> Verdict:
    """Return the verdict on what is red, and is judged once more without what has the fault."""
    if without.status.colour != "green":
        return found
    without_it = f"{without.status.value} without oneDNN, whose fault it is ({_WHERE})"
    detail = f"{without_it}; with it {found.status.value}: {found.detail}"
    return replace(found, status=Status.KNOWN, detail=detail)
