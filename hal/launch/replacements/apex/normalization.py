# SPDX-License-Identifier: Apache-2.0
"""Norms."""

from __future__ import annotations

from typing import Any

import torch

from hal.launch.replacements.finder import stands_in

_INSTEAD = "torch's own norm, which rounds where torch does"


class FusedLayerNorm(torch.nn.LayerNorm):
    """torch's LayerNorm with apex's arguments."""

    def __init__(
        self, normalized_shape: Any, eps: float = 1e-5, elementwise_affine: bool = True, memory_efficient: bool = False
    ) -> None:
        stands_in(f"apex.normalization.{type(self).__name__}", _INSTEAD)
        super().__init__(normalized_shape, eps, elementwise_affine)


class FusedRMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm with apex's arguments; the epsilon's default is apex's."""

    def __init__(
        self, normalized_shape: Any, eps: float = 1e-5, elementwise_affine: bool = True, memory_efficient: bool = False
    ) -> None:
        stands_in(f"apex.normalization.{type(self).__name__}", _INSTEAD)
        super().__init__(normalized_shape, eps, elementwise_affine)


class MixedFusedLayerNorm(FusedLayerNorm):
    """With float32 weights on 16-bit rows, as in apex: the result has the weights' dtype."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalise rows."""
        return super().forward(input.to(self.weight.dtype))


class MixedFusedRMSNorm(FusedRMSNorm):
    """With float32 weights on 16-bit rows, as in apex: the result has the weights' dtype."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalise rows."""
        return super().forward(input.to(self.weight.dtype))
