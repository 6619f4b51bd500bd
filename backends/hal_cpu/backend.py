# SPDX-License-Identifier: Apache-2.0
"""The CPU as a device. `torch.accelerator` refuses it, so every facet is written here."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import final

from hal.backend import Backend, Claim, DeviceInfo, Discovery
from hal.changes import Changes
from hal.collectives import Collectives
from hal.contract import Contract
from hal.facets import Facets
from hal.streams import HostStreams
from hal.support_table import SupportTable
from hal_cpu.memory import CpuMemory, total_memory
from hal_cpu.precision import CpuPrecision, emulated
from hal_cpu.random import CpuRandom


@final
class CpuBackend(Backend):
    """The CPU: always here, one device, works synchronously."""

    plugin_api = (1, 0)
    name = "cpu"
    vendor = "host"

    def discover(self) -> Discovery:
        """See `Backend.discover`."""
        return Discovery(
            (
                Claim(
                    DeviceInfo(
                        id="cpu",
                        backend="cpu",
                        vendor=self.vendor,
                        name=_model_name(),
                        arch=platform.machine() or None,
                        total_memory=total_memory(),
                        torch_device="cpu",
                        evidence=("torch always has a CPU",),
                    )
                ),
            )
        )

    def open(self, info: DeviceInfo, changes: Changes) -> Facets:
        """See `Backend.open`."""
        import torch

        device = torch.device("cpu")
        support = SupportTable(device, info.id, emulated)
        return Facets(
            torch_device=device,
            memory=CpuMemory(info.id),
            precision=CpuPrecision(info.id, device, changes, support),
            collectives=Collectives(info.id, device, "gloo", "gloo"),
            random=CpuRandom(info.id, device),
            streams=HostStreams(),
            support=support,
            # float32 accumulation in every kernel that torch ships for 16-bit inputs (oneDNN and its own), measured
            # bit by bit on integer-exact inputs by the conformance suite. Ties of top-k depend on the kernel.
            contract=Contract(evidence="IEEE 754 in hardware; oneDNN and torch accumulate 16-bit inputs in float32"),
        )

    def versions(self) -> Mapping[str, str | None]:
        """See `Backend.versions`."""
        import torch

        capability = getattr(torch.backends.cpu, "get_cpu_capability", lambda: None)()
        return {
            "cpu": _model_name(),
            "cpu_capability": capability,  # which of torch's kernels this processor gets
            "instructions": _instructions(),  # by which oneDNN chooses its own
            "threads": str(torch.get_num_threads()),
            "onednn": "available" if torch.backends.mkldnn.is_available() else "absent",
        }


def _instructions() -> str | None:
    """Return the processor's instruction sets for matrices and vectors; None where torch does not say."""
    import torch

    capabilities: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    wide = ("amx", "avx", "sve", "neon", "bf16", "i8mm", "vsx")
    return ", ".join(sorted(n for n, there in capabilities.items() if there is True and n.startswith(wide))) or None


def _model_name() -> str | None:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:  # noqa: PTH123  a pseudo-file
            for line in lines:
                if line.startswith(("model name", "Hardware")):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or None


backend = CpuBackend()
