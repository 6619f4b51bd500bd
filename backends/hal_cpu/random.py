# SPDX-License-Identifier: Apache-2.0
"""The CPU's generator: torch's default one."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from hal.random import Random

if TYPE_CHECKING:
    import torch


@final
class CpuRandom(Random):
    """torch's default generator. `torch.manual_seed` would seed every other device, too."""

    def _seed(self, seed: int) -> None:
        import torch

        torch.default_generator.manual_seed(seed)

    def _get_state(self) -> torch.Tensor:
        import torch

        return torch.default_generator.get_state()

    def _set_state(self, state: torch.Tensor) -> None:
        import torch

        torch.default_generator.set_state(state)
