# SPDX-License-Identifier: Apache-2.0
"""What a machine shows of its accelerators before any of them is opened: files, environment, management library.

Nothing here creates a CUDA context (which would forbid a later fork): device files, /proc and NVML only.
"""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hal import machine


@dataclass(frozen=True)
class Card:
    """One card, in the order of the management library (that of the PCI bus). Unknown is None."""

    name: str | None = None
    arch: str | None = None
    total_memory: int | None = None
    uuid: str | None = None


def nvml_cards() -> tuple[Card, ...] | None:
    """Ask NVIDIA's management library for its cards; None if it is not here or does not answer."""
    try:
        nvml = ctypes.CDLL("nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1")
        count = ctypes.c_uint(0)
        if nvml.nvmlInit_v2() != 0 or nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
            return None
        return tuple(_nvml_card(nvml, index) for index in range(count.value))
    except (OSError, AttributeError):
        return None


class _NvmlMemory(ctypes.Structure):
    _fields_ = [(name, ctypes.c_ulonglong) for name in ("total", "free", "used")]


def _nvml_card(nvml: Any, index: int) -> Card:
    handle = ctypes.c_void_p()
    if nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(handle)) != 0:
        return Card()

    def text(function: str) -> str | None:
        buffer = ctypes.create_string_buffer(96)
        failed = getattr(nvml, function)(handle, buffer, ctypes.c_uint(len(buffer)))
        return None if failed else buffer.value.decode(errors="replace")

    major, minor, memory = ctypes.c_int(), ctypes.c_int(), _NvmlMemory()
    no_arch = nvml.nvmlDeviceGetCudaComputeCapability(handle, ctypes.byref(major), ctypes.byref(minor))
    no_memory = nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory))
    return Card(
        name=text("nvmlDeviceGetName"),
        arch=None if no_arch else f"sm_{major.value}{minor.value}",
        total_memory=None if no_memory else int(memory.total),
        uuid=text("nvmlDeviceGetUUID"),
    )


@dataclass(frozen=True)
class Machine(machine.Machine):
    """Where evidence is looked for.

    Attributes:
        management: asks the vendor's management library, or None where it does not answer.
    """

    management: Callable[[], Sequence[Card] | None] = field(default=nvml_cards)


def visible(setting: str | None, uuids: Sequence[str | None]) -> list[int]:
    """Return which of the cards a `..._VISIBLE_DEVICES` variable shows, in its order.

    The rules are the driver's (and `torch.cuda._parse_visible_devices`'s): ordinals, or unique prefixes of UUIDs;
    the first entry that fits no card ends the list; an entry twice empties it.
    """
    if setting is None:
        return list(range(len(uuids)))
    chosen: list[int] = []
    for entry in (part.strip() for part in setting.split(",")):
        if entry.startswith("GPU-"):
            fits = [index for index, uuid in enumerate(uuids) if uuid is not None and uuid.startswith(entry)]
            index = fits[0] if len(fits) == 1 else -1
        else:
            number = re.match(r"\+?\d+", entry)  # as strtoul reads: `1gpu` is 1
            index = int(number[0]) if number else -1
        if not 0 <= index < len(uuids):
            break
        if index in chosen:
            return []
        chosen.append(index)
    return chosen
