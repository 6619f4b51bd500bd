# SPDX-License-Identifier: Apache-2.0
"""Switches of the whole process that an implementation may leave in another position, and the cases after it meet.

They are read before a case runs and compared afterwards. A switch that was left moved is a verdict of its own, for the
case that moved it, and is put back: the others are judged under what they were promised. What a read costs matters,
since it is paid twice a case: all of them together take some sixty microseconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Switch:
    """One of them.

    Attributes:
        name: for people.
        read: returns its position, comparable by `==`.
        write: puts it into a position.
        told: whether leaving it moved is a fault. The number of threads changes no more than an order of sums, and
            an implementation may want another one: it is put back without a word.
    """

    name: str
    read: Callable[[], Any]
    write: Callable[[Any], object]
    told: bool = True


class ProcessState:
    """The switches of this process, for a device of one type.

    Args:
        device_type: torch's name for it, for its autocast.
    """

    def __init__(self, device_type: str) -> None:
        self._switches = [*_numpy(), *_torch(device_type)]

    def read(self) -> tuple[Any, ...]:
        """Return the position of every switch."""
        return tuple(switch.read() for switch in self._switches)

    def restore(self, before: tuple[Any, ...]) -> list[str]:
        """Put every switch back to where it was; return those that should not have moved, each with its position."""
        moved = []
        for switch, old in zip(self._switches, before, strict=True):
            now = switch.read()
            if now != old:
                switch.write(old)
                if switch.told:
                    moved.append(f"{switch.name} at {now}")
        return moved


def _numpy() -> list[Switch]:
    return [Switch("numpy's handling of floating-point errors", np.geterr, lambda old: np.seterr(**old))]


def _torch(device_type: str) -> list[Switch]:
    import torch

    tiny = torch.tensor(2.0**-1070, dtype=torch.float64)  # torch tells no other way whether it flushes these
    mkldnn: Any = torch.backends.mkldnn
    found = [
        Switch("gradient mode", torch.is_grad_enabled, torch.set_grad_enabled),
        Switch("the default dtype", torch.get_default_dtype, torch.set_default_dtype),
        Switch(
            "the default device",
            lambda: str(torch.get_default_device()),
            lambda old: torch.set_default_device(None if old == "cpu" else old),
        ),
        Switch("the number of threads", torch.get_num_threads, torch.set_num_threads, told=False),
        Switch(
            "deterministic algorithms",
            lambda: (
                torch.are_deterministic_algorithms_enabled(),
                torch.is_deterministic_algorithms_warn_only_enabled(),
            ),
            lambda old: torch.use_deterministic_algorithms(old[0], warn_only=old[1]),
        ),
        Switch("flushing of subnormals", lambda: bool((tiny * 1) == 0), torch.set_flush_denormal),
        Switch("mkldnn", lambda: mkldnn.enabled, lambda old: mkldnn.set_flags(old)),
    ]
    found += [
        Switch(
            f"autocast on {kind}",
            lambda kind=kind: torch.is_autocast_enabled(kind),  # type: ignore[misc]
            lambda old, kind=kind: torch.set_autocast_enabled(kind, old),  # type: ignore[misc]
        )
        for kind in dict.fromkeys(("cpu", device_type))
    ]
    for module, name in ((mkldnn, "mkldnn"), (torch.backends.cuda, "cuda")):
        matmul = getattr(module, "matmul", None)
        if hasattr(matmul, "fp32_precision"):  # since torch 2.9; reading the old one after setting these raises
            found.append(
                Switch(
                    f"float32 precision of {name}'s matrix products",
                    lambda matmul=matmul: matmul.fp32_precision,  # type: ignore[misc]
                    lambda old, matmul=matmul: setattr(matmul, "fp32_precision", old),  # type: ignore[misc]
                )
            )
    return found
