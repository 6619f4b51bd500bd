# SPDX-License-Identifier: Apache-2.0
"""The facets of one device, together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hal.not_simulated import NotSimulated

if TYPE_CHECKING:
    import torch

    from hal.collectives import Collectives
    from hal.contract import Contract
    from hal.memory import Memory
    from hal.precision import Precision
    from hal.random import Random
    from hal.streams import Streams
    from hal.support_table import SupportTable


@dataclass(frozen=True)
class Facets:
    """What a backend returns from `open`: one object for each facet of the device.

    Attributes:
        not_simulated: of a simulated device, see `Device.not_simulated`.
    """

    torch_device: torch.device
    memory: Memory
    precision: Precision
    collectives: Collectives
    random: Random
    streams: Streams
    support: SupportTable
    contract: Contract
    not_simulated: NotSimulated = field(default_factory=NotSimulated)
