# SPDX-License-Identifier: Apache-2.0
"""One function for each part of the interface. It returns what it saw, or raises `Failed` or `Unsupported`.

None of them only asks that a call does not raise: each compares the result with what the interface says.
"""

from __future__ import annotations

from collections.abc import Callable

from hal.backend import Backend
from hal.check.checks import closing, listing, memory, precision, random, work
from hal.check.checks.collectives import collectives
from hal.check.checks.expect import Failed
from hal.check.state import ProcessState
from hal.device import Device

__all__ = ["BEFORE_OPEN", "CLOSED", "JUST_OPENED", "OPENED", "PARTS", "Failed"]

BEFORE_OPEN: dict[str, Callable[[Backend], str]] = {
    "discover.facts": listing.facts,
    "discover.repeatable": listing.repeatable,
    "discover.cheap": listing.cheap,
    "advice": listing.advice,
    "allocator": listing.allocator,
}
JUST_OPENED: dict[str, Callable[[Device, ProcessState], str]] = {
    "open": work.opened,
    "open.generators": work.generators,
}
OPENED: dict[str, Callable[[Device], str]] = {
    "memory.stats": memory.stats,
    "memory.allocated": memory.allocated,
    "memory.peak": memory.peak,
    "memory.empty_cache": memory.empty_cache,
    "memory.limit": memory.limit,
    "memory.snapshot": memory.snapshot,
    "memory.pin": memory.pin,
    "memory.out_of_memory": memory.out_of_memory,
    "precision.ieee": precision.ieee,
    "precision.reduced": precision.reduced,
    "precision.autocast": precision.autocast,
    "precision.fp8": precision.fp8,
    "precision.deterministic": precision.deterministic,
    "random.seed": random.seed,
    "random.state": random.state,
    "random.portable": random.portable,
    "synchronize": work.synchronize,
    "streams": work.streams,
    "support": work.support,
    "prepare": work.prepare,
    "collectives": collectives,
    "versions": work.versions,
    "contract": work.contract,
}
CLOSED: dict[str, Callable[[Device, ProcessState], str]] = {
    "close.refuses": closing.refuses,
    "close.restores": closing.restores,
}
PARTS = (*BEFORE_OPEN, *JUST_OPENED, *OPENED, *CLOSED)
