# SPDX-License-Identifier: Apache-2.0
"""What follows a simulated device's name: a schedule, `strict`, and a guess where nothing is published."""

from __future__ import annotations

from dataclasses import dataclass

from hal_sim.chips import Chip
from hal_sim.schedule import Schedule

_STRICT, _ACCUMULATOR = "strict", "accumulator="


@dataclass(frozen=True)
class Options:
    """The options of one device.

    Attributes:
        chip: whose unit, with the accumulator that was asked for.
        schedule: how K is shared out.
        strict: whether what is not simulated is refused.
    """

    chip: Chip
    schedule: Schedule
    strict: bool

    @classmethod
    def parse(cls, text: str, chip: Chip) -> Options:
        """Read options with slashes between them: `splitk=4/strict`, `accumulator=cut`.

        Raises:
            ConfigError: one of them is none, or not the chip's.
        """
        parts = [part for part in text.split("/") if part]
        for part in parts:
            if part.startswith(_ACCUMULATOR):
                chip = chip.with_accumulator(part.removeprefix(_ACCUMULATOR))
        schedule = "/".join(part for part in parts if part != _STRICT and not part.startswith(_ACCUMULATOR))
        return cls(chip, Schedule.parse(schedule) if schedule else Schedule(), _STRICT in parts)
