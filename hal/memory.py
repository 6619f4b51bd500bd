# SPDX-License-Identifier: Apache-2.0
"""Memory of one device: statistics with their sources, limits, one out-of-memory error, allocator settings.

A number that a device cannot give is None, never 0.
"""

from __future__ import annotations

import abc
import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, final

from hal.errors import ConfigError, OutOfMemoryError, UnsupportedOperation

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class MemoryStats:
    """Bytes, or None where the device does not tell.

    Attributes:
        allocated: in live tensors of this process, on this device.
        reserved: held by this process's allocator, live tensors included.
        peak_allocated, peak_reserved: the largest since `reset_peak()` or the process's start.
        free, total: of the whole device, as its driver tells.
        process, peak_process: everything that this process holds on the device (on a CPU: its resident set),
            and the largest since `reset_peak()`.
        sources: for each number that is not None, the call that it came from.
    """

    allocated: int | None = None
    reserved: int | None = None
    peak_allocated: int | None = None
    peak_reserved: int | None = None
    free: int | None = None
    total: int | None = None
    process: int | None = None
    peak_process: int | None = None
    sources: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class AllocatorPlan:
    """Allocator settings in vendor-neutral terms; None leaves the vendor's default or the user's own setting.

    Attributes:
        expandable_segments: map memory in growing segments, against fragmentation.
        max_split_size_mb: blocks above this are not split.
        garbage_collection_threshold: share of the memory at which cached blocks are freed, in (0, 1).
    """

    expandable_segments: bool | None = None
    max_split_size_mb: int | None = None
    garbage_collection_threshold: float | None = None

    def __post_init__(self) -> None:
        if self.max_split_size_mb is not None and self.max_split_size_mb <= 0:
            raise ConfigError(f"max_split_size_mb is {self.max_split_size_mb}", expected="a positive number of MiB")
        threshold = self.garbage_collection_threshold
        if threshold is not None and not 0 < threshold < 1:
            raise ConfigError(f"garbage_collection_threshold is {threshold}", expected="a share between 0 and 1")

    def settings(self) -> dict[str, str]:
        """Return the settings that are given, in the `key: value` grammar that torch's allocators share."""
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        return {key: str(value) for key, value in given.items() if value is not None}


def merge_allocator_settings(variable: str, current: str | None, wanted: Mapping[str, str]) -> str:
    """Merge wanted settings into a `key:value,key:value` variable without losing what the user set.

    Raises:
        ConfigError: the user set the same key to another value, or the variable cannot be read.
    """
    merged: dict[str, str] = {}
    # A value may be a bracketed list with commas of its own: roundup_power2_divisions:[256:1,512:2].
    for item in re.findall(r"(?:\[[^\]]*\]|[^,\[])+", current or ""):
        key, colon, value = item.strip().partition(":")
        if not colon or not key:
            raise ConfigError(f"{variable}={current!r} cannot be read at {item!r}", expected="key:value,key:value")
        merged[key] = value
    for key, value in wanted.items():
        if merged.get(key, value).lower() != value.lower():
            raise ConfigError(
                f"{variable} already sets {key}:{merged[key]}, and the plan asks for {key}:{value}",
                hint=f"remove {key} from {variable}, or from the plan",
            )
        merged.setdefault(key, value)
    return ",".join(f"{key}:{value}" for key, value in merged.items())


class Memory(abc.ABC):
    """Memory of one opened device. A backend implements the hooks that start with an underscore.

    Args:
        device_id: for messages.
    """

    def __init__(self, device_id: str) -> None:
        self.device_id = device_id

    @abc.abstractmethod
    def allocated(self) -> int | None:
        """Return the bytes in live tensors of this process on this device. Cheap: no synchronisation."""

    @abc.abstractmethod
    def stats(self) -> MemoryStats:
        """Return all statistics. Cheap enough for every step; asks the driver for `free` and `total`."""

    @abc.abstractmethod
    def reset_peak(self) -> None:
        """Start the peaks anew from the current values."""

    @abc.abstractmethod
    def empty_cache(self) -> None:
        """Return cached blocks that hold no tensor to the driver."""

    @final
    def limit(self, nbytes: int | None) -> None:
        """Let this process allocate at most `nbytes` on this device; None lifts the limit.

        An allocation beyond it raises inside `catch_out_of_memory()` as our `OutOfMemoryError`.

        Raises:
            ConfigError: `nbytes` is not positive.
            UnsupportedOperation: the device has no such limit.
        """
        if nbytes is not None and nbytes <= 0:
            raise ConfigError(
                f"{self.device_id}: a memory limit of {nbytes} bytes", expected="a positive number, or None"
            )
        self._limit(nbytes)

    def _limit(self, nbytes: int | None) -> None:
        raise UnsupportedOperation("has no memory limit", device=self.device_id, what="memory.limit")

    def snapshot(self) -> list[dict[str, Any]]:
        """Return the allocator's segments, each a dict in the vendor's own form.

        Raises:
            UnsupportedOperation: the device keeps no such list.
        """
        raise UnsupportedOperation("has no allocator snapshot", device=self.device_id, what="memory.snapshot")

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a copy of a CPU tensor in page-locked memory, from which this device copies asynchronously.

        On a device that shares the host's memory the tensor itself is right already and is returned.

        Raises:
            UnsupportedOperation: the device has no page-locked memory.
        """
        raise UnsupportedOperation("has no page-locked memory", device=self.device_id, what="memory.pin")

    @final
    @contextlib.contextmanager
    def catch_out_of_memory(self) -> Iterator[None]:
        """Turn the vendor's out-of-memory error inside the block into `OutOfMemoryError`, with statistics.

        Other errors pass unchanged.
        """
        try:
            yield
        except OutOfMemoryError:
            raise
        except Exception as error:
            found = self._out_of_memory(error)
            if found is None:
                raise
            raise OutOfMemoryError(
                "out of memory", device=self.device_id, requested=found[0], stats=self.stats()
            ) from error

    def _out_of_memory(self, error: Exception) -> tuple[int | None] | None:
        """Return (requested bytes or None,) if the error means that memory ran out, otherwise None."""
        import torch

        if isinstance(error, torch.OutOfMemoryError):
            return (requested_bytes(str(error)),)
        # torch's host allocator, which also serves pinned memory, raises a plain RuntimeError.
        if isinstance(error, RuntimeError) and "can't allocate memory" in str(error):
            return (requested_bytes(str(error)),)
        return None


def requested_bytes(message: str) -> int | None:
    """Read the requested size out of an allocator's message, such as `Tried to allocate 2.00 GiB`."""
    match = re.search(r"allocate ([\d.]+) (bytes|[KMGT]iB)", message)
    if match is None:
        return None
    unit = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}[match[2]]
    return int(float(match[1]) * unit)
