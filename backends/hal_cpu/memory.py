# SPDX-License-Identifier: Apache-2.0
"""Memory of the CPU: the process's resident set, its peak since reset, a limit, and tensors on request.

torch's CPU allocator keeps no statistics. What the kernel knows of the process is reported as such, under
`process`; bytes in tensors are None unless they are counted (`count_tensors`).
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from hal.changes import Switch
from hal.errors import ConfigError, UnsupportedOperation
from hal.memory import Memory, requested_bytes
from hal.memory_stats import MemoryStats
from hal_cpu.control_group import limited_groups

if TYPE_CHECKING:
    import torch

    from hal_cpu.tensor_counter import TensorCounter

_STATUS = "/proc/self/status"
_SIZES = {name: re.compile(rb"%b:\s+(\d+) kB" % name.encode()) for name in ("VmRSS", "VmHWM", "VmData")}
_CLEAR = Path("/proc/self/clear_refs")
_LARGEST_LIMIT = 2**63 - 1  # Python passes a limit to the kernel as a signed number

_SOURCES = {"total": "physical memory, or the limit of the control group",
            "free": "available memory, or the rest of the control group's"}  # fmt: skip
_SOURCES_LINUX = {**_SOURCES, "process": "/proc/self/status VmRSS", "peak_process": "/proc/self/status VmHWM"}
_SOURCES_ELSEWHERE = {**_SOURCES, "process": "psutil memory_info().rss"}


def total_memory() -> int:
    """Return the bytes that this machine has, or the container, batch job or service that we run in."""
    limits = [group.limit() for group in limited_groups()]
    return min([_physical_memory(), *(limit for limit in limits if limit is not None)])


def _physical_memory() -> int:
    if sys.platform == "linux":  # psutil says the same, and importing it is a sixth of what `hal run` takes to start
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    import psutil

    return int(psutil.virtual_memory().total)


def _status(*names: str) -> dict[str, int]:
    """Read sizes out of /proc/self/status, in bytes; empty where there is no such file."""
    try:
        with open(_STATUS, "rb", buffering=0) as file:  # noqa: PTH123  a call of every training step
            text = file.read()
    except OSError:
        return {}
    return {name: int(_SIZES[name].search(text)[1]) * 1024 for name in names}  # type: ignore[index]


def mapped_bytes() -> int:
    """Return the private memory that this process has mapped, which RLIMIT_DATA limits; 0 where nobody tells."""
    return _status("VmData").get("VmData", 0)


class CpuMemory(Memory):
    """Memory of this process and of the host."""

    def __init__(self, device_id: str) -> None:
        super().__init__(device_id)
        self._total = total_memory()
        self._groups = limited_groups()
        self._counter: TensorCounter | None = None

    def _allocated(self) -> int | None:
        return None if self._counter is None else self._counter.current

    def _stats(self) -> MemoryStats:
        # `process` is the resident set; `reserved` stays None: there is no such pool.
        numbers = {"total": self._total, "free": self._free()}
        sizes = _status("VmRSS", "VmHWM")
        if sizes:
            numbers["process"], numbers["peak_process"] = sizes["VmRSS"], sizes["VmHWM"]
            sources = _SOURCES_LINUX
        else:
            import psutil

            numbers["process"] = int(psutil.Process().memory_info().rss)
            sources = _SOURCES_ELSEWHERE
        if self._counter is not None:
            numbers["allocated"], numbers["peak_allocated"] = self._counter.current, self._counter.peak
            sources = {**sources, "allocated": "count_tensors", "peak_allocated": "count_tensors"}
        return MemoryStats(**numbers, sources=sources)

    def _free(self) -> int:
        import psutil

        rests = [group.free() for group in self._groups]
        return min([int(psutil.virtual_memory().available), *(rest for rest in rests if rest is not None)])

    def _reset_peak(self) -> None:
        if self._counter is not None:
            self._counter.reset_peak()
        try:
            _CLEAR.write_text("5")  # proc(5): resets VmHWM to the current resident set
        except OSError as error:
            raise UnsupportedOperation(
                f"{sys.platform} keeps one peak for the whole life of a process", device=self.device_id,
                what="memory.reset_peak",
            ) from error  # fmt: skip

    def _empty_cache(self) -> None:
        # Memory that the C library keeps free goes back to the system, where it can.
        import ctypes

        trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform != "win32" else None
        if trim is not None:
            trim(0)

    def _limit_switch(self) -> Switch:
        """Return the soft limit of the private memory that this process may map, None without a limit.

        It is the kernel's limit: it holds for every thread and library, and other code sees a MemoryError.
        """
        if sys.platform != "linux":
            raise UnsupportedOperation(
                f"{sys.platform} cannot limit a process's private memory", device=self.device_id, what="memory.limit"
            )
        import resource

        def read() -> int | None:
            soft, _ = resource.getrlimit(resource.RLIMIT_DATA)
            return None if soft == resource.RLIM_INFINITY else soft

        def write(nbytes: int | None) -> None:
            _, hard = resource.getrlimit(resource.RLIMIT_DATA)
            resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY if nbytes is None else nbytes, hard))

        return Switch("resource.RLIMIT_DATA", read, write)

    def least_limit(self) -> int:
        """Return what the process has mapped: the kernel takes nothing of it back."""
        return max(1, mapped_bytes())

    def _limit_value(self, nbytes: int) -> int:
        import resource

        mapped = mapped_bytes()
        if nbytes < mapped:
            raise ConfigError(
                f"{self.device_id}: a limit of {nbytes} bytes, and the process has mapped {mapped} already",
                expected=f"more than {mapped} bytes",
            )
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        most = _LARGEST_LIMIT if hard == resource.RLIM_INFINITY else hard
        if nbytes > most:
            raise ConfigError(
                f"{self.device_id}: a limit of {nbytes} bytes, and the system allows {most}",
                expected=f"at most {most} bytes", hint="the hard limit is `ulimit -H -d`",
            )  # fmt: skip
        return nbytes

    def _pin(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor  # the device computes on the host's memory

    def _out_of_memory(self, error: Exception) -> tuple[int | None] | None:
        # The CPU allocator raises a plain RuntimeError (c10/core/impl/alloc_cpu.cpp).
        if isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error):
            return (requested_bytes(str(error)),)
        if isinstance(error, MemoryError):
            return (None,)
        return super()._out_of_memory(error)

    @contextlib.contextmanager
    def count_tensors(self) -> Iterator[TensorCounter]:
        """Count the bytes in tensors that torch operators create in this thread, inside the block.

        `allocated` and `peak_allocated` are known meanwhile. A view of a tensor from before the block counts nothing,
        nor does writing into it; what it grows by counts. Not seen is memory that no operator hands out: what an
        operator frees again before it returns, numpy's arrays, and storages that `torch.load` fills
        or a tensor's `copy.deepcopy`. Costs about ten microseconds an operator.

        Raises:
            ConfigError: this handle is counting already.
        """
        from hal_cpu.tensor_counter import TensorCounter

        self.check_open()
        if self._counter is not None:
            raise ConfigError(f"{self.device_id}: tensors are already being counted")
        self._counter = TensorCounter()
        try:
            with self._counter:
                yield self._counter
        finally:
            self._counter = None
