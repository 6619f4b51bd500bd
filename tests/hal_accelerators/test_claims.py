# SPDX-License-Identifier: Apache-2.0
"""Who claims which chip, on made-up machines with published properties. No such hardware is here."""

import importlib.util

import pytest

import hal_cuda.torch_cuda
from hal import Absent, Broken, Discovery
from hal.surveys import Survey, settle
from hal_ascend.backend import AscendBackend
from hal_ascend.machine import Machine as AscendMachine
from hal_cuda.backend import CudaBackend
from hal_cuda.build import TorchBuild
from hal_cuda.machine import Card, Machine, visible
from hal_ppu.backend import PpuBackend
from hal_rocm.backend import RocmBackend

H100 = Card("NVIDIA H100 80GB HBM3", "sm_90", 85_520_809_984, "GPU-11111111-aaaa")
MI300X = "simd_count 1216\nvendor_id 4098\ngfx_target_version 90402\n"
HYGON = "simd_count 240\nvendor_id 7572\ngfx_target_version 90006\n"
CPU_NODE = "cpu_cores_count 96\nsimd_count 0\nvendor_id 0\n"


@pytest.fixture
def built(monkeypatch):
    def build(*, cuda=None, hip=None, version="2.13.0"):
        monkeypatch.setattr(hal_cuda.torch_cuda, "torch_build", lambda: TorchBuild(version, cuda, hip))

    return build


def machine(tmp_path, files=(), environ=None, cards=None, **texts):
    for name in files:
        path = tmp_path / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(texts.get(name, ""))
    return Machine(tmp_path, environ or {}, lambda: cards)


def write(tmp_path, name, text):
    path = tmp_path / name.lstrip("/")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def survey(backend):
    try:
        return Survey(backend.name, (), backend.discover(), None)
    except (Absent, Broken) as error:
        return Survey(backend.name, (), Discovery(()), error)


def test_cuda_claims_what_nvidias_driver_shows(tmp_path, built):
    built(cuda="12.9")
    write(tmp_path, "/proc/driver/nvidia/version", "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86\n")
    (claim,) = CudaBackend(machine(tmp_path, cards=(H100,))).discover().claims
    assert (claim.info.id, claim.info.name, claim.info.arch) == ("cuda:0", H100.name, "sm_90")
    assert any("570.86" in finding for finding in claim.info.evidence)


def test_cuda_does_not_claim_what_only_answers_to_torch_cuda(tmp_path, built):
    built(cuda="12.9")
    with pytest.raises(Absent, match="no NVIDIA driver"):
        CudaBackend(machine(tmp_path)).discover()


def test_a_ppu_is_the_ppu_backends_and_cuda_says_why_it_left_it(tmp_path, built):
    built(cuda="12.9", version="2.8.0")
    there = machine(tmp_path, ["/dev/alixpu0", "/dev/alixpu1", "/dev/alixpu_ctl"], {"PPU_SDK": "/usr/local/PPU_SDK"})
    cuda, ppu = CudaBackend(there), PpuBackend(there)
    found = cuda.discover()
    assert found.claims == ()
    assert "T-Head" in found.left[0]
    devices, lost = settle([survey(cuda), survey(ppu)])
    assert [info.id for info in devices] == ["ppu:0", "ppu:1"]
    assert devices[0].torch_device == "cuda:0"
    assert lost == {}


def test_beside_nvidias_own_driver_a_ppu_sdk_does_not_take_nvidias_cards(tmp_path, built):
    built(cuda="12.9")
    write(tmp_path, "/proc/driver/nvidia/version", "NVRM version: NVIDIA\n")
    there = machine(tmp_path, environ={"PPU_SDK": "/usr/local/PPU_SDK"}, cards=(H100,))
    assert [claim.info.id for claim in CudaBackend(there).discover().claims] == ["cuda:0"]


def test_rocm_claims_amds_nodes_by_architecture_and_leaves_hygons(tmp_path, built):
    built(hip="6.4.1")
    for index, text in enumerate((CPU_NODE, MI300X, HYGON, MI300X)):
        write(tmp_path, f"/sys/class/kfd/kfd/topology/nodes/{index}/properties", text)
    found = RocmBackend(machine(tmp_path, ["/dev/kfd"])).discover()
    assert [(c.info.id, c.info.arch, c.info.torch_device) for c in found.claims] == [
        ("rocm:0", "gfx942", "cuda:0"),
        ("rocm:1", "gfx942", "cuda:1"),
    ]
    assert "0x1d94" in found.left[0]


def test_a_build_for_cuda_is_not_rocms_and_the_reverse(tmp_path, built):
    built(cuda="12.9")
    with pytest.raises(Absent, match=r"CUDA 12\.9"):
        RocmBackend(machine(tmp_path, ["/dev/kfd"])).discover()
    built(hip="6.4.1")
    with pytest.raises(Absent, match=r"HIP 6\.4\.1"):
        CudaBackend(machine(tmp_path)).discover()


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        (None, [0, 1, 2]),
        ("", []),
        ("2,0", [2, 0]),
        ("1,-1,0", [1]),
        ("0,0", []),
        ("GPU-b,1", [1]),
        ("7", []),
        ("x", []),
    ],
)
def test_visible_devices_are_read_as_the_driver_reads_them(setting, expected):
    assert visible(setting, ["GPU-a", "GPU-b", "GPU-c"]) == (expected if setting != "GPU-b,1" else [])


def test_unlike_cards_have_no_name_before_they_are_opened_unless_the_order_is_known(tmp_path, built):
    built(cuda="12.9")
    write(tmp_path, "/proc/driver/nvidia/version", "NVRM\n")
    cards = (H100, Card("NVIDIA A100-SXM4-40GB", "sm_80", 42_505_207_808, "GPU-2"))
    unordered = CudaBackend(machine(tmp_path, cards=cards)).discover()
    assert [claim.info.name for claim in unordered.claims] == [None, None]
    ordered = CudaBackend(machine(tmp_path, environ={"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, cards=cards)).discover()
    assert ordered.claims[1].info.arch == "sm_80"


def ascend(tmp_path, files=(), environ=None, packages=None, installed=True, monkeypatch=None):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if installed else None)
    machine(tmp_path, files)
    return AscendBackend(AscendMachine(tmp_path, environ or {}, packages or {"torch": "2.13.0", "torch_npu": "2.13.0"}))


NPUS = ("/dev/davinci0", "/dev/davinci1", "/dev/davinci_manager")
CANN = {"ASCEND_HOME_PATH": "/usr/local/Ascend/latest"}


def test_ascend_claims_its_device_files_when_package_and_toolkit_are_here(tmp_path, monkeypatch):
    found = ascend(tmp_path, NPUS, CANN, monkeypatch=monkeypatch).discover()
    assert [c.info.torch_device for c in found.claims] == ["npu:0", "npu:1"]
    hidden = ascend(tmp_path, NPUS, CANN | {"ASCEND_RT_VISIBLE_DEVICES": "1"}, monkeypatch=monkeypatch)
    assert len(hidden.discover().claims) == 1


@pytest.mark.parametrize(
    ("keywords", "kind", "text"),
    [
        ({"files": ()}, Absent, "no /dev/davinci"),
        ({"installed": False}, Broken, "torch_npu is not installed"),
        ({"packages": {"torch": "2.15.0", "torch_npu": "2.14.0"}}, Broken, "do not fit"),
        ({"environ": {}}, Broken, "CANN is not"),
    ],
)
def test_hardware_that_is_missing_is_absent_and_software_that_is_missing_is_broken(
    tmp_path, monkeypatch, keywords, kind, text
):
    backend = ascend(tmp_path, **({"files": NPUS, "environ": CANN, "monkeypatch": monkeypatch} | keywords))
    with pytest.raises(kind, match=text):
        backend.discover()


def test_torch_npu_without_cann_is_explained(tmp_path, monkeypatch):
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in ascend(tmp_path, monkeypatch=monkeypatch).advice()[0]
    assert ascend(tmp_path, environ=CANN, monkeypatch=monkeypatch).advice() == []


def test_this_machine_without_accelerators_says_absent_and_what_was_looked_at():
    for backend, looked in ((PpuBackend(), "alixpu"), (AscendBackend(), "davinci")):
        with pytest.raises(Absent, match=looked):
            backend.discover()
