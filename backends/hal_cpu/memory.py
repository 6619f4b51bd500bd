# SPDX-License-Identifier: Apache-2.0
"""Memory of the CPU: the process's resident set, its peak since reset, a limit, and tensors on request.

torch's CPU allocator keeps no statistics. What the kernel knows of the process is reported as such, under
`process`; bytes in tensors are None unless they are counted (`count_tensors`).
"""

from __future__ import annotations

import contextlib
import re
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from hal.errors import ConfigError, UnsupportedOperation
from hal.memory import Memory, MemoryStats, requested_bytes

if TYPE_CHECKING:
    import torch

_STATUS = "/proc/self/status"
_SIZES = {name: re.compile(rb"%b:\s+(\d+) kB" % name.encode()) for name in ("VmRSS", "VmHWM", "VmData")}
_CLEAR = Path("/proc/self/clear_refs")
_CGROUP = Path("/sys/fs/cgroup")

_SOURCES = {"total": "physical memory, or the container's limit", "free": "available memory, or the container's rest"}
_SOURCES_LINUX = {**_SOURCES, "process": "/proc/self/status VmRSS", "peak_process": "/proc/self/status VmHWM"}
_SOURCES_ELSEWHERE = {**_SOURCES, "process": "psutil memory_info().rss"}


def total_memory() -> int:
    """Return the bytes that this machine, or the container that we are in, has."""
    import psutil

    total = int(psutil.virtual_memory().total)
    limit = _cgroup("memory.max")
    return total if limit is None else min(total, limit)


def _cgroup(name: str) -> int | None:
    """Read one number of this container's memory controller; None where there is none, or no limit."""
    try:
        return int((_CGROUP / name).read_text())
    except (OSError, ValueError):
        return None


def _status(*names: str) -> dict[str, int]:
    """Read sizes out of /proc/self/status, in bytes; empty where there is no such file."""
    try:
        with open(_STATUS, "rb", buffering=0) as file:  # noqa: PTH123  a call of every training step
            text = file.read()
    except OSError:
        return {}
    return {name: int(_SIZES[name].search(text)[1]) * 1024 for name in names}  # type: ignore[index]


@final
class CpuMemory(Memory):
    """Memory of this process and of the host."""

    def __init__(self, device_id: str) -> None:
        import psutil

        super().__init__(device_id)
        self._psutil = psutil
        self._process = psutil.Process()
        self._total = total_memory()
        self._in_container = _cgroup("memory.current") is not None
        self._counter: TensorCounter | None = None
        self._soft: int | None = None

    def allocated(self) -> int | None:
        """Return the bytes in live tensors, None unless they are being counted (`count_tensors`)."""
        return None if self._counter is None else self._counter.current

    def stats(self) -> MemoryStats:
        """See `Memory.stats`. `process` is the resident set; `reserved` stays None: there is no such pool."""
        numbers = {"total": self._total, "free": self._free()}
        sizes = _status("VmRSS", "VmHWM")
        if sizes:
            numbers["process"], numbers["peak_process"] = sizes["VmRSS"], sizes["VmHWM"]
            sources = _SOURCES_LINUX
        else:
            numbers["process"] = int(self._process.memory_info().rss)
            sources = _SOURCES_ELSEWHERE
        if self._counter is not None:
            numbers["allocated"], numbers["peak_allocated"] = self._counter.current, self._counter.peak
            sources = {**sources, "allocated": "count_tensors", "peak_allocated": "count_tensors"}
        return MemoryStats(**numbers, sources=sources)

    def _free(self) -> int:
        available = int(self._psutil.virtual_memory().available)
        if not self._in_container:
            return available
        limit, used = _cgroup("memory.max"), _cgroup("memory.current")
        return available if limit is None or used is None else max(0, min(available, limit - used))

    def reset_peak(self) -> None:
        """Start the peaks anew.

        Raises:
            UnsupportedOperation: the system cannot reset a process's peak (anything but Linux).
        """
        if self._counter is not None:
            self._counter.peak = self._counter.current
        try:
            _CLEAR.write_text("5")  # proc(5): resets VmHWM to the current resident set
        except OSError as error:
            raise UnsupportedOperation(
                f"{sys.platform} keeps one peak for the whole life of a process", device=self.device_id,
                what="memory.reset_peak",
            ) from error  # fmt: skip

    def empty_cache(self) -> None:
        """Give memory that the C library keeps free back to the system, where it can."""
        import ctypes

        trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform != "win32" else None
        if trim is not None:
            trim(0)

    def _limit(self, nbytes: int | None) -> None:
        """Limit the private memory that this process may map, by RLIMIT_DATA.

        It is the kernel's limit: it holds for every thread and library, and other code sees a MemoryError.
        """
        if sys.platform != "linux":
            raise UnsupportedOperation(
                f"{sys.platform} cannot limit a process's private memory", device=self.device_id, what="memory.limit"
            )
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        if self._soft is None:
            self._soft = soft
        if nbytes is None:
            resource.setrlimit(resource.RLIMIT_DATA, (self._soft, hard))
            self._soft = None
            return
        mapped = _status("VmData").get("VmData", 0)
        if nbytes < mapped:
            raise ConfigError(
                f"{self.device_id}: a limit of {nbytes} bytes, and the process has mapped {mapped} already",
                expected=f"more than {mapped} bytes",
            )
        resource.setrlimit(resource.RLIMIT_DATA, (nbytes, hard))

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor itself: the device computes on the host's memory."""
        return tensor

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

        Costs a few microseconds an operator. `allocated` and `peak_allocated` are known meanwhile.
        """
        if self._counter is not None:
            raise ConfigError(f"{self.device_id}: tensors are already being counted")
        self._counter = TensorCounter()
        try:
            with self._counter.mode():
                yield self._counter
        finally:
            self._counter = None


@final
class TensorCounter:
    """Bytes in the live storages of CPU tensors that were created while counting.

    Attributes:
        current: bytes now.
        peak: the largest since the start or `reset_peak()`.
    """

    def __init__(self) -> None:
        self.current = 0
        self.peak = 0
        self._seen: set[int] = set()

    def add(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage until it dies; a view adds nothing."""
        if tensor.device.type != "cpu" or tensor.is_sparse:
            return
        storage = tensor.untyped_storage()
        key, nbytes = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.current += nbytes
        self.peak = max(self.peak, self.current)
        weakref.finalize(storage, self._gone, key, nbytes)

    def _gone(self, key: int, nbytes: int) -> None:
        self._seen.discard(key)
        self.current -= nbytes

    def mode(self) -> Any:
        """Return the dispatch mode that counts."""
        import torch
        from torch.utils._python_dispatch import TorchDispatchMode
        from torch.utils._pytree import tree_leaves

        counter = self

        class Counting(TorchDispatchMode):
            def __torch_dispatch__(
                self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
            ) -> Any:
                result = func(*args, **(kwargs or {}))
                for leaf in tree_leaves(result):
                    if isinstance(leaf, torch.Tensor):
                        counter.add(leaf)
                return result

        return Counting()  # type: ignore[no-untyped-call]
