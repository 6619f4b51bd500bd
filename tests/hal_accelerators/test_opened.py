# SPDX-License-Identifier: Apache-2.0
"""Opening on stand-ins: a device module with published properties, and products that really round their inputs.

Tensors stay on the CPU; the stand-in cuts the inputs of a product as the switches say, as the vendors' units do.
"""

import dataclasses
import functools
import importlib
import json
import os
import subprocess
import sys
import types

import pytest
import torch

import hal_cuda.torch_cuda
from hal import Absent, Broken, DeviceInfo, UnsupportedPrecision
from hal.changes import Changes
from hal.contract import Contract
from hal_ascend.backend import AscendBackend
from hal_ascend.machine import Machine as AscendMachine
from hal_cuda.backend import CudaBackend
from hal_cuda.build import TorchBuild
from hal_cuda.machine import Card, Machine
from hal_ppu.backend import PpuBackend
from hal_rocm.backend import RocmBackend

GIB = 2**30


def module(name, *, capability=(0, 0), arch="", memory=80 * GIB, **more):
    """A module like `torch.cuda` with one device."""
    properties = types.SimpleNamespace(
        name=name, major=capability[0], minor=capability[1], gcnArchName=arch, total_memory=memory
    )
    return types.SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: 1,
        get_device_name=lambda device=None: name,
        get_device_capability=lambda device=None: capability,
        get_device_properties=lambda device=None: properties,
        memory_stats=lambda device: {"allocated_bytes.all.current": 512, "reserved_bytes.all.current": 2**21},
        mem_get_info=lambda device: (memory - 2**21, memory),
        **more,
    )


H100 = module("NVIDIA H100 80GB HBM3", capability=(9, 0))
A100 = module("NVIDIA A100-SXM4-80GB", capability=(8, 0))
THOR = module("NVIDIA Thor", capability=(11, 0))
PPU = module("PPU-ZW810E", capability=(8, 0), memory=96 * GIB)
METAX = module("MetaX C500", capability=(8, 0))
MI300X = module("AMD Instinct MI300X", capability=(9, 4), arch="gfx942:sramecc+:xnack-", memory=192 * GIB)
MI250X = module("AMD Instinct MI250X", capability=(9, 0), arch="gfx90a:sramecc+:xnack-", memory=64 * GIB)
MI355X = module("AMD Instinct MI355X", capability=(9, 5), arch="gfx950:sramecc+:xnack-", memory=288 * GIB)
RX7900 = module("AMD Radeon RX 7900 XTX", capability=(11, 0), arch="gfx1100", memory=24 * GIB)


@pytest.fixture
def opening(monkeypatch):
    """Open a backend's device on a stand-in; what it changed is released at the end."""
    held = []

    def run(backend, standin):
        monkeypatch.setattr(torch, "get_device_module", lambda device=None: standin)
        changes = Changes(f"{backend.name}:0 (stand-in {len(held)})")
        held.append(changes)
        info = DeviceInfo(f"{backend.name}:0", backend.name, backend.vendor, None, None, None, "cpu")
        return backend.open(info, changes), changes

    yield run
    for changes in held:
        changes.release()


def cut(x, bits):
    """Keep the first significand bits of float32 numbers."""
    return (x.view(torch.int32) & -(1 << (24 - bits))).view(torch.float32) if x.dtype == torch.float32 else x


@pytest.fixture
def multiplies(monkeypatch):
    """Make products and convolutions out of torch's own, by `way(exact, a, b, operation)`."""

    def install(way):
        product, convolution = torch.Tensor.__matmul__, torch.nn.functional.conv2d
        monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: way(product, a, b, "matmul"))
        monkeypatch.setattr(
            torch.nn.functional, "conv2d", lambda x, w, **k: way(functools.partial(convolution, **k), x, w, "conv")
        )

    return install


@pytest.fixture
def rounds(multiplies):
    """Make products cut their float32 inputs to the significand bits that `bits` gives for "matmul" or "conv"."""
    return lambda bits: multiplies(
        lambda exact, a, b, operation: exact(cut(a, bits(operation)), cut(b, bits(operation)))
    )


def three_passes(exact, a, b, operation):
    """Multiply as sums of two bfloat16, if the switch for TF32 is on: what hipBLASLt calls TF32 on gfx950."""
    if a.dtype != torch.float32 or (operation != "always" and switches(operation) == 24):
        return exact(a, b)
    (a1, a2), (b1, b2) = ((x.bfloat16().float(), (x - x.bfloat16().float()).bfloat16().float()) for x in (a, b))
    return exact(a1, b2) + exact(a2, b1) + exact(a1, b1)


def switches(operation):
    place = torch.backends.cuda.matmul if operation == "matmul" else torch.backends.cudnn.conv
    return 11 if place.fp32_precision == "tf32" else 24


def test_a_unit_with_tf32_is_measured_in_both_modes(opening, rounds):
    rounds(switches)
    facets, _ = opening(CudaBackend(), H100)
    assert dict(facets.precision.fp32_mode("tf32").input_bits) == {"matmul": 11, "conv": 11}
    assert dict(facets.precision.fp32_mode("ieee").input_bits) == {"matmul": 24, "conv": 24}


def test_switches_that_read_back_as_set_and_change_nothing_are_unsupported(opening, rounds):
    rounds(lambda operation: 24)
    facets, changes = opening(PpuBackend(), PPU)
    before = list(changes)
    with pytest.raises(UnsupportedPrecision, match="matmul keeps 24, conv keeps 24"):
        facets.precision.fp32_mode("tf32")
    assert list(changes) == before, "the refused mode is no longer in force"


def test_a_library_that_forces_tf32_is_caught_in_ieee(opening, rounds):
    rounds(lambda operation: 11)
    facets, _ = opening(CudaBackend(), H100)
    with pytest.raises(UnsupportedPrecision, match="matmul keeps 11, conv keeps 11"):
        facets.precision.fp32_mode("ieee")


def test_an_architecture_without_a_reduced_unit_says_so_before_anything_is_set(opening, rounds, monkeypatch):
    monkeypatch.delenv("HIPBLASLT_ALLOW_TF32", raising=False)
    rounds(switches)
    facets, _ = opening(RocmBackend(), MI300X)
    assert facets.precision.fp32_mode("tf32").mode == "tf32"
    facets, changes = opening(RocmBackend(), MI250X)
    with pytest.raises(UnsupportedPrecision, match="gfx90a has no reduced float32 unit"):
        facets.precision.fp32_mode("tf32")
    assert not any("fp32_precision" in change.what for change in changes)


def test_three_passes_of_bfloat16_are_no_tf32_and_no_ieee_but_their_own_mode(opening, multiplies, monkeypatch):
    monkeypatch.delenv("HIPBLASLT_ALLOW_TF32", raising=False)
    multiplies(three_passes)
    facets, _ = opening(RocmBackend(), MI355X)
    report = facets.precision.fp32_mode("bf16x3")
    assert dict(report.input_bits) == {"matmul": 17, "conv": 17}
    assert os.environ["HIPBLASLT_ALLOW_TF32"] == "1"
    with pytest.raises(UnsupportedPrecision, match="matmul keeps 17") as caught:
        facets.precision.fp32_mode("tf32")
    assert "'bf16x3'" in caught.value.hint
    assert facets.precision.fp32_mode("ieee").mode == "ieee"


def test_a_library_that_always_multiplies_in_three_passes_is_caught_in_ieee(opening, multiplies):
    multiplies(lambda exact, a, b, operation: three_passes(exact, a, b, "always"))
    facets, _ = opening(CudaBackend(), H100)
    with pytest.raises(UnsupportedPrecision, match="matmul keeps 17, conv keeps 17"):
        facets.precision.fp32_mode("ieee")


def test_products_of_two_tails_that_are_dropped_are_caught_in_ieee(opening, multiplies):
    def five_passes(exact, a, b, operation):
        tails = [x - x.bfloat16().float() for x in (a, b)]
        return exact(a, b) - exact(*tails)

    multiplies(five_passes)
    facets, _ = opening(CudaBackend(), H100)
    with pytest.raises(UnsupportedPrecision, match="drops a part of the product"):
        facets.precision.fp32_mode("ieee")


def reductions():
    matmul = torch.backends.cuda.matmul
    return (
        matmul.allow_bf16_reduced_precision_reduction,
        matmul.allow_fp16_reduced_precision_reduction,
        matmul.allow_fp16_accumulation,
    )


@pytest.mark.parametrize(
    ("backend", "standin"), [(CudaBackend, H100), (RocmBackend, MI300X), (PpuBackend, PPU)], ids=lambda x: str(x)[:24]
)
def test_float32_accumulation_is_promised_and_therefore_set_and_put_back(opening, backend, standin):
    before = reductions()
    assert before[0], "torch's default lets partial sums be added in bfloat16"
    facets, changes = opening(backend(), standin)
    assert reductions() == (False, False, False)
    assert any("allow_bf16_reduced_precision_reduction" in change.what for change in changes)
    assert facets.contract.matmul["bfloat16"].accumulator_bits == 24
    changes.release()
    assert reductions() == before


@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction_split_k"), reason="newer torch"
)
def test_products_that_the_user_forbade_to_split_stay_forbidden(opening):
    matmul = torch.backends.cuda.matmul
    matmul.allow_bf16_reduced_precision_reduction = (False, False)
    try:
        _, changes = opening(CudaBackend(), H100)
        assert not matmul.allow_bf16_reduced_precision_reduction_split_k
        changes.release()
        assert not matmul.allow_bf16_reduced_precision_reduction_split_k
    finally:
        matmul.allow_bf16_reduced_precision_reduction = True


@pytest.mark.parametrize(
    ("backend", "standin", "dtype", "expected", "subnormals"),
    [
        (CudaBackend, H100, "float8_e4m3fn", (14, "truncate"), "preserved"),
        (CudaBackend, H100, "bfloat16", (24, "truncate"), "preserved"),
        (CudaBackend, A100, "float8_e4m3fn", None, "preserved"),
        (CudaBackend, THOR, "bfloat16", (24, "truncate"), "unspecified"),
        (PpuBackend, PPU, "bfloat16", (24, "truncate"), "unspecified"),
        (RocmBackend, MI300X, "float8_e4m3fnuz", (24, "truncate"), "preserved"),
        (RocmBackend, MI300X, "float8_e4m3fn", None, "preserved"),
        (RocmBackend, MI250X, "float16", (24, "nearest"), "flushed"),
        (RocmBackend, RX7900, "float16", (24, "truncate"), "unspecified"),
    ],
)
def test_each_architecture_promises_what_is_known_of_it(opening, backend, standin, dtype, expected, subnormals):
    facets, _ = opening(backend(), standin)
    rule = facets.contract.matmul.get(dtype)
    assert (rule and (rule.accumulator_bits, rule.rounding)) == expected
    assert facets.contract.subnormals == subnormals
    assert Contract.from_json(json.loads(json.dumps(facets.contract.as_json()))) == facets.contract


@pytest.mark.parametrize(
    ("chip", "knows_infinity", "dtypes", "nonfinite"),
    [
        ("Ascend910B3", True, {"float32", "bfloat16", "float16"}, "ieee"),
        ("Ascend910_9392", False, {"float32", "bfloat16", "float16"}, "saturate"),  # INF_NAN_MODE_ENABLE=0
        ("Ascend910ProB", False, {"float16"}, "saturate"),
    ],
)
def test_an_ascend_promises_by_series(monkeypatch, opening, chip, knows_infinity, dtypes, nonfinite):
    monkeypatch.setitem(sys.modules, "torch_npu", types.ModuleType("torch_npu"))
    standin = module(chip, utils=types.SimpleNamespace(is_support_inf_nan=lambda: knows_infinity))
    facets, _ = opening(AscendBackend(), standin)
    assert set(facets.contract.matmul) == dtypes
    assert facets.contract.nonfinite == nonfinite
    assert facets.collectives.torch_name == "hccl"
    assert all(rule.rounding == "truncate" for rule in facets.contract.matmul.values()), "nothing exact is published"


@pytest.mark.parametrize(
    ("backend", "standin", "says"),
    [(CudaBackend, PPU, "T-Head"), (CudaBackend, METAX, "MetaX"), (PpuBackend, A100, "NVIDIA A100")],
)
def test_a_device_that_turns_out_to_be_anothers_is_absent_and_nothing_stays_changed(opening, backend, standin, says):
    before = reductions()
    with pytest.raises(Absent, match=says):
        opening(backend(), standin)
    assert reductions() == before


@pytest.mark.parametrize(
    ("raised", "try_this"),
    [
        (ImportError("libhccl.so: cannot open shared object file: No such file or directory"), "set_env.sh"),
        (RuntimeError("Two accelerators cannot be used at the same time in PyTorch: npu and cuda."), "for the CPU"),
    ],
)
def test_what_torch_npu_raises_at_import_is_broken_with_what_to_try(monkeypatch, opening, raised, try_this):
    def refuse(name):
        assert name == "torch_npu"
        raise raised

    monkeypatch.setattr(importlib, "import_module", refuse)
    with pytest.raises(Broken, match=str(raised)[:20]) as caught:
        opening(AscendBackend(), module("Ascend910B3"))
    assert try_this in caught.value.hint
    assert caught.value.__cause__ is raised


def test_numbers_come_from_the_module_and_what_it_lacks_is_none(opening):
    facets, _ = opening(RocmBackend(), MI300X)
    stats = facets.memory.stats()
    assert (stats.allocated, stats.peak_allocated, stats.total) == (512, None, 192 * GIB)
    assert "peak_allocated" not in stats.sources
    assert (facets.collectives.torch_name, facets.collectives.library) == ("nccl", "RCCL")


def test_a_slice_of_a_divided_card_is_one_device_of_unknown_size(tmp_path, monkeypatch):
    monkeypatch.setattr(hal_cuda.torch_cuda, "torch_build", lambda: TorchBuild("2.13.0", "12.9", None))
    card = Card("NVIDIA H100 80GB HBM3", "sm_90", 80 * GIB, "GPU-1")
    there = Machine(tmp_path, {"CUDA_VISIBLE_DEVICES": "MIG-3f1a"}, lambda: (card,))
    (claim,) = CudaBackend(there).discover().claims
    assert (claim.info.name, claim.info.total_memory) == (None, None)


def test_a_look_alikes_own_nvml_does_not_make_it_nvidias(tmp_path, monkeypatch):
    monkeypatch.setattr(hal_cuda.torch_cuda, "torch_build", lambda: TorchBuild("2.8.0", "12.9", None))
    found = CudaBackend(Machine(tmp_path, {}, lambda: (Card("PPU-ZW810E", "sm_80"),))).discover()
    assert found.claims == ()
    assert "PPU-ZW810E" in found.left[0]


def test_the_kernels_topology_tells_memory_and_hides_what_a_container_hides(tmp_path, monkeypatch):
    monkeypatch.setattr(hal_cuda.torch_cuda, "torch_build", lambda: TorchBuild("2.13.0", None, "6.4"))
    nodes = tmp_path / "sys/class/kfd/kfd/topology/nodes"
    for index, minor in ((1, 128), (2, 136)):
        bank = nodes / str(index) / "mem_banks" / "0"
        bank.mkdir(parents=True)
        text = f"simd_count 1216\nvendor_id 4098\ngfx_target_version 90402\ndrm_render_minor {minor}\n"
        (nodes / str(index) / "properties").write_text(text)
        (bank / "properties").write_text(f"heap_type 1\nsize_in_bytes {192 * GIB}\n")
    dri = tmp_path / "dev/dri"
    dri.mkdir(parents=True)
    (tmp_path / "dev/kfd").touch()
    (dri / "renderD136").touch()
    label = tmp_path / "sys/class/drm/renderD136/device/product_name"
    label.parent.mkdir(parents=True)
    label.write_text("AMD Instinct MI300X\n")
    (claim,) = RocmBackend(Machine(tmp_path, {}, lambda: None)).discover().claims
    info = dataclasses.replace(claim.info, evidence=())
    assert (info.name, info.arch, info.total_memory) == ("AMD Instinct MI300X", "gfx942", 192 * GIB)


@pytest.mark.parametrize(
    ("setting", "count"), [("0,1", 2), ("1,0", 0), ("1", 1), ("", 0), ("1,7", 1), ("0;1", 1), (None, 4)]
)
def test_ascends_visible_devices_are_read_as_torch_npu_reads_them(tmp_path, setting, count):
    environ = {} if setting is None else {"ASCEND_RT_VISIBLE_DEVICES": setting}
    assert AscendMachine(tmp_path, environ).visible(4) == count


def test_listing_imports_neither_torch_nor_a_vendors_package():
    code = (
        "import sys, json, hal; found = [(i.backend, i.simulated) for i in hal.list_devices()];"
        "print(json.dumps([found, [m for m in ('torch', 'torch_npu', 'numpy') if m in sys.modules]]))"
    )
    for admitted in (None, "cuda,rocm,ascend,ppu"):
        environ = {k: v for k, v in os.environ.items() if not k.startswith("HAL_")}
        if admitted:
            environ["HAL_BACKENDS"] = admitted
        done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
        found, imported = json.loads(done.stdout)
        assert imported == []
        assert admitted or ["cpu", False] in found
