# SPDX-License-Identifier: Apache-2.0
"""How one simulated device multiplies: its chip's units, a schedule, and what it does with what it has no unit for."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch

from hal.errors import UnsupportedOperation
from hal.not_simulated import NotSimulated
from hal_sim import native
from hal_sim.chips import Chip
from hal_sim.grouped import grouped
from hal_sim.product import ONE_PIECE, multiply, multiply_groups
from hal_sim.schedule import Schedule

NARROW = ("tf32", "hf32")
"""Formats that float32 operands are cut or rounded to, where a mode asks for it."""


@dataclass(repr=False)
class Simulation:
    """One device's way to multiply.

    Attributes:
        device_id: for messages.
        chip: whose unit.
        schedule: how K is shared out.
        strict: whether what is not simulated is refused.
        tf32: whether float32 operands go to the TF32 unit, or HF32 on Ascend.
        not_simulated: operators that were computed as a CPU does.
    """

    device_id: str
    chip: Chip
    schedule: Schedule
    strict: bool = False
    tf32: bool = False
    not_simulated: NotSimulated = field(default_factory=NotSimulated)

    def __repr__(self) -> str:
        """Return what a user calls it by: messages and `Device.changes` show it."""
        return self.device_id

    def product(self, a_BMK: torch.Tensor, b_BKN: torch.Tensor) -> torch.Tensor:
        """Return a b in the accumulator's format.

        Raises:
            UnsupportedOperation: the chip has no unit for the dtype.
        """
        formats = self._format(a_BMK.dtype), self._format(b_BKN.dtype)
        return multiply(a_BMK, b_BKN, self.chip.units[formats[0]], formats, self.schedule)

    def grouped(self, a: torch.Tensor, b: torch.Tensor, ends: torch.Tensor | None) -> torch.Tensor:
        """Return the products of groups, see `hal_sim.grouped`, in the accumulator's format.

        Raises:
            UnsupportedOperation: the chip has no unit for the dtype.
        """
        formats = self._format(a.dtype), self._format(b.dtype)
        unit = self.chip.units[formats[0]]
        together = functools.partial(multiply_groups, unit, formats)
        at_once = self.schedule == ONE_PIECE and unit.result != "float64" and native.library() is not None
        return grouped(self.product, a, b, ends, together if at_once else None)

    def _format(self, dtype: torch.dtype) -> str:
        name = str(dtype).removeprefix("torch.")
        if name == "float32" and self.tf32:
            name = next((format for format in NARROW if format in self.chip.units), name)
        if name not in self.chip.units:
            has = ", ".join(sorted(unit for unit in self.chip.units if unit not in NARROW))
            raise UnsupportedOperation(
                f"{self.chip.product} has no matrix unit for {name}", device=self.device_id, what=name, expected=has
            )
        return name

    def count(self, operator: str, operands: tuple[object, ...] = ()) -> None:
        """Take note of an operator that is not simulated.

        Raises:
            UnsupportedOperation: the device is strict.
        """
        if self.strict:
            raise UnsupportedOperation(
                f"{operator} multiplies inside a kernel of its own, which is not simulated", device=self.device_id,
                what=operator, hint=f"open {self.device_id.replace('/strict', '')} to compute it as a CPU does",
            )  # fmt: skip
        self.not_simulated.add(operator, operands)
