# SPDX-License-Identifier: Apache-2.0
"""What follows a simulated device's name: a schedule, its size and number, a guess where nothing is published."""

from __future__ import annotations

import re
from dataclasses import dataclass

from hal.errors import ConfigError
from hal_sim.chips import Chip
from hal_sim.schedule import Schedule

_STRICT, _ACCUMULATOR, _MEMORY, _COUNT = "strict", "accumulator=", "memory=", "count="
_UNITS = {"MiB": 2**20, "GiB": 2**30}


@dataclass(frozen=True)
class Options:
    """The options of one device.

    Attributes:
        chip: whose unit, with the accumulator that was asked for.
        schedule: how K is shared out.
        strict: whether what is not simulated is refused.
        memory: bytes that it has; None: the host's.
        count: of the devices that `hal run` shows a program.
    """

    chip: Chip
    schedule: Schedule
    strict: bool = False
    memory: int | None = None
    count: int = 1

    @classmethod
    def parse(cls, text: str, chip: Chip) -> Options:
        """Read options with slashes between them: `splitk=4/strict`, `accumulator=cut`, `memory=24GiB/count=8`.

        Raises:
            ConfigError: one of them is none, stands twice, or is not the chip's.
        """
        found: dict[str, str] = {}
        schedule = []
        for part in filter(None, text.split("/")):
            kind = next((kind for kind in (_ACCUMULATOR, _MEMORY, _COUNT) if part.startswith(kind)), part)
            if kind == part and part != _STRICT:
                schedule.append(part)
            elif kind in found:
                raise ConfigError(f"{text!r} has {kind.rstrip('=')} twice", expected="each option once")
            else:
                found[kind] = part.removeprefix(kind)
        return cls(
            chip.with_accumulator(found[_ACCUMULATOR]) if _ACCUMULATOR in found else chip,
            Schedule.parse("/".join(schedule)) if schedule else Schedule(),
            _STRICT in found,
            _bytes(found[_MEMORY]) if _MEMORY in found else None,
            _number(found[_COUNT]) if _COUNT in found else 1,
        )


def _bytes(text: str) -> int:
    matched = re.fullmatch(r"([1-9][0-9]{0,6})(MiB|GiB)", text)
    if matched is None:
        raise ConfigError(f"no such amount of memory: {text!r}", expected="such as memory=512MiB or memory=24GiB")
    return int(matched[1]) * _UNITS[matched[2]]


def _number(text: str) -> int:
    if not re.fullmatch(r"[1-9][0-9]{0,2}", text):
        raise ConfigError(f"no such number of devices: {text!r}", expected="count=1 to count=999")
    return int(text)
