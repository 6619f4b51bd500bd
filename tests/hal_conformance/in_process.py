# SPDX-License-Identifier: Apache-2.0
"""One case on one implementation, without a worker: for the tests of cases."""

import numpy as np
import torch

from hal.contract import Contract
from hal_conformance import arguments
from hal_conformance import arrays as codec

CPU = torch.device("cpu")


def judge(case, ops, params, contract=None):
    """Return the verdict on what `ops` returns on the CPU."""
    inputs = case.inputs(params)
    with arguments.watched(ops, ()) as watched:
        outputs = case.run(watched, {name: codec.to_torch(array, CPU) for name, array in inputs.items()}, params)
    watched.check()
    with np.errstate(all="ignore"):
        arrays = {name: codec.from_torch(tensor) for name, tensor in outputs.items()}
        return case.judge(inputs, arrays, params, contract or Contract())
