# SPDX-License-Identifier: Apache-2.0
"""The accelerators that can be simulated: each an architecture of `hal.matrix_unit`, and what is sold with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from hal.errors import ConfigError
from hal.matrix_unit import MATRIX_UNITS, MatrixUnit


@dataclass(frozen=True)
class Chip:
    """One product.

    Attributes:
        vendor, product: as the vendor writes them.
        arch: key of `MATRIX_UNITS`.
        recorded: whether products of this card were recorded and are reproduced; otherwise its architecture's were, or
            only models are known.
        accumulators: other keys, by name, where nobody has published how sums are kept.
    """

    vendor: str
    product: str
    arch: str
    recorded: bool = False
    accumulators: Mapping[str, str] = field(default_factory=dict)

    def with_accumulator(self, name: str) -> Chip:
        """Return the chip with another guess about its sums.

        Raises:
            ConfigError: there is none of that name.
        """
        if name not in self.accumulators:
            raise ConfigError(
                f"{self.product} has no accumulator {name!r}",
                expected=", ".join(self.accumulators) or "none, since its sums are published",
            )
        return replace(self, arch=self.accumulators[name])

    @property
    def units(self) -> Mapping[str, MatrixUnit]:
        """The rule for each format of operands."""
        return MATRIX_UNITS[self.arch]

    @property
    def evidence(self) -> str:
        """Where the rules come from, in words."""
        if self.units["float16"].evidence == "unverified":
            return f"{self.arch}: unverified; nobody has published how it sums"
        if self.arch.startswith("gfx"):
            return f"{self.arch}: two models agree, nothing is recorded"
        return f"{self.arch}: recorded products" if self.recorded else f"{self.arch}: same architecture; not recorded"


CHIPS: Mapping[str, Chip] = {
    "v100": Chip("NVIDIA", "V100", "sm_70", recorded=True),
    "a100": Chip("NVIDIA", "A100", "sm_80", recorded=True),
    "a800": Chip("NVIDIA", "A800", "sm_80"),
    "l40s": Chip("NVIDIA", "L40S", "sm_89", recorded=True),
    "h100": Chip("NVIDIA", "H100", "sm_90", recorded=True),
    "h200": Chip("NVIDIA", "H200", "sm_90", recorded=True),
    "h800": Chip("NVIDIA", "H800", "sm_90"),
    "h20": Chip("NVIDIA", "H20", "sm_90"),
    "b200": Chip("NVIDIA", "B200", "sm_100", recorded=True),
    "mi250": Chip("AMD", "Instinct MI250", "gfx90a"),
    "mi300x": Chip("AMD", "Instinct MI300X", "gfx942"),
    "ascend910b": Chip(
        "Huawei",
        "Ascend 910B",
        "davinci, nearest",
        accumulators={"nearest": "davinci, nearest", "cut": "davinci, cut"},
    ),
}
"""By the name that follows `sim:`."""
