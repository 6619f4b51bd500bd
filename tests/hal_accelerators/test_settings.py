# SPDX-License-Identifier: Apache-2.0
"""Switches and variables of each vendor, on stand-ins: set, read back, measured, put back."""

import types

import pytest
import torch

from hal import AllocatorPlan, ConfigError, UnsupportedPrecision
from hal.changes import Changes
from hal.support_table import SupportTable
from hal_ascend.backend import AscendBackend
from hal_ascend.memory import AscendMemory
from hal_ascend.precision import AscendPrecision
from hal_cuda.allocator import allocator_environment
from hal_cuda.build import TorchBuild
from hal_cuda.precision import CudaPrecision
from hal_rocm.precision import RocmPrecision

CPU = torch.device("cpu")
PLAN = AllocatorPlan(expandable_segments=True, max_split_size_mb=512)
TEXT = "expandable_segments:True,max_split_size_mb:512"


def precision(kind, monkeypatch, bits):
    """A vendor's precision facet, on a device whose products keep `bits` for each value of the product's switch."""
    made = kind("standin:0", CPU, Changes("standin:0"), SupportTable(CPU, "standin:0"))
    monkeypatch.setattr(kind, "measure_input_bits", lambda self, operation: bits(operation))
    return made


def blas():
    return torch.backends.cuda.matmul.fp32_precision


def test_tf32_sets_three_switches_is_confirmed_and_is_put_back(monkeypatch):
    before = (blas(), torch.backends.cudnn.conv.fp32_precision, torch.backends.cudnn.rnn.fp32_precision)
    made = precision(CudaPrecision, monkeypatch, lambda _: 11 if blas() == "tf32" else 24)
    report = made.fp32_mode("tf32")
    assert [value for _, value in report.switches] == ["tf32"] * 3
    assert made.fp32_mode("ieee").mode == "ieee"
    assert blas() == "ieee"
    made._changes.release()
    after = (blas(), torch.backends.cudnn.conv.fp32_precision, torch.backends.cudnn.rnn.fp32_precision)
    assert after == before


def test_ieee_is_refused_where_one_operation_still_cuts_its_inputs(monkeypatch):
    made = precision(CudaPrecision, monkeypatch, lambda operation: 11 if operation == "conv" else 24)
    before = blas()
    with pytest.raises(UnsupportedPrecision, match="conv keeps 11"):
        made.fp32_mode("ieee")
    assert blas() == before


def test_an_override_in_the_environment_is_named(monkeypatch):
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    with pytest.raises(UnsupportedPrecision, match="NVIDIA_TF32_OVERRIDE"):
        precision(CudaPrecision, monkeypatch, lambda _: 24).fp32_mode("tf32")


def test_rocm_also_tells_hipblaslt_and_takes_it_back(monkeypatch):
    import os

    monkeypatch.delenv("HIPBLASLT_ALLOW_TF32", raising=False)
    made = precision(RocmPrecision, monkeypatch, lambda _: 11)
    made.fp32_mode("tf32")
    assert os.environ["HIPBLASLT_ALLOW_TF32"] == "1"
    made._changes.release()
    assert "HIPBLASLT_ALLOW_TF32" not in os.environ


class Hf32:
    """torch_npu's switch: a class-level option that only takes bool (npu_config.py)."""

    def __init__(self, value):
        self.__dict__["value"] = value

    def __getattr__(self, name):
        return self.__dict__["value"]

    def __setattr__(self, name, value):
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be a bool")
        self.__dict__["value"] = value


def test_ascend_convolutions_default_to_hf32_and_ieee_switches_it_off(monkeypatch):
    npu = types.SimpleNamespace(matmul=Hf32(False), conv=Hf32(True))
    monkeypatch.setattr(torch, "get_device_module", lambda device=None: npu)
    made = precision(AscendPrecision, monkeypatch, lambda op: 12 if (npu.conv if op == "conv" else npu.matmul).value else 24)
    made.fp32_mode("ieee")
    assert (npu.matmul.value, npu.conv.value) == (False, False)
    assert dict(made.fp32_mode("tf32").input_bits) == {"matmul": 12, "conv": 12}
    made._changes.release()
    assert (npu.matmul.value, npu.conv.value) == (False, True), "the vendor's own default is back"


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
    ("message", "requested"),
    [
        ("NPU out of memory. Tried to allocate 20.00 MiB (NPU 0; 29.50 GiB total capacity", 20 * 2**20),
        ("[ERROR] aclrtMalloc failed, error code is 207001", None),
    ],
)
def test_every_way_of_running_out_becomes_one_error(message, requested):
    from hal import OutOfMemoryError

    memory = AscendMemory("ascend:0", torch.device("cpu"), Module())
    with pytest.raises(OutOfMemoryError) as caught, memory.catch_out_of_memory():
        raise RuntimeError(message)
    assert caught.value.requested == requested
    assert caught.value.stats.allocated == 7
    with pytest.raises(RuntimeError, match="shape"), memory.catch_out_of_memory():
        raise RuntimeError("shape mismatch in operator 2070010")
