# SPDX-License-Identifier: Apache-2.0
"""NVIDIA GPUs: how they are recognised, and what their arithmetic promises."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hal.backend import DeviceInfo
from hal.changes import Changes
from hal.contract import TRUNCATING_MATRIX_UNITS, Contract
from hal.errors import Absent
from hal.memory import AllocatorPlan
from hal.precision import Precision
from hal.support_table import SupportTable
from hal.torch_backend import TorchBackend
from hal_cuda.allocator import allocator_environment
from hal_cuda.build import torch_build
from hal_cuda.machine import Card, Machine, visible
from hal_cuda.precision import CudaPrecision

if TYPE_CHECKING:
    import torch

LOOK_ALIKES = {
    # Chips of other makers that answer to `torch.cuda`: (environment variable, device files) that show them.
    "T-Head PPU": ("PPU_SDK", "/dev/alixpu*"),
    "MetaX": ("MACA_PATH", "/dev/mxcd*"),
    "Iluvatar CoreX": ("COREX_HOME", "/dev/iluvatar*"),
}


class CudaBackend(TorchBackend):
    """GPUs that NVIDIA's driver shows; other chips under `torch.cuda` are left to their own backends."""

    plugin_api = (1, 0)
    name = "cuda"
    vendor = "NVIDIA"
    torch_type = "cuda"
    library = "NCCL"
    distributed_name = "nccl"

    def __init__(self, machine: Machine | None = None) -> None:
        self.machine = machine or Machine()

    def present(self) -> tuple[int | None, tuple[str, ...]]:
        """See `TorchBackend.present`: NVIDIA's driver must show itself; that torch.cuda answers proves nothing."""
        build = torch_build()
        if build is None:
            raise Absent("torch is not installed", device=self.name)
        if build.cuda is None:
            raise Absent(f"{build}", device=self.name, hint="a build of torch for CUDA")
        if self.left():
            return 0, ()
        evidence = self._driver()
        if not evidence:
            raise Absent(
                f"{build}, and no NVIDIA driver (looked at /proc/driver/nvidia/version, /dev/nvidia[0-9]*, NVML)",
                device=self.name,
            )
        return len(self._cards()), (str(build), *evidence)

    def left(self) -> Sequence[str]:
        """See `TorchBackend.left`."""
        found = []
        for maker, (variable, pattern) in LOOK_ALIKES.items():
            shown = [f"{variable} is set"] if self.machine.variable(variable) else []
            shown += self.machine.files(pattern)[:1]
            # Where NVIDIA's own driver is here too, its cards are NVIDIA's, whatever SDK is installed beside it.
            if shown and not self._driver():
                found.append(f"devices under torch.cuda are {maker}'s: {', '.join(shown)}")
        return found

    def _driver(self) -> tuple[str, ...]:
        driver = self.machine.read("/proc/driver/nvidia/version")
        if driver is not None:
            return ("/proc/driver/nvidia/version: " + driver.splitlines()[0].strip(),)
        files = tuple(self.machine.files("/dev/nvidia[0-9]*"))
        return files or (("NVML answers",) if self.machine.management() else ())

    def _cards(self) -> list[Card]:
        """Return the cards that CUDA_VISIBLE_DEVICES shows, in its order."""
        cards = list(self.machine.management() or [Card() for _ in self.machine.files("/dev/nvidia[0-9]*")])
        shown = visible(self.machine.variable("CUDA_VISIBLE_DEVICES"), [card.uuid for card in cards])
        by_bus = self.machine.variable("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
        if not by_bus and len({(card.name, card.total_memory) for card in cards}) > 1:
            # CUDA orders unlike cards by speed, NVML by bus: which is which is not known before one is opened.
            return [Card() for _ in shown]
        return [cards[index] for index in shown]

    def describe(self, index: int) -> dict[str, Any]:
        """See `TorchBackend.describe`."""
        card = self._cards()[index]
        return {"name": card.name, "arch": card.arch, "total_memory": card.total_memory}

    def opened(self, info: DeviceInfo, device: torch.device, module: Any, changes: Changes) -> None:
        """See `TorchBackend.opened`: only now can the device's own name be asked."""
        name = module.get_device_name(device)
        if name.startswith("PPU-"):
            raise Absent(f"the device calls itself {name}, which is T-Head's", device=info.id, hint="device 'ppu'")

    def make_contract(self, info: DeviceInfo, device: torch.device, module: Any) -> Contract:
        """See `TorchBackend.make_contract`."""
        major, minor = module.get_device_capability(device)
        return Contract(
            matmul=TRUNCATING_MATRIX_UNITS,
            evidence=f"sm_{major}{minor}: products of a group are aligned and cut to at least 24 bits "
            "(arXiv:2511.10909, recorded on V100 to B200); float32 products in float32",
        )

    def make_precision(
        self, info: DeviceInfo, device: torch.device, module: Any, changes: Changes, support: SupportTable
    ) -> Precision:
        """See `TorchBackend.make_precision`."""
        return CudaPrecision(info.id, device, changes, support)

    def allocator_environment(self, plan: AllocatorPlan, environ: Mapping[str, str]) -> Mapping[str, str]:
        """See `Backend.allocator_environment`."""
        return allocator_environment(plan, environ, "PYTORCH_CUDA_ALLOC_CONF", torch_build())

    def versions(self) -> Mapping[str, str | None]:
        """See `Backend.versions`."""
        import torch

        driver = self.machine.read("/proc/driver/nvidia/version")
        nccl = getattr(torch.cuda, "nccl", None)
        return {
            "cuda": torch.version.cuda,
            "driver": driver.splitlines()[0].strip() if driver else None,
            "cudnn": str(torch.backends.cudnn.version()) if torch.backends.cudnn.is_available() else None,
            "nccl": ".".join(map(str, nccl.version())) if nccl is not None and torch.cuda.is_available() else None,
        }


backend = CudaBackend()
