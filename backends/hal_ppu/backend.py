# SPDX-License-Identifier: Apache-2.0
"""T-Head PPUs: told from NVIDIA's GPUs by the vendor's SDK, device files and, once opened, their name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hal.backend import DeviceInfo, Specificity
from hal.changes import Changes
from hal.contract import TRUNCATING_MATRIX_UNITS, Contract
from hal.errors import Absent
from hal.memory import AllocatorPlan, Memory
from hal.precision import Precision
from hal.support_table import SupportTable
from hal.torch_backend import TorchBackend
from hal_cuda.allocator import allocator_environment
from hal_cuda.backend import keep_partial_sums
from hal_cuda.build import torch_build
from hal_cuda.machine import Machine, visible
from hal_cuda.memory import CudaMemory
from hal_cuda.precision import CudaPrecision

if TYPE_CHECKING:
    import torch


class PpuBackend(TorchBackend):
    """T-Head's PPU (ZW810 and later) under the vendor's build of torch."""

    plugin_api = (1, 0)
    name = "ppu"
    vendor = "Alibaba T-Head"
    torch_type = "cuda"
    library = "the vendor's, by the name of NCCL"
    distributed_name = "nccl"
    contract = Contract(
        matmul=TRUNCATING_MATRIX_UNITS, subnormals="unspecified",
        evidence="nobody has published its arithmetic; float32 accumulation that may truncate is assumed",
    )  # fmt: skip

    def __init__(self, machine: Machine | None = None) -> None:
        self.machine = machine or Machine()

    def present(self) -> tuple[int | None, tuple[str, ...]]:
        """See `TorchBackend.present`."""
        build = torch_build()
        if build is None:
            raise Absent("torch is not installed", device=self.name)
        files = self.machine.files("/dev/alixpu[0-9]*")
        sdk = self.machine.variable("PPU_SDK")
        if not files:
            # The SDK alone may be there to build for the chip.
            also = f"PPU_SDK={sdk}" if sdk else "PPU_SDK is not set"
            raise Absent(f"no /dev/alixpu[0-9]*; {also}", device=self.name)
        if build.cuda is None:
            raise Absent(f"{build}; T-Head's torch calls itself a build for CUDA", device=self.name)
        evidence = (str(build), *files, *((f"PPU_SDK={sdk}",) if sdk else ()))
        shown = visible(self.machine.variable("CUDA_VISIBLE_DEVICES"), [None] * len(files))
        return len(shown), evidence

    def specificity(self) -> Specificity:
        """See `TorchBackend.specificity`: more specific than whoever takes all of torch.cuda."""
        return Specificity.PRODUCT

    def opened(self, info: DeviceInfo, device: torch.device, module: Any, changes: Changes) -> None:
        """See `TorchBackend.opened`: its own name decides."""
        name = module.get_device_name(device)
        if not name.startswith("PPU-"):
            raise Absent(f"the device calls itself {name}", device=info.id, expected="a name such as PPU-ZW810E")
        keep_partial_sums(changes)

    def make_memory(self, info: DeviceInfo, device: torch.device, module: Any) -> Memory:
        """See `TorchBackend.make_memory`."""
        return CudaMemory(info.id, device, module)

    def make_precision(
        self, info: DeviceInfo, device: torch.device, module: Any, changes: Changes, support: SupportTable
    ) -> Precision:
        """See `TorchBackend.make_precision`: torch's switches for CUDA; the measurement tells whether they act."""
        return CudaPrecision(info.id, device, changes, support)

    def allocator_environment(self, plan: AllocatorPlan, environ: Mapping[str, str]) -> Mapping[str, str]:
        """See `Backend.allocator_environment`."""
        return allocator_environment(plan, environ, "PYTORCH_CUDA_ALLOC_CONF", torch_build())


backend = PpuBackend()
