# SPDX-License-Identifier: Apache-2.0
"""AMD GPUs: the kernel driver's topology tells which are here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hal.backend import DeviceInfo
from hal.contract import Contract
from hal.errors import Absent
from hal_cuda.machine import visible
from hal_cuda.torch_cuda import TorchCudaBackend
from hal_rocm.contract import contract
from hal_rocm.precision import RocmPrecision

if TYPE_CHECKING:
    import torch

AMD = 0x1002
"""PCI vendor number; Hygon's cards, which use the same driver, are 0x1d94."""


class RocmBackend(TorchCudaBackend):
    """GPUs of AMD under a torch that was built for HIP."""

    plugin_api = (1, 0)
    name = "rocm"
    vendor = "AMD"
    library = "RCCL"
    allocator_variable = "PYTORCH_HIP_ALLOC_CONF"
    precision_type = RocmPrecision

    def present(self) -> tuple[int | None, tuple[str, ...]]:
        """See `TorchBackend.present`."""
        build = self.build()
        if build.hip is None:
            raise Absent(f"{build}", device=self.name, hint="a build of torch for ROCm")
        if not self.machine.files("/dev/kfd"):
            raise Absent(f"{build}, and there is no /dev/kfd", device=self.name)
        return len(self._visible()), (str(build), "/dev/kfd", f"{len(self._nodes(AMD))} AMD nodes in the topology")

    def left(self) -> Sequence[str]:
        """See `TorchBackend.left`."""
        others = [node for node in self._nodes(None) if node.get("vendor_id") != AMD]
        return [f"a GPU of PCI vendor {node.get('vendor_id', 0):#x} in the topology is not AMD's" for node in others]

    def _nodes(self, vendor: int | None) -> list[dict[str, int]]:
        """Return the GPUs of the kernel driver's topology; a node without SIMDs is a CPU."""
        nodes = []
        for path in self.machine.files("/sys/class/kfd/kfd/topology/nodes/*/properties"):
            node = self._node(path)
            # A container shows the whole topology and the render nodes of its own GPUs only.
            minor = node.get("drm_render_minor")
            hidden = (
                bool(minor)
                and self.machine.files("/dev/dri/renderD*")
                and not self.machine.files(f"/dev/dri/renderD{minor}")
            )
            if node.get("simd_count") and not hidden and vendor in (None, node.get("vendor_id")):
                banks = [
                    self._node(bank) for bank in self.machine.files(f"{path.rpartition('/')[0]}/mem_banks/*/properties")
                ]
                # Heaps 1 and 2 are the card's own memory, what the CPU reaches and what it does not.
                node["memory"] = sum(bank.get("size_in_bytes", 0) for bank in banks if bank.get("heap_type") in (1, 2))
                nodes.append(node)
        return nodes

    def _node(self, path: str) -> dict[str, int]:
        lines = (self.machine.read(path) or "").splitlines()
        return {key: int(value) for key, _, value in (line.partition(" ") for line in lines) if value.isdigit()}

    def _visible(self) -> list[dict[str, int]]:
        nodes = self._nodes(AMD)
        # ROCR hides first; HIP numbers what is left. HIP reads CUDA's name where its own is not set.
        for names in (("ROCR_VISIBLE_DEVICES",), ("HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")):
            setting = next((v for v in map(self.machine.variable, names) if v is not None), None)
            nodes = [nodes[index] for index in visible(setting, [None] * len(nodes))]
        return nodes

    def describe(self, index: int) -> dict[str, Any]:
        """See `TorchBackend.describe`. 90402 is gfx942: major, minor and stepping, the last in hexadecimal."""
        node = self._visible()[index]
        version = node.get("gfx_target_version", 0)
        major, minor, step = version // 10000, version // 100 % 100, version % 100
        # Cards with a product label tell their name.
        label = self.machine.read(f"/sys/class/drm/renderD{node.get('drm_render_minor')}/device/product_name")
        return {
            "name": (label or "").strip() or None,
            "arch": f"gfx{major}{minor}{step:x}" if version else None,
            "total_memory": node["memory"] or None,
        }

    def make_contract(self, info: DeviceInfo, device: torch.device, module: Any) -> Contract:
        """See `TorchBackend.make_contract`."""
        return contract(module.get_device_properties(device).gcnArchName.partition(":")[0])

    def versions(self) -> Mapping[str, str | None]:
        """See `Backend.versions`."""
        import torch

        driver = self.machine.read("/sys/module/amdgpu/version")
        convolutions = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
        collectives = getattr(torch.cuda, "nccl", None)
        return {
            "hip": torch.version.hip,
            "driver": driver.strip() if driver else None,
            "miopen": None if convolutions is None else str(convolutions),
            "rccl": ".".join(map(str, collectives.version())) if collectives and torch.cuda.is_available() else None,
        }


backend = RocmBackend()
