# SPDX-License-Identifier: Apache-2.0
"""What is left of a device that was closed."""

from __future__ import annotations

from collections.abc import Callable

from hal.check.checks.expect import Failed, expect
from hal.check.state import ProcessState
from hal.device import Device
from hal.errors import DeviceClosed, HalError


def refuses(device: Device, before: ProcessState) -> str:
    """A closed device says so, its facets too, and closing twice is harmless."""
    import torch

    memory, precision = device.memory, device.precision  # as a program may keep them
    calls: dict[str, Callable[[], object]] = {
        "synchronize": device.synchronize,
        "stream": device.stream,
        "event": device.event,
        "support": lambda: device.support("matmul", torch.float32),
        "prepare": lambda: device.prepare(torch.zeros(1)),
        "memory.stats": memory.stats,
        "memory.limit": lambda: memory.limit(2**30),
        "memory.empty_cache": memory.empty_cache,
        "precision.fp32_mode": lambda: precision.fp32_mode("ieee"),
        "precision.deterministic": precision.deterministic,
        "precision.autocast": lambda: precision.autocast(torch.bfloat16),
        "random.seed": lambda: device.random.seed(7),
        "collectives.init": lambda: device.collectives.init(rank=0, world_size=1, timeout_s=10.0),
    }
    device.close()
    device.close()
    for name, call in calls.items():
        try:
            call()
        except DeviceClosed:
            continue
        except HalError as error:
            raise Failed(f"{name}() raises {type(error).__name__} after close(), not DeviceClosed") from error
        raise Failed(f"{name}() works after close()")
    return f"DeviceClosed from {len(calls)} calls"


def restores(device: Device, before: ProcessState) -> str:
    """Everything that opening and using it changed is as it was."""
    left = before.differences(ProcessState())
    expect(not left, "; ".join(left))
    expect(not list(device.changes), f"still held: {', '.join(map(str, device.changes))}")
    return f"{len(before.switches)} settings as before"
