# SPDX-License-Identifier: Apache-2.0
"""What multiplies inside a kernel of its own is counted, once, and refused where the device is strict."""

import re
import warnings

import pytest
import torch
import torch.nn.functional as F

import hal
from hal.errors import UnsupportedOperation
from hal.torch_kernels import has_kernel
from hal_sim import interception
from hal_sim.own_kernels import own_kernels

X = torch.eye(8) * 2 + torch.randn(8, 8, generator=torch.Generator().manual_seed(2)) * 0.1
Z = torch.complex(X, X.T)


def quantised():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that these are to move to another package
        return torch.ao.nn.quantized.dynamic.Linear(8, 8)


CALLS = {
    "addmm of sparse matrices": lambda: torch.sparse.mm(X.to_sparse(), X),
    "addmm_ of sparse matrices": lambda: X.clone().addmm_(X.to_sparse(), X),
    "mv of sparse matrices": lambda: torch.mv(X.to_sparse(), X[0]),
    "addmv of sparse matrices": lambda: torch.mv(X.to_sparse_csr(), X[0]),
    "sspaddmm of sparse matrices": lambda: torch.sspaddmm(X.to_sparse(), X.to_sparse(), X),
    "triangular_solve of sparse matrices": lambda: torch.triangular_solve(X, X.triu().to_sparse_csr()),
    "mm of complex numbers": lambda: Z @ Z,
    "mv of complex numbers": lambda: torch.mv(Z, Z[0]),
    "addbmm of complex numbers": lambda: torch.addbmm(Z, Z[None], Z[None]),
    "_cdist_forward": lambda: torch.cdist(X, X),
    "linalg_inv_ex": lambda: torch.linalg.inv(X),
    "_linalg_solve_ex": lambda: torch.linalg.solve(X, X),
    "linalg_cholesky_ex": lambda: torch.linalg.cholesky(torch.eye(8)),
    "linalg_qr": lambda: torch.linalg.qr(X),
    "linalg_householder_product": lambda: torch.linalg.householder_product(X, X[0]),
    "mkldnn_convolution": lambda: torch.ops.aten.mkldnn_convolution(
        torch.ones(1, 3, 8, 8), torch.ones(4, 3, 3, 3), None, [0, 0], [1, 1], [1, 1], 1),
    "_slow_conv2d_backward": lambda: torch.ops.aten._slow_conv2d_backward(
        torch.ones(1, 4, 6, 6), torch.ones(1, 3, 8, 8), torch.ones(4, 3, 3, 3), [3, 3], [1, 1], [0, 0], [True] * 3),
    "mkldnn_linear_backward_input": lambda: torch.ops.aten.mkldnn_linear_backward_input(
        [8, 8], X.to_mkldnn(), X),
    "fbgemm_linear_fp16_weight": lambda: torch.fbgemm_linear_fp16_weight(
        X, torch.fbgemm_pack_gemm_matrix_fp16(X), X[0]),
    "linalg_eigvals": lambda: torch.linalg.eigvals(X, out=torch.empty(8, dtype=torch.complex64)),
    "mkldnn::_linear_pointwise": lambda: torch.ops.mkldnn._linear_pointwise(X, X, None, "none", [], ""),
    "quantized::linear_dynamic": lambda: LINEAR(X),
}  # fmt: skip
LINEAR = quantised()


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.filterwarnings("ignore:.*[Ss]parse:UserWarning", "ignore:fbgemm_.* is deprecated:UserWarning")
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
        torch.addr(X, X[0], X[1])  # no sums
        torch.ones(3, 3, dtype=torch.int64) @ torch.ones(3, 3, dtype=torch.int64)  # the same everywhere
        assert device.not_simulated() == {}


def test_a_convolution_of_complex_numbers_is_three_of_real_ones_that_reach_the_unit():
    x, weight = torch.randn(2, 1, 3, 8, 8), torch.randn(2, 4, 3, 3, 3)
    with hal.open_device("sim:h200/strict"):
        found = F.conv2d(torch.complex(*x), torch.complex(*weight))
        real, imaginary, both = F.conv2d(x[0], weight[0]), F.conv2d(x[1], weight[1]), F.conv2d(x.sum(0), weight.sum(0))
        assert torch.equal(found, torch.complex(real - imaginary, both - real - imaginary))


def test_tensors_in_onednns_layout_go_through_the_unit():
    x, weight, bias, dy = (torch.randn(shape, generator=torch.Generator().manual_seed(1))
                           for shape in ((2, 3, 8, 8), (4, 3, 3, 3), (4,), (2, 4, 6, 6)))  # fmt: skip

    def computed(to, back):
        given, w = to(x).requires_grad_(), to(weight).requires_grad_()
        y = F.conv2d(given, w, to(bias))
        y.backward(to(dy))
        one = F.conv2d(given.detach(), weight, bias)  # as `torch.utils.mkldnn` leaves a weight that has a gradient
        return *map(back, (y.detach(), given.grad, w.grad, one, F.linear(to(X), to(X), to(X[0])))), y.is_mkldnn

    with hal.open_device("sim:h200/strict"):
        *expected, _ = computed(torch.Tensor.clone, lambda y: y)
        *found, opaque = computed(torch.Tensor.to_mkldnn, torch.Tensor.to_dense)
    assert opaque
    assert all(map(torch.equal, found, expected))


MULTIPLIES = re.compile(
    r".*(mm(?![ai])|mv(?!l)|matmul|linear(?!\dd)|conv(?!ert)|rnn|lstm|gru|attention|encoder_layer|cdist|addr|dot|solve"
    r"|cholesky|(\b|_)lu(\b|_)|(?<!s)qr|svd|(?<!w)eig|(?<!erf)inv|lstsq|det|householder|matrix)"
)
NONE = {
    "_int_mm": "of integers: the same everywhere", "dot": "a sum", "vdot": "a sum", "_compute_linear_combination": "sums",
    "addr": "no sums",
    "linalg_matrix_exp": "made of products that reach the unit", "lu_unpack": "multiplies nothing",
    "mkldnn_reorder_conv2d_weight": "multiplies nothing", "mkldnn_reorder_conv3d_weight": "multiplies nothing",
}  # fmt: skip


def test_every_kernel_whose_name_says_that_it_multiplies_is_known():
    aten = torch.ops.aten
    known = {(operator.name().partition(".")[0], key) for operator, key in own_kernels()}
    through = {*interception._PRODUCTS, *interception._ALONE, "convolution", "scaled_dot_product_attention"}
    known |= {(f"aten::{name}{place}", "CPU") for name in through for place in ("", "_")}
    known |= {(f"aten::{name}", "MkldnnCPU") for name in interception._OF_ONEDNN}
    names = {whole.removeprefix("aten::") for whole in torch._C._dispatch_get_all_op_names() if "aten::" in whole}
    unknown = []
    for name in names:
        packet, _, overload = name.partition(".")
        if not MULTIPLIES.match(packet) or packet in NONE:
            continue
        operator = getattr(getattr(aten, packet), overload or "default")
        unknown += [(name, key) for key in ("CPU", "SparseCPU", "SparseCsrCPU", "MkldnnCPU")
                    if has_kernel(operator, key) and (f"aten::{packet}", key) not in known]  # fmt: skip
    assert unknown == [("sspaddmm.out", "CPU")]  # which refuses


def test_who_listens_is_told_before_and_may_refuse():
    heard = []
    with hal.open_device("sim:h200") as device:
        device.on_not_simulated(lambda operator, operands: heard.append((operator, operands[0])))
        torch.cdist(X, X)
        assert heard == [("_cdist_forward", X)]

        def refuse(operator, operands):
            raise ValueError(operator)

        device.on_not_simulated(refuse)
        with pytest.raises(ValueError, match="_cdist_forward"):
            torch.cdist(X, X)
        assert device.not_simulated() == {"_cdist_forward": 1}


def test_every_one_has_a_kernel_that_comes_back():
    found = list(own_kernels())
    assert len(found) > 80
    before = [torch._C._dispatch_dump_table(operator.name()) for operator, _ in found]
    with hal.open_device("sim:h200"):
        pass
    assert [torch._C._dispatch_dump_table(operator.name()) for operator, _ in found] == before
