# SPDX-License-Identifier: Apache-2.0
"""Memory of a simulated device: the host's, of which a device with a size leaves that much to the process."""

from __future__ import annotations

from dataclasses import replace
from typing import final

from hal.changes import Switch
from hal.memory_stats import MemoryStats
from hal_cpu.memory import CpuMemory, mapped_bytes


@final
class SimMemory(CpuMemory):
    """Memory with a size that was asked for.

    What counts is the private memory that the process has mapped since the device was opened, which the kernel knows:
    tensors, and all else, of every thread. Beyond the size an allocation fails as on a device that is full.

    Args:
        device_id: for messages.
        size: bytes; None: the host's.
    """

    def __init__(self, device_id: str, size: int | None) -> None:
        super().__init__(device_id)
        self._size = size
        self._before = mapped_bytes() if size is not None else 0

    def switches(self) -> list[tuple[Switch, object]]:
        """Return what opening sets: the private bytes at which the device is full, if it has a size of its own.

        Raises:
            UnsupportedOperation: this system does not limit what a process maps.
        """
        return [] if self._size is None else [(self._limit_switch(), self._before + self._size)]

    def _stats(self) -> MemoryStats:
        found = super()._stats()
        if self._size is None:
            return found
        free = max(0, self._size - max(0, mapped_bytes() - self._before))
        told = {"total": "the size that was asked for", "free": "the size, less what was mapped since it was opened"}
        return replace(found, total=self._size, free=free, sources={**found.sources, **told})
