# SPDX-License-Identifier: Apache-2.0
"""Statistics of one device's memory. A number that a device cannot give is None, never 0."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any


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
