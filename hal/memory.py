# SPDX-License-Identifier: Apache-2.0
"""Memory of one device: statistics with their sources, limits, one out-of-memory error, allocator settings.

A number that a device cannot give is None, never 0.
"""

from __future__ import annotations

import abc
import contextlib
import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, final

from hal.arguments import integer
from hal.changes import Switch
from hal.errors import ConfigError, HalError, OutOfMemoryError, UnsupportedOperation
from hal.facet import Facet

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

    def __post_init__(self) -> None:
        # Frozen to the bottom: a caller's change must not reach the statistics that come after these.
        object.__setattr__(self, "sources", MappingProxyType(dict(self.sources)))

    def as_json(self) -> dict[str, Any]:
        """Return plain types for JSON."""
        return {f.name: getattr(self, f.name) for f in fields(self)} | {"sources": dict(self.sources)}

    def __reduce__(self) -> tuple[Any, ...]:
        # A mapping proxy cannot be pickled, and statistics travel inside errors between processes.
        return functools.partial(MemoryStats, **self.as_json()), ()


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
        if not (self.expandable_segments is None or isinstance(self.expandable_segments, bool)):
            raise ConfigError(f"expandable_segments is {self.expandable_segments!r}", expected="True, False or None")
        if self.max_split_size_mb is not None:
            integer("max_split_size_mb", self.max_split_size_mb, least=1)
        threshold = self.garbage_collection_threshold
        if threshold is not None and not (isinstance(threshold, float) and 0 < threshold < 1):
            raise ConfigError(
                f"garbage_collection_threshold is {threshold!r}", expected="a share between 0 and 1, or None"
            )

    def settings(self) -> dict[str, str]:
        """Return the settings that are given, in the `key: value` grammar that torch's allocators share."""
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        return {key: str(value) for key, value in given.items() if value is not None}


# A value may be a bracketed list with commas of its own: roundup_power2_divisions:[256:1,512:2].
_SETTING = re.compile(r"\s*([^\s:,\[\]]+)\s*:\s*(\[[^\[\]]*\]|[^:,\[\]]*[^\s:,\[\]])\s*(?:,|$)")


def parse_allocator_settings(variable: str, text: str) -> dict[str, str]:
    """Return the settings in the text of a variable, `key:value,key:value`; a comma at the end is allowed.

    Raises:
        ConfigError: some part of the text is nothing of the kind.
    """
    found: dict[str, str] = {}
    at = 0
    while text[at:].strip():
        setting = _SETTING.match(text, at)
        if setting is None:
            raise ConfigError(f"{variable}={text!r} cannot be read at {text[at:]!r}", expected="key:value,key:value")
        found[setting[1]] = setting[2]
        at = setting.end()
    return found


def merge_allocator_settings(variable: str, current: str | None, wanted: Mapping[str, str]) -> str:
    """Merge wanted settings into a `key:value,key:value` variable without losing what the user set.

    Raises:
        ConfigError: the user set the same key to another value, or the variable cannot be read.
    """
    merged = parse_allocator_settings(variable, current or "")
    for key, value in wanted.items():
        if not _same_value(merged.setdefault(key, value), value):
            raise ConfigError(
                f"{variable} already sets {key}:{merged[key]}, and the plan asks for {key}:{value}",
                hint=f"remove {key} from {variable}, or from the plan",
            )
    return ",".join(f"{key}:{value}" for key, value in merged.items())


def _same_value(one: str, other: str) -> bool:
    """Tell whether two values mean the same: 0.80 is 0.8, and True is true."""
    try:
        return float(one) == float(other)
    except ValueError:
        return one.replace(" ", "").lower() == other.replace(" ", "").lower()


class Memory(Facet, abc.ABC):
    """Memory of one opened device. A backend implements the hooks that start with an underscore.

    Every method raises `DeviceClosed` once the device is closed.

    Args:
        device_id: for messages.
        changes: see `Facet`.
    """

    # statistics ------------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def _allocated(self) -> int | None: ...

    @abc.abstractmethod
    def _stats(self) -> MemoryStats: ...

    @abc.abstractmethod
    def _reset_peak(self) -> None: ...

    @abc.abstractmethod
    def _empty_cache(self) -> None: ...

    def _snapshot(self) -> list[dict[str, Any]]:
        raise UnsupportedOperation("has no allocator snapshot", device=self.device_id, what="memory.snapshot")

    @final
    def allocated(self) -> int | None:
        """Return the bytes in live tensors of this process on this device. Cheap: no synchronisation."""
        self.check_open()
        return self._allocated()

    @final
    def stats(self) -> MemoryStats:
        """Return all statistics. Cheap enough for every step; asks the driver for `free` and `total`."""
        self.check_open()
        return self._stats()

    @final
    def reset_peak(self) -> None:
        """Start the peaks anew from the current values.

        Raises:
            UnsupportedOperation: the device cannot.
        """
        self.check_open()
        self._reset_peak()

    @final
    def empty_cache(self) -> None:
        """Return cached blocks that hold no tensor to the driver."""
        self.check_open()
        self._empty_cache()

    @final
    def snapshot(self) -> list[dict[str, Any]]:
        """Return the allocator's segments on this device, each a dict in the vendor's own form.

        Raises:
            UnsupportedOperation: the device keeps no such list.
        """
        self.check_open()
        return self._snapshot()

    # limit -----------------------------------------------------------------------------------------------------

    def _limit_switch(self) -> Switch:
        """Return the switch that is this device's limit, in bytes.

        Raises:
            UnsupportedOperation: the device has none.
        """
        raise UnsupportedOperation("has no memory limit", device=self.device_id, what="memory.limit")

    def _limit_value(self, nbytes: int) -> int:
        """Return what the switch is to be set to for a limit of `nbytes`.

        Raises:
            ConfigError: this limit cannot be set.
        """
        return nbytes

    def least_limit(self) -> int:
        """Return the smallest limit in bytes that can be set now."""
        return 1

    @final
    def limit(self, nbytes: int | None) -> None:
        """Let this process allocate at most `nbytes` on this device, until another call or `close()`.

        An allocation beyond it raises inside `catch_out_of_memory()` as our `OutOfMemoryError`. The limit is the
        process's: it is listed in `Device.changes`, and what was in force before comes back with the last handle of
        the device that lets go of it.

        Args:
            nbytes: the limit; None lets go of the one that this handle set.

        Raises:
            ConfigError: `nbytes` is no positive integer, or the system does not allow this limit.
            DeviceConflict: another open handle holds another limit.
            UnsupportedOperation: the device has no such limit.
        """
        self.check_open()
        switch = self._limit_switch()
        if nbytes is None:
            self._changes.release([switch.name])
        else:
            nbytes = integer(f"{self.device_id}: the memory limit in bytes", nbytes, least=1)
            self._changes.set(switch, self._limit_value(nbytes))

    # the rest --------------------------------------------------------------------------------------------------

    def _pin(self, tensor: torch.Tensor) -> torch.Tensor:
        raise UnsupportedOperation("has no page-locked memory", device=self.device_id, what="memory.pin")

    @final
    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a copy of a CPU tensor in page-locked memory, from which this device copies asynchronously.

        On a device that shares the host's memory the tensor itself is right already and is returned.

        Raises:
            ConfigError: this is no tensor on the CPU.
            UnsupportedOperation: the device has no page-locked memory.
        """
        import torch

        self.check_open()
        if not isinstance(tensor, torch.Tensor) or tensor.device.type != "cpu":
            kind = f"a tensor on {tensor.device}" if isinstance(tensor, torch.Tensor) else f"a {type(tensor).__name__}"
            raise ConfigError(f"{self.device_id}: cannot pin {kind}", expected="a tensor on the CPU")
        return self._pin(tensor)

    @final
    @contextlib.contextmanager
    def catch_out_of_memory(self) -> Iterator[None]:
        """Turn the vendor's out-of-memory error inside the block into `OutOfMemoryError`, with statistics.

        Other errors pass unchanged.
        """
        self.check_open()
        try:
            yield
        except OutOfMemoryError:
            raise
        except Exception as error:
            # A collective that ran out of memory arrives as our `CollectiveError`, the vendor's error chained.
            ours = isinstance(error, HalError) and isinstance(error.__cause__, Exception)
            found = self._out_of_memory(error.__cause__ if ours else error)  # type: ignore[arg-type]
            if found is None:
                raise
            raise OutOfMemoryError(
                "out of memory", device=self.device_id, requested=found[0], stats=self._stats()
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
