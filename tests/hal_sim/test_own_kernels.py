# SPDX-License-Identifier: Apache-2.0
"""What multiplies inside a kernel of its own is counted, once, and refused where the device is strict."""

import warnings

import pytest
import torch
import torch.nn.functional as F

import hal
from hal.errors import UnsupportedOperation
from hal_sim.own_kernels import own_kernels

X = torch.eye(8) * 2 + torch.randn(8, 8, generator=torch.Generator().manual_seed(2)) * 0.1


def quantised():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that these are to move to another package
        return torch.ao.nn.quantized.dynamic.Linear(8, 8)


CALLS = {
    "addr": lambda: torch.addr(X, X[0], X[1]),
    "addmm of sparse matrices": lambda: torch.sparse.mm(X.to_sparse(), X),
    "mm of complex numbers": lambda: X.to(torch.complex64) @ X.to(torch.complex64),
    "_cdist_forward": lambda: torch.cdist(X, X),
    "linalg_inv_ex": lambda: torch.linalg.inv(X),
    "_linalg_solve_ex": lambda: torch.linalg.solve(X, X),
    "linalg_cholesky_ex": lambda: torch.linalg.cholesky(torch.eye(8)),
    "linalg_qr": lambda: torch.linalg.qr(X),
    "linalg_householder_product": lambda: torch.linalg.householder_product(X, X[0]),
    "mkldnn_convolution": lambda: torch.ops.aten.mkldnn_convolution(
        torch.ones(1, 3, 8, 8), torch.ones(4, 3, 3, 3), None, [0, 0], [1, 1], [1, 1], 1),
    "mkldnn::_linear_pointwise": lambda: torch.ops.mkldnn._linear_pointwise(X, X, None, "none", [], ""),
    "quantized::linear_dynamic": lambda: LINEAR(X),
}  # fmt: skip
LINEAR = quantised()


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.filterwarnings("ignore:.*[Ss]parse:UserWarning")
def test_they_are_counted_and_refused(name):
    with hal.open_device("sim:h200") as device:
        CALLS[name]()
        assert device.not_simulated() == {name: 1}
    with hal.open_device("sim:h200/strict"), pytest.raises(UnsupportedOperation, match="not simulated"):
        CALLS[name]()


def test_what_reaches_the_unit_is_not_counted():
    with hal.open_device("sim:h200") as device:
        torch.conv_tbc(torch.ones(5, 2, 3), torch.ones(3, 3, 4), torch.ones(4))
        torch.cdist(torch.ones(40, 3), torch.ones(40, 3))
        F.bilinear(torch.ones(2, 3), torch.ones(2, 4), torch.ones(5, 3, 4))
        torch.linalg.matrix_exp(X)
        torch.ones(3, 3, dtype=torch.int64) @ torch.ones(3, 3, dtype=torch.int64)  # the same everywhere
        assert device.not_simulated() == {}


def test_who_listens_is_told_before_and_may_refuse():
    heard = []
    with hal.open_device("sim:h200") as device:
        device.on_not_simulated(lambda operator, operands: heard.append((operator, operands[0])))
        torch.addr(X, X[0], X[1])
        assert heard == [("addr", X)]

        def refuse(operator, operands):
            raise ValueError(operator)

        device.on_not_simulated(refuse)
        with pytest.raises(ValueError, match="addr"):
            torch.addr(X, X[0], X[1])
        assert device.not_simulated() == {"addr": 1}


def test_every_one_has_a_kernel_that_comes_back():
    found = list(own_kernels())
    assert len(found) > 80
    before = [torch._C._dispatch_dump_table(operator.name()) for operator, _ in found]
    with hal.open_device("sim:h200"):
        pass
    assert [torch._C._dispatch_dump_table(operator.name()) for operator, _ in found] == before
