# SPDX-License-Identifier: Apache-2.0
"""`autocast("cuda")` has CUDA's lists of operators on a CPU, and `autocast("cpu")` keeps the CPU's."""

import importlib
import types

import pytest
import torch
import torch.nn.functional as F

import hal
from hal.errors import UnsupportedOperation
from hal.launch.surface.operators import autocast as rules

HALF, FULL = torch.float16, torch.float32


@pytest.fixture
def cuda():
    """The module that a program imports as torch, while a CPU stands for CUDA."""
    with hal.adopt("cpu") as adoption:
        yield types.SimpleNamespace(torch=importlib.import_module("torch"), adoption=adoption)


def half(*shape):
    return torch.rand(*shape or (2, 4)).half()


TOUCHED = {
    "sum": (lambda: half().sum(), FULL), "sum over an axis": (lambda: half().sum(-1), FULL),
    "softmax": (lambda: half().softmax(-1), FULL), "log_softmax": (lambda: F.log_softmax(half(), -1), FULL),
    "exp": (lambda: half().exp(), FULL), "pow": (lambda: half() ** 2, FULL), "rpow": (lambda: 2 ** half(), FULL),
    "rsqrt": (lambda: half().rsqrt(), FULL), "softplus": (lambda: F.softplus(half()), FULL),
    "layer_norm": (lambda: F.layer_norm(half(), (4,), half(4), half(4)), FULL),
    "group_norm": (lambda: F.group_norm(half(2, 4), 2), FULL), "rms_norm": (lambda: F.rms_norm(half(), (4,)), FULL),
    "norm": (lambda: half().norm(), FULL), "norm over an axis": (lambda: half().norm(dim=-1), FULL),
    "vector_norm": (lambda: torch.linalg.vector_norm(half()), FULL), "prod": (lambda: half().prod(-1), FULL),
    "cumsum": (lambda: half().cumsum(-1), FULL), "cumprod": (lambda: half().cumprod(-1), FULL),
    "logsumexp": (lambda: half().logsumexp(-1), FULL), "mse_loss": (lambda: F.mse_loss(half(), half()), FULL),
    "cross_entropy": (lambda: F.cross_entropy(half(), torch.tensor([0, 1])), FULL),
    "upsample": (lambda: F.interpolate(half(1, 1, 4, 4), scale_factor=2), FULL),
    "dtype given": (lambda: half().sum(dtype=HALF), HALF), "softmax's dtype": (lambda: half().softmax(-1, HALF), HALF),
    "float64": (lambda: half().double().exp(), torch.float64), "integers": (lambda: torch.ones(2).int().sum(),
                                                                           torch.int64),
    "mm": (lambda: torch.ones(2, 2) @ torch.ones(2, 2), HALF), "mv": (lambda: torch.ones(2, 2).mv(torch.ones(2)), HALF),
    "conv": (lambda: F.conv1d(torch.ones(1, 1, 4), torch.ones(1, 1, 2)), HALF),
    "dot": (lambda: torch.dot(half(4), torch.ones(4)), FULL), "dot of halves": (lambda: torch.dot(half(4), half(4)),
                                                                               HALF),
    "scatter_add": (lambda: half(4).scatter_add(0, torch.tensor([1]), torch.ones(4)), FULL),
    "add": (lambda: half() + half(), HALF), "pad": (lambda: F.pad(half(1, 1, 4), (1, 1), "reflect"), HALF),
    "avg_pool3d": (lambda: F.avg_pool3d(half(1, 1, 4, 4, 4), 2), HALF),
    "GRU": (lambda: torch.nn.GRU(4, 4)(torch.ones(3, 2, 4))[0], HALF),
    "RNN": (lambda: torch.nn.RNN(4, 4)(torch.ones(3, 2, 4))[0], HALF),
    "LSTM": (lambda: torch.nn.LSTM(4, 4)(torch.ones(3, 2, 4))[0], HALF),
}  # fmt: skip


@pytest.mark.parametrize("name", TOUCHED)
def test_an_operator_has_the_dtype_of_cudas_list(name, cuda):
    make, dtype = TOUCHED[name]
    with cuda.torch.autocast("cuda"):
        assert make().dtype == dtype


def test_the_lists_are_those_of_this_torch():
    names = [*rules._FP32, *rules._FP32_UNLESS_ASKED, *rules._LOWER, *rules._WIDEST, "norm.Scalar",
             "norm.ScalarOpt_dim", "binary_cross_entropy"]  # fmt: skip
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    of_cuda = {name.removeprefix("aten::") for name in torch._C._dispatch_get_all_op_names()
               if has(name, "AutocastCUDA")}  # fmt: skip
    of_cpu = {name for name in of_cuda if has(f"aten::{name}", "AutocastCPU")}
    only_cuda = {"cudnn_convolution", "cudnn_convolution_transpose", "_scaled_dot_product_flash_attention"}
    assert of_cuda - of_cpu - only_cuda <= set(names)


def test_a_long_sum_of_halves_does_not_overflow(cuda):
    with cuda.torch.autocast("cuda"):
        assert cuda.torch.ones(1, 70000, device="cuda").half().sum() == 70000


def test_the_cpus_own_autocast_keeps_its_rules_inside_and_outside(cuda):
    x = half()
    with cuda.torch.autocast("cpu", HALF):
        assert x.exp().dtype == HALF
        assert F.avg_pool3d(half(1, 1, 4, 4, 4), 2).dtype == FULL
        assert F.binary_cross_entropy(torch.rand(3), torch.rand(3)).dtype == FULL
    with cuda.torch.autocast("cuda"):
        with cuda.torch.autocast("cpu", HALF):
            assert x.exp().dtype == HALF
            assert not cuda.torch.is_autocast_enabled("cuda")
        assert x.exp().dtype == FULL
        with cuda.torch.autocast("cuda", enabled=False):
            assert x.exp().dtype == HALF
        assert cuda.torch.is_autocast_enabled("cuda")
        assert not cuda.torch.is_autocast_enabled("cpu")
    assert x.exp().dtype == HALF


def test_the_state_that_a_program_asks_for_is_cudas_own(cuda):
    class Cast(torch.autograd.Function):
        @staticmethod
        @cuda.torch.amp.custom_fwd(device_type="cuda", cast_inputs=FULL)
        def forward(ctx, x):
            assert not cuda.torch.is_autocast_enabled()
            return x * 1

    with cuda.torch.autocast("cuda"):
        assert Cast.apply(half()).dtype == FULL
    cuda.torch.set_autocast_gpu_dtype(torch.bfloat16)
    with cuda.torch.autocast("cuda"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    cuda.torch.set_autocast_gpu_dtype(HALF)
    assert cuda.torch.get_autocast_dtype("cpu") == torch.bfloat16
    cuda.torch.set_autocast_enabled(True)
    assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == HALF
    cuda.torch.set_autocast_enabled(False)


def test_the_old_way_of_turning_autocast_on_has_the_rules_too(cuda):
    cuda.torch.set_autocast_enabled(True)
    try:
        assert half().exp().dtype == FULL
    finally:
        cuda.torch.set_autocast_enabled(False)
    assert half().exp().dtype == HALF


def test_what_cuda_forbids_is_an_error(cuda):
    with cuda.torch.autocast("cuda"), pytest.raises(RuntimeError, match="unsafe to autocast"):
        F.binary_cross_entropy(torch.rand(3), torch.rand(3))


def through(x, weight):
    return (x @ weight).softmax(-1)


def test_gradients_and_checkpoints_follow_the_rules(cuda):
    from torch.utils.checkpoint import checkpoint

    found = []
    for reentrant in (None, False, True):
        weight, x = torch.full((4, 4), 0.5, requires_grad=True), torch.arange(8.0).view(2, 4).requires_grad_()
        with cuda.torch.autocast("cuda"):
            made = through(x, weight) if reentrant is None else checkpoint(through, x, weight, use_reentrant=reentrant)
        assert made.dtype == FULL
        (made**2).sum().backward()
        found.append(weight.grad)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_a_function_of_the_programs_own_follows_them_backward(cuda):
    seen = []

    class Twice(torch.autograd.Function):
        @staticmethod
        @cuda.torch.amp.custom_fwd(device_type="cuda")
        def forward(ctx, x):
            seen.append(half().exp().dtype)
            return x * 2

        @staticmethod
        @cuda.torch.amp.custom_bwd(device_type="cuda")
        def backward(ctx, gradient):
            seen.append(half().exp().dtype)
            return gradient * 2

    with cuda.torch.autocast("cuda"):
        made = Twice.apply(torch.ones(2, requires_grad=True))
    made.sum().backward()
    assert seen == [FULL, FULL]


def test_compiled_code_follows_them(cuda):
    weight, x = torch.ones(4, 4, requires_grad=True), torch.ones(2, 4)

    @cuda.torch.compile(backend="aot_eager", fullgraph=True)
    def inside(x, weight):
        with cuda.torch.autocast("cuda"):
            return through(x, weight)

    outside = cuda.torch.compile(through, backend="aot_eager", fullgraph=True)
    made = inside(x, weight)
    assert made.dtype == FULL
    made.sum().backward()
    with cuda.torch.autocast("cuda"):
        assert outside(x, weight).dtype == FULL
    with cuda.torch.autocast("cpu", HALF):  # a guard of the compiler's tells the two apart
        assert outside(x, weight).dtype == HALF


@pytest.mark.skipif(torch.ops.mkldnn._is_mkldnn_fp16_supported(), reason="this CPU computes in float16")
def test_an_lstm_in_float16_is_a_fallback(cuda):
    with cuda.torch.autocast("cuda"):
        made, _ = torch.nn.LSTM(4, 4)(torch.ones(3, 2, 4))
    made.sum().backward()
    assert [entry.api for entry in cuda.adoption.entries() if entry.kind == "fallback"] == ["torch.nn.LSTM"]
    hal.release()
    with hal.adopt("cpu", strict=True), cuda.torch.autocast("cuda"):
        assert half().softmax(-1).dtype == FULL
        with pytest.raises(UnsupportedOperation, match="LSTM"):
            torch.nn.LSTM(4, 4)(torch.ones(3, 2, 4))


def test_transforms_have_the_dtype_of_what_they_are_given(cuda):
    with cuda.torch.autocast("cuda"):
        assert torch.fft.rfft(half(4)).dtype == torch.complex32
        assert torch.fft.rfft(torch.rand(4)).dtype == torch.complex64
        assert torch.stft(torch.rand(8), 4, return_complex=True, window=torch.ones(4)).dtype == torch.complex64
    found = [(entry.api, entry.calls) for entry in cuda.adoption.entries() if entry.kind == "fallback"]
    assert found == [("torch.fft.rfft", 1)]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, as it loads its compiler of kernels
def test_compiled_kernels_follow_them(cuda):
    compiled = cuda.torch.compile(through, fullgraph=True)
    with cuda.torch.autocast("cuda"):
        made, expected = compiled(torch.ones(2, 4), torch.eye(4)), through(torch.ones(2, 4), torch.eye(4))
    assert made.dtype == expected.dtype == FULL
    torch.testing.assert_close(made, expected)


def test_a_release_leaves_nothing_of_it():
    before = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cuda", "cpu")]
    with hal.adopt("cpu"):
        program = importlib.import_module("torch")
        program.set_autocast_gpu_dtype(HALF)
        program.set_autocast_enabled(True)
    assert before == [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
                      for kind in ("cuda", "cpu")]  # fmt: skip
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    assert not has("aten::exp", "AutocastCPU")
    with torch.autocast("cpu", HALF):
        assert half().exp().dtype == HALF
        assert F.avg_pool3d(half(1, 1, 4, 4, 4), 2).dtype == FULL
        assert F.binary_cross_entropy(torch.rand(3), torch.rand(3)).dtype == FULL


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_what_is_on_no_list_of_cudas_is_computed_as_without_autocast(cuda):
    x = torch.ones(1, 4, 2)
    with cuda.torch.autocast("cuda"):
        assert torch.cat([x.bfloat16(), x.bfloat16()]).dtype is torch.bfloat16
        assert torch.stack([x.bfloat16(), x.bfloat16()]).dtype is torch.bfloat16
        assert torch.cat([x.bfloat16(), x.double()]).dtype is torch.float64
        assert x.bfloat16().index_copy(0, torch.tensor([0]), x.bfloat16()).dtype is torch.bfloat16
        half = x.half()
        torch.view_as_complex(half).mul_(2)
    assert half.unique().tolist() == [2]


def test_an_autocast_of_cudas_in_float32_takes_16_bits_to_float32(cuda):
    large = torch.full((2, 2), 300.0).half()
    with cuda.torch.autocast("cuda", dtype=torch.float32):
        assert cuda.torch.is_autocast_enabled("cuda")
        assert cuda.torch.get_autocast_dtype("cuda") is torch.float32
        assert (large @ large).unique().tolist() == [180_000]
        assert F.linear(large, large).dtype is torch.float32
    assert (large @ large).dtype is HALF
