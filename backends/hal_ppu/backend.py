# SPDX-License-Identifier: Apache-2.0
"""T-Head PPUs: told from NVIDIA's GPUs by the vendor's SDK, device files and, once opened, their name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hal.backend import DeviceInfo, Specificity
from hal.changes import Changes
from hal.contract import TRUNCATING_MATRIX_UNITS, Contract
from hal.errors import Absent
from hal_cuda.machine import visible
from hal_cuda.torch_cuda import TorchCudaBackend

if TYPE_CHECKING:
    import torch


class PpuBackend(TorchCudaBackend):
    """T-Head's PPU (ZW810 and later) under the vendor's build of torch."""

    plugin_api = (1, 0)
    name = "ppu"
    vendor = "Alibaba T-Head"
    library = "the vendor's, by the name of NCCL"
    contract = Contract(
        matmul=TRUNCATING_MATRIX_UNITS, subnormals="unspecified",
        evidence="nobody has published its arithmetic; float32 accumulation that may truncate is assumed",
        basis="assumed",
    )  # fmt: skip

    def present(self) -> tuple[int | None, tuple[str, ...]]:
        """See `TorchBackend.present`."""
        build = self.build()
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
        super().opened(info, device, module, changes)


backend = PpuBackend()
