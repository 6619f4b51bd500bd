# SPDX-License-Identifier: Apache-2.0
"""From an observation to a result: the inputs are made again here, compared by hash, and the case judges."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from hal_conformance import arrays as codec
from hal_conformance.case import Unpromised
from hal_conformance.result import DETECTORS, Result
from hal_conformance.text import plain
from hal_conformance.verdicts import Judgement, Status

if TYPE_CHECKING:
    from hal.contract import Contract
    from hal_conformance.case import Arrays
    from hal_conformance.execution.observation import Observation
    from hal_conformance.execution.plan import Task


def judge(observation: Observation, contract: Contract, subject: str, impl: str) -> Result:
    """Judge one observation. Never raises for what is wrong with it, or with the case: that is INVALID."""
    if observation.status is not None:
        judgement = Judgement(observation.status, detail=observation.detail)
    else:
        judgement = judge_outputs(observation.task, observation.outputs, observation.hashes, contract)
        detail = "; ".join(filter(None, (judgement.detail, observation.detail)))
        judgement = replace(judgement, detail=detail)
    return result(observation.task, judgement, subject, impl, observation.seconds)


@dataclass(frozen=True)
class Made:
    """Inputs of a task that were made on this host, and the SHA-256 of each."""

    inputs: Arrays
    hashes: Mapping[str, str]

    @classmethod
    def of(cls, task: Task) -> Made:
        """Make them. Raises whatever the case raises."""
        inputs = task.case.inputs(task.params)
        return cls(inputs, codec.digests(inputs))


def judge_outputs(
    task: Task, outputs: Arrays, hashes: Mapping[str, str], contract: Contract, made: Made | None = None
) -> Judgement:
    """Judge the outputs of a task.

    Args:
        task: what was run.
        outputs: what came back.
        hashes: SHA-256 of each input where it was run.
        contract: what the subject promises.
        made: the task's inputs, if the caller has made them already.
    """
    try:
        # Outputs may be anything: overflow and NaN in the judge's arithmetic are expected.
        with np.errstate(all="ignore"):
            made = Made.of(task) if made is None else made
            names = {*made.hashes, *hashes}
            differing = sorted(name for name in names if made.hashes.get(name) != hashes.get(name))
            if differing:
                what = f"the inputs {', '.join(map(plain, differing))} differ from those of this host"
                return Judgement(Status.INVALID, detail=what)
            judgement = task.case.judge(made.inputs, outputs, task.params, contract)
        if not isinstance(judgement, Judgement) or not isinstance(judgement.status, Status):
            return Judgement(Status.INVALID, detail=f"the case judged {plain(judgement, 100)}")
        return judgement
    except Unpromised as error:
        return Judgement(Status.UNSUPPORTED, detail=plain(error))
    except Exception as error:  # noqa: BLE001  a judge that fails has judged nothing, and the run goes on
        return Judgement(Status.INVALID, detail=plain(f"the judge raised {type(error).__name__}: {error}"))


def result(task: Task, judgement: Judgement, subject: str, impl: str, seconds: float) -> Result:
    """Turn a judgement into a result row, in which every number is finite or None."""
    numbers = {"margin": judgement.margin, **{name: judgement.detectors.get(name) for name in DETECTORS}}
    detail = plain(judgement.detail)
    finite: dict[str, float | None] = {}
    for name, number in numbers.items():
        value = None if number is None else float(number)
        if value is not None and not math.isfinite(value):
            # JSON has no such number; the detail keeps it for the reader.
            detail = f"{detail}; {name} is {value}" if detail else f"{name} is {value}"
            value = None
        finite[name] = value
    return Result(
        case=task.name,
        family=task.case.family,
        subject=subject,
        impl=impl,
        dtype=task.params.dtype,
        status=judgement.status,
        margin=finite.pop("margin"),
        detectors=finite,
        detail=detail,
        seconds=round(seconds, 6),
    )
