# SPDX-License-Identifier: Apache-2.0
"""NVIDIA GPUs: how they are recognised, and what their arithmetic promises."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hal.backend import DeviceInfo
from hal.changes import Changes
from hal.contract import Contract
from hal.errors import Absent
from hal_cuda.build import torch_build
from hal_cuda.contract import contract
from hal_cuda.machine import Card, visible
from hal_cuda.torch_cuda import TorchCudaBackend

if TYPE_CHECKING:
    import torch

LOOK_ALIKES = {
    # Chips of other makers that answer to `torch.cuda`: (environment variable, device files, how torch or a management
    # library calls them).
    "T-Head PPU": ("PPU_SDK", "/dev/alixpu*", re.compile(r"PPU-")),
    "MetaX": ("MACA_PATH", "/dev/mxcd*", re.compile(r"MetaX|MXC\d", re.IGNORECASE)),
    "Iluvatar CoreX": ("COREX_HOME", "/dev/iluvatar*", re.compile(r"Iluvatar|BI-V\d", re.IGNORECASE)),
}


def maker(name: str) -> str | None:
    """Return whose look-alike calls itself this, None for anything else."""
    return next((who for who, (_, _, pattern) in LOOK_ALIKES.items() if pattern.match(name)), None)


class CudaBackend(TorchCudaBackend):
    """GPUs that NVIDIA's driver shows; other chips under `torch.cuda` are left to their own backends."""

    plugin_api = (1, 0)
    name = "cuda"
    vendor = "NVIDIA"
    library = "NCCL"

    def present(self) -> tuple[int | None, tuple[str, ...]]:
        """See `TorchBackend.present`: NVIDIA's driver must show itself; that torch.cuda answers proves nothing."""
        build = self.build()
        if build.cuda is None:
            seen = f", although {self._driver()[0]}" if self._driver() else ""
            raise Absent(f"{build}{seen}", device=self.name, hint="a build of torch for CUDA")
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
        names = [card.name for card in self.machine.management() or () if card.name]
        for who, (variable, pattern, _) in LOOK_ALIKES.items():
            named = [f"a device is called {name}" for name in names if maker(name) == who][:1]
            shown = [f"{variable} is set"] if self.machine.variable(variable) else []
            shown += self.machine.files(pattern)[:1]
            # Where NVIDIA's own driver is here too, its cards are NVIDIA's, whatever SDK is installed beside it; but a
            # look-alike may bring a management library of the same name.
            if named or (shown and not self._driver()):
                found.append(f"devices under torch.cuda are {who}'s: {', '.join(named + shown)}")
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
        setting = self.machine.variable("CUDA_VISIBLE_DEVICES")
        if setting is not None and setting.startswith("MIG-"):
            return [Card()]  # CUDA shows one slice of a divided card; its name and memory are not the card's
        shown = visible(setting, [card.uuid for card in cards])
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
        who = maker(name)
        if who is not None:
            raise Absent(f"the device calls itself {name}, which is {who}'s", device=info.id)
        super().opened(info, device, module, changes)

    def make_contract(self, info: DeviceInfo, device: torch.device, module: Any) -> Contract:
        """See `TorchBackend.make_contract`."""
        return contract(*module.get_device_capability(device))

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

    def advice(self) -> Sequence[str]:
        """See `Backend.advice`."""
        build, driver = torch_build(), self._driver()
        if driver and build is not None and build.cuda is None and build.hip is None:
            return (f"an NVIDIA driver is here ({driver[0]}), and this is {build}: install a build for CUDA",)
        return ()


backend = CudaBackend()
