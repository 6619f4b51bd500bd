# SPDX-License-Identifier: Apache-2.0
"""Switches and variables of each vendor, on stand-ins: set, read back, measured, put back."""

import enum
import os
import subprocess
import sys
import types

import pytest
import torch

import hal_cuda.precision
from hal import AllocatorPlan, ConfigError, OutOfMemoryError, UnsupportedOperation, UnsupportedPrecision
from hal.changes import Changes
from hal.support_table import SupportTable
from hal_ascend.backend import AscendBackend
from hal_ascend.memory import AscendMemory
from hal_ascend.precision import AscendPrecision
from hal_cuda.allocator import allocator_environment
from hal_cuda.build import TorchBuild
from hal_cuda.memory import CudaMemory
from hal_cuda.precision import CudaPrecision
from hal_rocm.precision import RocmPrecision

CPU = torch.device("cpu")
PLAN = AllocatorPlan(expandable_segments=True, max_split_size_mb=512)
TEXT = "expandable_segments:True,max_split_size_mb:512"


@pytest.fixture
def precision(monkeypatch):
    """Make a vendor's precision facet, on a device whose products keep `bits` for each value of the product's switch."""
    ledgers = []

    def make(kind, bits):
        ledgers.append(Changes(f"standin:0 (handle {len(ledgers)})"))
        made = kind("standin:0", CPU, ledgers[-1], SupportTable(CPU, "standin:0"))
        monkeypatch.setattr(kind, "measure_input_bits", lambda self, operation: bits(operation))
        return made

    yield make
    for ledger in ledgers:
        ledger.close()


def blas():
    return torch.backends.cuda.matmul.fp32_precision


def test_tf32_sets_every_switch_is_confirmed_and_is_put_back(precision):
    before = (blas(), torch.backends.cudnn.conv.fp32_precision, torch.backends.cudnn.rnn.fp32_precision)
    made = precision(CudaPrecision, lambda _: 11 if blas() == "tf32" else 24)
    report = made.fp32_mode("tf32")
    assert {value for _, value in report.switches} == {"tf32"}
    assert (torch.backends.cudnn.conv.fp32_precision, torch.backends.cudnn.rnn.fp32_precision) == ("tf32", "tf32")
    assert made.fp32_mode("ieee").mode == "ieee"
    assert blas() == "ieee"
    made._changes.release()
    after = (blas(), torch.backends.cudnn.conv.fp32_precision, torch.backends.cudnn.rnn.fp32_precision)
    assert after == before


def test_ieee_is_refused_where_one_operation_still_cuts_its_inputs(precision):
    made = precision(CudaPrecision, lambda operation: 11 if operation == "conv" else 24)
    before = blas()
    with pytest.raises(UnsupportedPrecision, match="conv keeps 11"):
        made.fp32_mode("ieee")
    assert blas() == before


def test_an_override_in_the_environment_is_named(monkeypatch, precision):
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    with pytest.raises(UnsupportedPrecision, match="NVIDIA_TF32_OVERRIDE"):
        precision(CudaPrecision, lambda _: 24).fp32_mode("tf32")


def test_no_vendor_here_has_a_three_pass_mode_and_each_says_so(precision):
    for kind in (CudaPrecision, RocmPrecision, AscendPrecision):
        with pytest.raises(UnsupportedPrecision, match="three-pass"):
            precision(kind, lambda _: 24).fp32_mode("bf16x3")


def test_the_old_interface_reads_again_once_the_new_ones_values_are_back(precision):
    made = precision(CudaPrecision, lambda _: 24)
    made.fp32_mode("ieee")
    made._changes.release()
    assert torch.backends.cuda.matmul.allow_tf32 is False  # raises while new-style values contradict it
    assert torch.backends.cudnn.allow_tf32 is True
    assert torch.get_float32_matmul_precision() == "highest"


INHERITS = """
import torch
from hal.changes import Changes
from hal.support_table import SupportTable
from hal_cuda.precision import CudaPrecision

def state():
    cuda, cudnn, mkldnn = torch.backends.cuda, torch.backends.cudnn, torch.backends.mkldnn
    return tuple(part.fp32_precision for part in (cuda.matmul, cudnn, cudnn.conv, cudnn.rnn, mkldnn.matmul))

def states():
    "How the switches answer to what the user may set above them."
    seen = [state()]
    for above in ("ieee", "tf32", "none"):
        torch.backends.fp32_precision = above
        seen.append(state())
        for library in ("ieee", "none"):
            torch.backends.cudnn.fp32_precision = library
            seen.append(state())
    torch.backends.fp32_precision = user
    return seen

def use():
    changes = Changes("standin:0")
    made = CudaPrecision("standin:0", torch.device("cpu"), changes, SupportTable(torch.device("cpu"), "standin:0"))
    CudaPrecision.measure_input_bits = lambda self, op: {"ieee": 24, "tf32": 11}[torch.backends.cuda.matmul.fp32_precision]
    for mode in ("ieee", "tf32", "ieee"):
        made.fp32_mode(mode)
        conv, rnn = torch.backends.cudnn.conv, torch.backends.cudnn.rnn
        assert state()[:1] + state()[2:4] == (mode,) * 3, (mode, state())
    changes.close()

%s
for user in ("none", "ieee", "tf32"):
    torch.backends.fp32_precision = user
    before = states()
    use()
    assert states() == before, (user, before, states())
print("same")
"""


@pytest.mark.parametrize(
    "own", ["", "torch.backends.cudnn.conv.fp32_precision = torch.backends.cuda.matmul.fp32_precision = 'tf32'"]
)
def test_what_was_inherited_inherits_again_and_what_was_its_own_stays_so(own):
    """In a process of its own: torch cannot be brought back to how it starts."""
    done = subprocess.run([sys.executable, "-c", INHERITS % own], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["same"], done.stderr


def test_the_workspace_that_deterministic_products_need_is_there_from_the_start(monkeypatch, precision):
    """torch looks once, at the first product, and measuring a float32 mode multiplies."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    first, second = precision(CudaPrecision, lambda _: 24), precision(CudaPrecision, lambda _: 24)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    first.deterministic()
    first.deterministic(False)
    first._changes.close()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8", "the second handle needs it, too"
    second.deterministic()
    second.deterministic()
    second.deterministic(False)
    assert not torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8", "it was there before"
    second._changes.close()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    precision(RocmPrecision, lambda _: 24).deterministic()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    precision(CudaPrecision, lambda _: 24)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8", "the user's own choice stays"


def test_deterministic_is_refused_where_every_product_would_raise_afterwards(monkeypatch, precision):
    made, product = precision(CudaPrecision, lambda _: 24), torch.Tensor.__matmul__

    def late(a, b):
        if torch.are_deterministic_algorithms_enabled():
            raise RuntimeError("this operation is not deterministic because it uses CuBLAS")
        return product(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", late)
    with pytest.raises(UnsupportedOperation, match="uses CuBLAS"):
        made.deterministic()
    assert not torch.are_deterministic_algorithms_enabled()
    assert (torch.ones(2, 2) @ torch.ones(2, 2)).sum() == 8


def test_torch_before_the_new_interface_is_set_through_the_old_one(monkeypatch, precision):
    monkeypatch.setattr(hal_cuda.precision, "has_fp32_switches", lambda: False)
    blas = types.SimpleNamespace(allow_tf32=True)
    cudnn = types.SimpleNamespace(allow_tf32=True)
    monkeypatch.setattr(torch.backends, "cuda", types.SimpleNamespace(matmul=blas))
    monkeypatch.setattr(torch.backends, "cudnn", cudnn)
    made = precision(CudaPrecision, lambda op: 11 if (cudnn if op == "conv" else blas).allow_tf32 else 24)
    made.fp32_mode("ieee")
    assert (blas.allow_tf32, cudnn.allow_tf32) == (False, False)
    made._changes.release()
    assert (blas.allow_tf32, cudnn.allow_tf32) == (True, True)


def test_deterministic_keeps_what_the_user_chose_if_it_is_good_enough(monkeypatch, precision):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    for kind, variable, given, kept in (
        (CudaPrecision, "CUBLAS_WORKSPACE_CONFIG", ":16:8", ":16:8"),
        (CudaPrecision, "CUBLAS_WORKSPACE_CONFIG", ":4096:2:16:8", ":4096:8"),
        (AscendPrecision, "HCCL_DETERMINISTIC", "strict", "strict"),
        (AscendPrecision, "HCCL_DETERMINISTIC", "false", "true"),
    ):
        monkeypatch.setenv(variable, given)
        made = precision(kind, lambda _: 24)
        made.deterministic()
        assert os.environ[variable] == kept
        assert torch.backends.cudnn.benchmark is (kind is not CudaPrecision)
        assert torch.are_deterministic_algorithms_enabled()
        made._changes.release()
        assert os.environ[variable] == given
        assert torch.backends.cudnn.benchmark is True
        assert not torch.are_deterministic_algorithms_enabled()


def test_rocm_also_tells_hipblaslt_and_takes_it_back(monkeypatch, precision):
    monkeypatch.delenv("HIPBLASLT_ALLOW_TF32", raising=False)
    made = precision(RocmPrecision, lambda _: 11)
    made.fp32_mode("tf32")
    assert os.environ["HIPBLASLT_ALLOW_TF32"] == "1"
    made._changes.release()
    assert "HIPBLASLT_ALLOW_TF32" not in os.environ


class CubeMathType(enum.IntEnum):
    KEEP_DTYPE = 0
    USE_FP16 = 2
    USE_HF32 = 3


class Hf32:
    """torch_npu's switches: `allow_hf32` takes bool only; `cube_math_type` reads as None until it is set, and cannot
    be set to that (npu_config.py)."""

    def __init__(self, value):
        self.__dict__.update(value=value, kind=None)

    def __getattr__(self, name):
        return {"allow_hf32": self.__dict__["value"], "cube_math_type": self.__dict__["kind"]}.get(name)

    def __setattr__(self, name, value):
        if not isinstance(value, {"allow_hf32": bool, "cube_math_type": CubeMathType}[name]):
            raise TypeError(f"{name} = {value!r}")
        self.__dict__[{"allow_hf32": "value", "cube_math_type": "kind"}[name]] = value


def test_a_second_switch_that_asks_for_float16_products_is_overruled_and_put_back(monkeypatch, precision):
    npu = types.SimpleNamespace(matmul=Hf32(False), conv=Hf32(True), CubeMathType=CubeMathType)
    npu.matmul.cube_math_type = CubeMathType.USE_FP16
    monkeypatch.setattr(torch, "get_device_module", lambda device=None: npu)
    keeps = {CubeMathType.KEEP_DTYPE: 24, CubeMathType.USE_FP16: 11}
    made = precision(AscendPrecision, lambda op: keeps[npu.matmul.cube_math_type] if op == "matmul" else 24)
    made.fp32_mode("ieee")
    assert npu.matmul.cube_math_type == CubeMathType.KEEP_DTYPE
    made._changes.release()
    assert npu.matmul.cube_math_type == CubeMathType.USE_FP16


def test_ascend_convolutions_default_to_hf32_and_ieee_switches_it_off(monkeypatch, precision):
    npu = types.SimpleNamespace(matmul=Hf32(False), conv=Hf32(True))
    monkeypatch.setattr(torch, "get_device_module", lambda device=None: npu)
    made = precision(AscendPrecision, lambda op: 12 if (npu.conv if op == "conv" else npu.matmul).value else 24)
    made.fp32_mode("ieee")
    assert (npu.matmul.value, npu.conv.value) == (False, False)
    assert dict(made.fp32_mode("tf32").input_bits) == {"matmul": 12, "conv": 12}
    made._changes.release()
    assert (npu.matmul.value, npu.conv.value) == (False, True), "the vendor's own default is back"


def test_a_variable_that_this_torch_does_not_read_is_not_written():
    # torch 2.9 ignores the unified name on CUDA, and ROCm's build reads CUDA's name before HIP's.
    old = TorchBuild("2.9.1", "12.9", None)
    written = allocator_environment(PLAN, {"PYTORCH_ALLOC_CONF": "a:1"}, "PYTORCH_CUDA_ALLOC_CONF", old)
    assert written == {"PYTORCH_CUDA_ALLOC_CONF": TEXT}
    rocm = TorchBuild("2.8.0", None, "6.4")
    assert allocator_environment(PLAN, {}, "PYTORCH_HIP_ALLOC_CONF", rocm) == {"PYTORCH_HIP_ALLOC_CONF": TEXT}
    written = allocator_environment(PLAN, {"PYTORCH_CUDA_ALLOC_CONF": "a:1"}, "PYTORCH_HIP_ALLOC_CONF", rocm)
    assert written == {"PYTORCH_CUDA_ALLOC_CONF": "a:1," + TEXT}


def test_two_variables_that_agree_are_joined_in_the_one_that_is_read():
    environ = {"PYTORCH_ALLOC_CONF": "a:1", "PYTORCH_CUDA_ALLOC_CONF": "b:[256:1,512:2]"}
    written = allocator_environment(PLAN, environ, "PYTORCH_CUDA_ALLOC_CONF", TorchBuild("2.13.0", "12.9", None))
    assert written == {"PYTORCH_ALLOC_CONF": "a:1,b:[256:1,512:2]," + TEXT}


@pytest.mark.parametrize(
    ("version", "environ", "expected"),
    [
        ("2.13.0", {}, {"PYTORCH_ALLOC_CONF": TEXT}),
        ("2.9.1", {}, {"PYTORCH_CUDA_ALLOC_CONF": TEXT}),
        ("2.13.0", {"PYTORCH_CUDA_ALLOC_CONF": "a:1"}, {"PYTORCH_CUDA_ALLOC_CONF": "a:1," + TEXT}),
    ],
)
def test_the_plan_goes_into_the_variable_that_this_torch_reads(version, environ, expected):
    build = TorchBuild(version, "12.9", None)
    assert allocator_environment(PLAN, environ, "PYTORCH_CUDA_ALLOC_CONF", build) == expected


def test_two_variables_that_contradict_each_other_are_refused():
    environ = {"PYTORCH_CUDA_ALLOC_CONF": "a:1", "PYTORCH_ALLOC_CONF": "a:2"}
    with pytest.raises(ConfigError, match="contradict"):
        allocator_environment(PLAN, environ, "PYTORCH_CUDA_ALLOC_CONF", None)


def test_ascend_never_gets_both_variables():
    backend = AscendBackend()
    assert backend.allocator_environment(PLAN, {}) == {"PYTORCH_NPU_ALLOC_CONF": TEXT}
    assert backend.allocator_environment(PLAN, {"PYTORCH_ALLOC_CONF": "a:1"}) == {"PYTORCH_ALLOC_CONF": "a:1," + TEXT}
    with pytest.raises(ConfigError, match="torch_npu refuses"):
        backend.allocator_environment(PLAN, {"PYTORCH_NPU_ALLOC_CONF": "a:1", "PYTORCH_ALLOC_CONF": "a:1"})


class Module:
    """A device module whose allocator lacks two of the four statistics."""

    @staticmethod
    def memory_stats(device):
        return {"allocated_bytes.all.current": 7, "reserved_bytes.all.current": 9}

    @staticmethod
    def mem_get_info(device):
        return 60, 64


def test_a_statistic_that_is_missing_is_none_and_never_zero():
    memory = AscendMemory("ascend:0", torch.device("cpu"), Module())
    stats = memory.stats()
    assert (memory.allocated(), stats.reserved, stats.peak_allocated, stats.free) == (7, 9, None, 60)
    assert set(stats.sources) == {"allocated", "reserved", "free", "total"}


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "HIP out of memory. Tried to allocate 2.00 GiB",
        "NCCL Error 1: ... Cuda failure 2 'out of memory'",
    ],
)
def test_drivers_and_libraries_run_out_of_memory_too(message):
    memory = CudaMemory("cuda:0", torch.device("cpu"), Module())
    with pytest.raises(OutOfMemoryError) as caught, memory.catch_out_of_memory():
        raise RuntimeError(message)
    assert caught.value.requested == (2 * 2**30 if "2.00 GiB" in message else None)
    with pytest.raises(RuntimeError, match="illegal"), memory.catch_out_of_memory():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


@pytest.mark.parametrize(
    ("message", "requested"),
    [
        ("alloc device memory failed, runtime result = 207001[driver error:out of memory]", None),
        ("EL0004: Failed to allocate memory.", None),
        ("NPU out of memory. Tried to allocate 20.00 MiB (NPU 0; 29.50 GiB total capacity", 20 * 2**20),
        ("[ERROR] aclrtMalloc failed, error code is 207001", None),
    ],
)
def test_every_way_of_running_out_becomes_one_error(message, requested):
    memory = AscendMemory("ascend:0", torch.device("cpu"), Module())
    with pytest.raises(OutOfMemoryError) as caught, memory.catch_out_of_memory():
        raise RuntimeError(message)
    assert caught.value.requested == requested
    assert caught.value.stats.allocated == 7
    with pytest.raises(RuntimeError, match="shape"), memory.catch_out_of_memory():
        raise RuntimeError("shape [200000] is invalid for input of size 207001")
