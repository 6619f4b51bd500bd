# SPDX-License-Identifier: Apache-2.0
"""One task on the portable operators and the CPU, judged in this process as `hal conformance run` judges it."""

from __future__ import annotations

import torch

from hal.contract import Contract
from hal_conformance import arrays as codec
from hal_conformance.execution.judging import Made, judge_outputs
from hal_conformance.execution.plan import Task
from hal_conformance.portable import portable
from hal_conformance.verdicts import Judgement

CPU = torch.device("cpu")


def judged(task: Task, contract: Contract) -> Judgement:
    """Make the inputs, run, and judge."""
    made = Made.of(task)
    tensors = {name: codec.to_torch(array, CPU) for name, array in made.inputs.items()}
    returned = task.case.run(portable, tensors, task.params)
    outputs = {name: codec.from_torch(tensor) for name, tensor in returned.items()}
    return judge_outputs(task, outputs, made.hashes, contract, made)
