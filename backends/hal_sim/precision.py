# SPDX-License-Identifier: Apache-2.0
"""Precision of a simulated device: which of its units takes float32 operands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, final

from hal.changes import Switch
from hal.errors import UnsupportedPrecision
from hal.precision import Fp32Mode, Precision
from hal_sim.simulation import NARROW

if TYPE_CHECKING:
    import torch

    from hal.changes import Changes
    from hal.support_table import SupportTable
    from hal_sim.simulation import Simulation


@final
class SimPrecision(Precision):
    """float32 goes to the TF32 (XF32, HF32) unit, or through a chain of fused multiply-adds."""

    def __init__(
        self, device_id: str, device: torch.device, changes: Changes, support: SupportTable, simulation: Simulation
    ) -> None:
        super().__init__(device_id, device, changes, support)
        self._simulation = simulation

    def _fp32_switches(self, mode: Fp32Mode) -> Sequence[tuple[Switch, object]]:
        simulation = self._simulation
        if mode == "bf16x3" or (mode == "tf32" and not simulation.chip.units.keys() & set(NARROW)):
            raise UnsupportedPrecision(f"{simulation.chip.product} has no such mode", device=self.device_id, what=mode)

        def write(value: bool) -> None:
            simulation.tf32 = value

        return [(Switch(f"{self.device_id}: TF32 unit", lambda: simulation.tf32, write), mode == "tf32")]
