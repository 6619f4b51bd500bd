# SPDX-License-Identifier: Apache-2.0
"""Three runs and two batches: what changes from call to call is told from what is wrong."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hal.contract import Contract
from hal.moe.torch_ops import torch_ops
from hal_conformance import arrays as codec
from hal_conformance.case import Params
from hal_conformance.cases import determinism
from hal_conformance.verdicts import Status

REPEATED, HALVES, *_ = determinism.CASES
CPU = torch.device("cpu")
PARAMS = Params("mixtral-8x7b", "float32", "tiny", 3)


@pytest.fixture(scope="module")
def repeated():
    inputs = REPEATED.inputs(PARAMS)
    tensors = {name: codec.to_torch(array, CPU) for name, array in inputs.items()}
    returned = REPEATED.run(torch_ops, tensors, PARAMS)
    return inputs, {name: codec.from_torch(tensor) for name, tensor in returned.items()}


def judge(repeated, **changed):
    inputs, outputs = repeated
    return REPEATED.judge(inputs, outputs | changed, PARAMS, Contract())


def test_the_same_bits_three_times_are_judged_as_once(repeated):
    assert judge(repeated).status.colour == "green"


def test_one_other_bit_within_the_bounds_is_nondet_and_names_the_run_and_the_output(repeated):
    y = repeated[1]["y_TD/1"].copy()
    y.view(np.int32)[4, 7] ^= 1
    verdict = judge(repeated, **{"y_TD/1": y})
    assert verdict.status is Status.NONDET
    assert "run 2" in verdict.detail
    assert "of y_TD" in verdict.detail


def test_a_run_beyond_its_bounds_is_red_and_named(repeated):
    gradient = repeated[1]["dw2_EDF/2"].copy()
    gradient *= 1.5
    verdict = judge(repeated, **{"dw2_EDF/2": gradient})
    assert verdict.status is Status.FAIL_NUMERIC
    assert verdict.detail.startswith("run 3: dw2_EDF")


def test_an_output_that_is_missing_in_one_run_is_structure(repeated):
    inputs, outputs = repeated
    fewer = {name: array for name, array in outputs.items() if name != "dgate_ED/1"}
    assert REPEATED.judge(inputs, fewer, PARAMS, Contract()).status is Status.FAIL_STRUCTURE


class Batchmates:
    """A layer that adds a hundredth of the mean of the batch."""

    def layer(self, x_TD, *given, **named):
        out = torch_ops.layer(x_TD, *given, **named)
        return out._replace(y_TD=out.y_TD + 0.01 * x_TD.mean(0))


class Rounded:
    """A layer whose last bit depends on the size of the batch."""

    def layer(self, x_TD, *given, **named):
        out = torch_ops.layer(x_TD, *given, **named)
        return out._replace(y_TD=torch.nextafter(out.y_TD, out.y_TD + len(x_TD) % 2))


@pytest.mark.parametrize(("ops", "colour"), [(torch_ops, "green"), (Rounded(), "green"), (Batchmates(), "red")])
def test_a_token_may_have_other_bits_in_another_batch_but_no_other_result(ops, colour):
    inputs = HALVES.inputs(PARAMS)
    tensors = {name: codec.to_torch(array, CPU) for name, array in inputs.items()}
    outputs = {name: codec.from_torch(tensor) for name, tensor in HALVES.run(ops, tensors, PARAMS).items()}
    verdict = HALVES.judge(inputs, outputs, PARAMS, Contract())
    assert verdict.status.colour == colour
    if isinstance(ops, Rounded):
        assert "other bits in half of the batch" in verdict.detail


def test_the_bits_of_empty_and_unequal_arrays():
    assert determinism.differs(np.zeros((0, 2), np.float32), np.zeros((0, 2), np.float32)) == 0.0
    assert determinism.differs(np.zeros(2), np.zeros(3)) == 1.0
    assert determinism.differs(np.zeros(2), np.zeros(2, np.complex64)) == 1.0
    assert determinism.differs(np.array([0.0, 1.0]), np.array([-0.0, 1.0])) == 0.5
