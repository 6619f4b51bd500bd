# SPDX-License-Identifier: Apache-2.0
"""Memory of any device that torch can address, through its device module: what that lacks is None or unsupported."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hal.changes import Switch
from hal.errors import UnsupportedOperation
from hal.memory import Memory
from hal.memory_stats import MemoryStats
from hal.torch_module import module_function

if TYPE_CHECKING:
    import torch


class TorchMemory(Memory):
    """Memory through the device module's caching allocator."""

    def __init__(self, device_id: str, device: torch.device, module: Any) -> None:
        import torch

        super().__init__(device_id)
        self._device = device
        self._module = module
        # `memory_allocated` of the modules answers 0 for a key that is missing; the dictionary tells the two apart.
        self._raw = getattr(module, "memory_stats", None)
        if self._raw is None and torch.accelerator.current_accelerator() == torch.device(device.type):
            self._raw = _accelerator_statistics(device)
        self._driver = getattr(module, "mem_get_info", None)
        self._source = f"torch.{device.type}.memory_stats"

    def _allocated(self) -> int | None:
        return None if self._raw is None else self._raw(self._device).get("allocated_bytes.all.current")

    def _stats(self) -> MemoryStats:
        numbers: dict[str, int] = {}
        sources: dict[str, str] = {}
        if self._raw is not None:
            raw = self._raw(self._device)
            for field, key in _STATISTICS:
                if key in raw:
                    numbers[field] = raw[key]
                    sources[field] = self._source
        if self._driver is not None:
            numbers["free"], numbers["total"] = self._driver(self._device)
            sources["free"] = sources["total"] = f"torch.{self._device.type}.mem_get_info"
        return MemoryStats(**numbers, sources=sources)

    def _reset_peak(self) -> None:
        self._call("reset_peak_memory_stats", self._device)

    def _empty_cache(self) -> None:
        self._call("empty_cache")

    def _limit_switch(self) -> Switch:
        """Return the switch that is the allocator's share of the device's memory, in bytes.

        A module that cannot tell the share is taken to have no limit until one is set here.
        """
        if self._driver is None:
            raise UnsupportedOperation("does not tell its total memory", device=self.device_id, what="memory.limit")
        device, total = self._device, int(self._driver(self._device)[1])
        set_share = self._function("set_per_process_memory_fraction")
        tell_share = getattr(self._module, "get_per_process_memory_fraction", None)

        # They outlive this facet where its handle is dropped, and so know nothing of it.
        def read() -> int:
            return _limits.get(device, total) if tell_share is None else round(tell_share(device) * total)

        def write(nbytes: int) -> None:
            # Half a byte more: the allocator cuts the product of share and total to a whole number of bytes.
            set_share(min(1.0, (nbytes + 0.5) / total), device)
            _limits[device] = nbytes

        return Switch(f"torch.{device.type}.set_per_process_memory_fraction on {device}", read, write)

    def _limit_value(self, nbytes: int) -> int:
        assert self._driver is not None
        return min(nbytes, int(self._driver(self._device)[1]))  # more than there is: no limit

    def _snapshot(self) -> list[dict[str, Any]]:
        segments = self._call("memory_snapshot")
        # The allocator lists the segments of every device in this process.
        return [segment for segment in segments if segment.get("device", self._device.index) == self._device.index]

    def _pin(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._device.type == "cpu":  # the host's memory, from which it computes
            return tensor
        try:
            return tensor.pin_memory()
        except NotImplementedError as error:  # a plug-in that registered no allocator for it
            raise UnsupportedOperation(
                f"torch.{self._device.type} has no page-locked memory", device=self.device_id, what="memory.pin"
            ) from error

    def _function(self, name: str) -> Any:
        return module_function(self._module, name, self._device, self.device_id, "memory")

    def _call(self, name: str, *arguments: Any) -> Any:
        return self._function(name)(*arguments)


_limits: dict[torch.device, int] = {}
"""The limit in bytes that was set last on each device, for modules that cannot tell it."""

_STATISTICS = (
    ("allocated", "allocated_bytes.all.current"),
    ("reserved", "reserved_bytes.all.current"),
    ("peak_allocated", "allocated_bytes.all.peak"),
    ("peak_reserved", "reserved_bytes.all.peak"),
)


def _accelerator_statistics(device: torch.device) -> Any:
    """Return torch.accelerator's statistics, or None where they do not work for this device.

    They raise for every plug-in whose allocator is no `c10::DeviceAllocator` (torch-mojo-backend#472).
    """
    import torch

    statistics = getattr(torch.accelerator, "memory_stats", None)
    try:
        return statistics if statistics is None or statistics(device) is not None else None
    except RuntimeError:
        return None
