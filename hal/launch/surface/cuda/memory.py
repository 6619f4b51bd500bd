# SPDX-License-Identifier: Apache-2.0
"""torch.cuda's memory statistics.

A device that does not count the bytes in tensors answers with what its driver or kernel says of the process; on a CPU
that is its resident set, everything else in the process included.
"""

from __future__ import annotations

import contextlib
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any, final

from hal.errors import ConfigError, UnsupportedOperation
from hal.launch.api import api, refused, value
from hal.launch.redirection import Redirection
from hal.launch.surface.cuda.device import cuda_index
from hal.memory_stats import MemoryStats

_RESIDENT = "on a CPU the process's resident set"


def _stats(r: Redirection, device: Any) -> MemoryStats:
    return r.devices[cuda_index(r, device)].memory.stats()


def _first(*numbers: int | None) -> int:
    return next((number for number in numbers if number is not None), 0)


@api("torch.cuda.memory_allocated", "torch.accelerator.memory_allocated", "torch.cuda.memory.memory_allocated",
     note=_RESIDENT)  # fmt: skip
def memory_allocated(r: Redirection, device: Any = None) -> int:
    """Bytes in tensors."""
    stats = _stats(r, device)
    return _first(stats.allocated, stats.process)


@api("torch.cuda.max_memory_allocated", "torch.accelerator.max_memory_allocated",
     "torch.cuda.memory.max_memory_allocated", note=_RESIDENT)  # fmt: skip
def max_memory_allocated(r: Redirection, device: Any = None) -> int:
    """The most since the last reset."""
    stats = _stats(r, device)
    return _first(stats.peak_allocated, stats.peak_process)


@api("torch.cuda.memory_reserved", "torch.cuda.memory_cached", "torch.accelerator.memory_reserved",
     "torch.cuda.memory.memory_reserved", "torch.cuda.memory.memory_cached", note=_RESIDENT)  # fmt: skip
def memory_reserved(r: Redirection, device: Any = None) -> int:
    """Bytes that the allocator holds."""
    stats = _stats(r, device)
    return _first(stats.reserved, stats.process)


@api("torch.cuda.max_memory_reserved", "torch.cuda.max_memory_cached", "torch.accelerator.max_memory_reserved",
     "torch.cuda.memory.max_memory_reserved", "torch.cuda.memory.max_memory_cached", note=_RESIDENT)  # fmt: skip
def max_memory_reserved(r: Redirection, device: Any = None) -> int:
    """The most since the last reset."""
    stats = _stats(r, device)
    return _first(stats.peak_reserved, stats.peak_process)


@api("torch.cuda.reset_peak_memory_stats", "torch.cuda.reset_max_memory_allocated",
     "torch.cuda.reset_max_memory_cached", "torch.accelerator.reset_peak_memory_stats",
     "torch.cuda.memory.reset_peak_memory_stats", "torch.cuda.memory.reset_max_memory_allocated",
     "torch.cuda.memory.reset_max_memory_cached")  # fmt: skip
def reset_peak_memory_stats(r: Redirection, device: Any = None) -> None:
    """Start the peaks anew."""
    try:
        r.devices[cuda_index(r, device)].memory.reset_peak()
    except UnsupportedOperation as error:
        r.idle("torch.cuda.reset_peak_memory_stats", error.reason)


@api("torch.cuda.reset_accumulated_memory_stats", "torch.cuda.memory.reset_accumulated_memory_stats",
     "torch.accelerator.reset_accumulated_memory_stats", verdict="emulated", forwards=True)  # fmt: skip
def reset_accumulated_memory_stats(r: Redirection, device: Any = None) -> None:
    """The sums over time are not kept."""
    cuda_index(r, device)


@api("torch.cuda.empty_cache", "torch.accelerator.empty_cache", "torch.cuda.memory.empty_cache")
def empty_cache(r: Redirection) -> None:
    """Give unused memory back to the system."""
    r.device.memory.empty_cache()


@api("torch.cuda.mem_get_info", "torch.accelerator.get_memory_info", "torch.cuda.memory.mem_get_info")
def mem_get_info(r: Redirection, device: Any = None) -> tuple[int, int]:
    """Bytes that are free, and all."""
    stats = _stats(r, device)
    return stats.free or 0, stats.total or 0


@api("torch.cuda.device_memory_used")
def device_memory_used(r: Redirection, device: Any = None) -> int:
    """Bytes in use by everybody."""
    free, total = mem_get_info(r, device)
    return total - free


_KINDS = ("allocation", "segment", "active", "inactive_split")
_SIZES = ("allocated_bytes", "reserved_bytes", "active_bytes", "inactive_split_bytes", "requested_bytes")


@api("torch.cuda.memory_stats", "torch.accelerator.memory_stats", "torch.cuda.memory.memory_stats",
     verdict="emulated", forwards=True, note="bytes as in memory_allocated; counts of blocks are 0")  # fmt: skip
def memory_stats(r: Redirection, device: Any = None) -> OrderedDict[str, int]:
    """All keys of CUDA's, so that reading one is no error; what the device does not count is 0."""
    found = {
        f"{kind}.{pool}.{what}": 0
        for kind in (*_KINDS, *_SIZES)
        for pool in ("all", "large_pool", "small_pool")
        for what in ("current", "peak", "allocated", "freed")
    }
    found |= dict.fromkeys(("num_alloc_retries", "num_ooms", "num_sync_all_streams", "num_device_alloc"), 0)
    for kind, now, peak in (
        ("allocated_bytes", memory_allocated(r, device), max_memory_allocated(r, device)),
        ("active_bytes", memory_allocated(r, device), max_memory_allocated(r, device)),
        ("reserved_bytes", memory_reserved(r, device), max_memory_reserved(r, device)),
    ):
        found[f"{kind}.all.current"], found[f"{kind}.all.peak"] = now, peak
    return OrderedDict(sorted(found.items()))


@api("torch.cuda.memory_stats_as_nested_dict", "torch.cuda.memory.memory_stats_as_nested_dict", verdict="emulated")
def memory_stats_as_nested_dict(r: Redirection, device: Any = None) -> dict[str, Any]:
    """`memory_stats`, a dict for each level of the names."""
    return _nested(memory_stats(r, device))


def _nested(flat: Mapping[str, int]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for name, number in flat.items():
        *path, last = name.split(".")
        inner = nested
        for part in path:
            inner = inner.setdefault(part, {})
        inner[last] = number
    return nested


@api("torch.cuda.memory_summary", "torch.cuda.memory.memory_summary", verdict="emulated", forwards=True)
def memory_summary(r: Redirection, device: Any = None, abbreviated: bool = False) -> str:
    """What is known, a line each, with its source."""
    index = cuda_index(r, device)
    stats = r.devices[index].memory.stats()
    lines = [f"memory of {r.devices[index].info.id}, which is cuda:{index} of this program"]
    lines += [f"  {name:15} {getattr(stats, name) / 2**20:12.1f} MiB  {source}"
              for name, source in stats.sources.items()]  # fmt: skip
    return "\n".join(lines)


@api("torch.cuda.memory_snapshot", "torch.cuda.memory.memory_snapshot",
     verdict="emulated", forwards=True, note="empty where the allocator keeps no list")  # fmt: skip
def memory_snapshot(r: Redirection, *args: Any, **kwargs: Any) -> Any:
    """The allocator's segments."""
    try:
        return r.device.memory.snapshot()
    except UnsupportedOperation as error:
        r.idle("torch.cuda.memory_snapshot", error.reason)
        return []


@api("torch.cuda.memory._snapshot", verdict="emulated", forwards=True,
     note="empty where the allocator keeps no list")  # fmt: skip
def whole_snapshot(r: Redirection, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The allocator's segments, and what was recorded: nothing."""
    traces: list[Any] = [[] for _ in r.devices]
    return {
        "segments": memory_snapshot(r),
        "device_traces": traces,
        "allocator_settings": {},
        "external_annotations": [],
    }


@api("torch.cuda.memory._record_memory_history", "torch.cuda.memory._dump_snapshot", verdict="emulated",
     forwards=True, note="does nothing where the allocator keeps no history")  # fmt: skip
def record_memory_history(r: Redirection, *args: Any, **kwargs: Any) -> None:
    """The device's allocator keeps no history."""
    r.idle("torch.cuda.memory._record_memory_history", "this device's allocator keeps no history")


@api("torch.cuda.set_per_process_memory_fraction", "torch.cuda.memory.set_per_process_memory_fraction",
     note="on a CPU of all that the process maps; a share that it has passed already is full from then on")  # fmt: skip
def set_per_process_memory_fraction(r: Redirection, fraction: float, device: Any = None) -> None:
    """Limit this process's memory to a share of the device's."""
    if not isinstance(fraction, float):
        raise TypeError("Invalid type for fraction argument, must be `float`")
    if not 0 <= fraction <= 1:
        raise ValueError(f"Invalid fraction value: {fraction}. Allowed range: 0~1")
    index = cuda_index(r, device)
    memory = r.devices[index].memory
    share = max(1, int(fraction * (memory.stats().total or 0)))
    for attempts_left in reversed(range(8)):
        try:  # CUDA takes a share that is smaller than what is in use, and then refuses the next allocation
            memory.limit(max(share, memory.least_limit()))
            break
        except ConfigError:  # another thread has mapped more meanwhile
            if not attempts_left or share > memory.least_limit():
                raise
    r.kept[f"get_per_process_memory_fraction:{index}"] = fraction


@api("torch.cuda.get_per_process_memory_fraction", "torch.cuda.memory.get_per_process_memory_fraction",
     verdict="emulated")  # fmt: skip
def get_per_process_memory_fraction(r: Redirection, device: Any = None) -> float:
    """What was set, or all."""
    return float(r.kept.get(f"get_per_process_memory_fraction:{cuda_index(r, device)}", 1.0))


@api("torch.cuda.host_memory_stats", "torch.cuda.memory.host_memory_stats", verdict="emulated",
     note="0: CUDA's allocator of pinned memory holds none")  # fmt: skip
def host_memory_stats(r: Redirection) -> OrderedDict[str, int]:
    """All keys of CUDA's, so that reading one is no error."""
    counted = ("allocations", "allocated_bytes", "active_requests", "active_bytes")
    names = [f"{kind}.{what}" for kind in counted for what in ("current", "peak", "allocated", "freed")]
    names += [
        f"host_{kind}_time.{what}" for kind in ("alloc", "free") for what in ("total", "max", "min", "count", "avg")
    ]
    return OrderedDict.fromkeys(sorted((*names, "num_host_alloc", "num_host_free")), 0)


@api("torch.cuda.host_memory_stats_as_nested_dict", "torch.cuda.memory.host_memory_stats_as_nested_dict",
     verdict="emulated")  # fmt: skip
def host_memory_stats_as_nested_dict(r: Redirection) -> dict[str, Any]:
    """`host_memory_stats`, a dict for each level of the names."""
    return _nested(host_memory_stats(r))


@api("torch.cuda.reset_accumulated_host_memory_stats", "torch.cuda.memory.reset_accumulated_host_memory_stats",
     "torch.cuda.reset_peak_host_memory_stats", "torch.cuda.memory.reset_peak_host_memory_stats",
     verdict="emulated")  # fmt: skip
def reset_host_memory_stats(r: Redirection) -> None:
    """Nothing was counted."""


@api("torch.cuda.caching_allocator_enable", "torch.cuda.memory.caching_allocator_enable", verdict="emulated",
     note="does nothing")  # fmt: skip
def caching_allocator_enable(r: Redirection, value: bool = True) -> None:
    """The device's allocator stays as it is."""
    if not value:
        r.idle("torch.cuda.caching_allocator_enable", "this device's allocator is not CUDA's, and stays as it is")


@api("torch.cuda.caching_allocator_disabled", "torch.cuda.memory.caching_allocator_disabled", verdict="emulated",
     note="does nothing")  # fmt: skip
@contextlib.contextmanager
def caching_allocator_disabled(r: Redirection) -> Iterator[None]:
    """See `caching_allocator_enable`."""
    caching_allocator_enable(r, False)
    yield


@final
class MemoryPool:
    """What `torch.cuda.MemPool` is on a device with one allocator: a name, and nothing else."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.id = (0, 0)
        self.allocator = None

    def snapshot(self, include_traces: bool = True) -> list[Any]:
        """Nothing is allocated apart."""
        return []

    def use_count(self) -> int:
        """Nobody but the holder."""
        return 1


@value("torch.cuda.MemPool", "torch.cuda.memory.MemPool", verdict="emulated",
       note="allocates from the device's one pool")  # fmt: skip
def memory_pool(r: Redirection) -> type:
    """See `MemoryPool`."""
    own = getattr(r.module, "MemPool", None)
    return own if isinstance(own, type) else MemoryPool


@api("torch.cuda.use_mem_pool", "torch.cuda.memory.use_mem_pool", verdict="emulated", forwards=True,
     note="allocates from the device's one pool")  # fmt: skip
@contextlib.contextmanager
def use_mem_pool(r: Redirection, pool: Any, device: Any = None) -> Iterator[None]:
    """Allocate as always."""
    yield


@api("torch.cuda.get_allocator_backend", "torch.cuda.memory.get_allocator_backend", verdict="emulated")
def get_allocator_backend(r: Redirection) -> str:
    """torch's own."""
    return "native"


refused(
    "torch.cuda.caching_allocator_alloc", "torch.cuda.caching_allocator_delete", "torch.cuda.change_current_allocator",
    "torch.cuda.memory.CUDAPluggableAllocator", "torch.cuda.CUDAPluggableAllocator",
    "torch.cuda.memory.caching_allocator_alloc", "torch.cuda.memory.caching_allocator_delete",
    "torch.cuda.memory.change_current_allocator",
    why="raw memory of a CUDA allocator does not exist on this device", hint="allocate with torch.empty",
)  # fmt: skip


@value("torch.cuda.OutOfMemoryError", "torch.OutOfMemoryError", each=True,
       note="on a CPU also what its allocator raises, where the name is read as the error is caught")  # fmt: skip
def out_of_memory_error(r: Redirection) -> type:
    """torch's own error. A CPU's allocator raises a plain RuntimeError instead: in an `except` it is that class.

    Python reads the name in `except torch.cuda.OutOfMemoryError` when there is an error, which is known then.
    """
    import torch

    error = sys.exc_info()[1]
    ran_out = r.hosts is not None and type(error) is RuntimeError and "can't allocate memory" in str(error)
    return RuntimeError if ran_out else torch.OutOfMemoryError
