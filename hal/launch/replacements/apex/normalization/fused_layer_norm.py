# SPDX-License-Identifier: Apache-2.0
"""Norms."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

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


class FusedLayerNormAffineFunction:
    """apex's function under the name by which libraries call it; torch differentiates it."""

    @staticmethod
    def forward(
        ctx: Any, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, normalized_shape: Any, eps: float,
        memory_efficient: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        """Normalise rows, in the dtype of the input."""
        stands_in("apex.normalization.fused_layer_norm.FusedLayerNormAffineFunction", _INSTEAD)
        weight, bias = weight.to(input.dtype), bias.to(input.dtype)
        return F.layer_norm(input, _shape(normalized_shape), weight, bias, eps)

    @classmethod
    def apply(cls, *args: Any) -> torch.Tensor:
        """Call `forward`."""
        return cls.forward(None, *args)


class FusedRMSNormAffineFunction:
    """As `FusedLayerNormAffineFunction`, by the root of the mean square."""

    @staticmethod
    def forward(
        ctx: Any, input: torch.Tensor, weight: torch.Tensor, normalized_shape: Any, eps: float,
        memory_efficient: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        """Normalise rows, in the dtype of the input."""
        stands_in("apex.normalization.fused_layer_norm.FusedRMSNormAffineFunction", _INSTEAD)
        return F.rms_norm(input, _shape(normalized_shape), weight.to(input.dtype), eps)

    @classmethod
    def apply(cls, *args: Any) -> torch.Tensor:
        """Call `forward`."""
        return cls.forward(None, *args)


def fused_layer_norm_affine(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, normalized_shape: Any, eps: float = 1e-6,
    memory_efficient: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Return rows normalised, scaled and shifted."""
    return FusedLayerNormAffineFunction.apply(input, weight, bias, normalized_shape, eps, memory_efficient)


def fused_rms_norm_affine(
    input: torch.Tensor, weight: torch.Tensor, normalized_shape: Any, eps: float = 1e-6, memory_efficient: bool = False
) -> torch.Tensor:
    """Return rows normalised and scaled."""
    return FusedRMSNormAffineFunction.apply(input, weight, normalized_shape, eps, memory_efficient)


def fused_layer_norm(
    input: torch.Tensor, normalized_shape: Any, eps: float = 1e-6, memory_efficient: bool = False
) -> torch.Tensor:
    """Return rows normalised."""
    stands_in("apex.normalization.fused_layer_norm.fused_layer_norm", _INSTEAD)
    return F.layer_norm(input, _shape(normalized_shape), eps=eps)


def fused_rms_norm(
    input: torch.Tensor, normalized_shape: Any, eps: float = 1e-6, memory_efficient: bool = False
) -> torch.Tensor:
    """Return rows normalised by the root of the mean square."""
    stands_in("apex.normalization.fused_layer_norm.fused_rms_norm", _INSTEAD)
    return F.rms_norm(input, _shape(normalized_shape), eps=eps)


def mixed_dtype_fused_layer_norm_affine(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, normalized_shape: Any, eps: float = 1e-6,
    memory_efficient: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Return rows normalised, scaled and shifted, in the dtype of the weight."""
    return fused_layer_norm_affine(input.to(weight.dtype), weight, bias, normalized_shape, eps, memory_efficient)


def mixed_dtype_fused_rms_norm_affine(
    input: torch.Tensor, weight: torch.Tensor, normalized_shape: Any, eps: float = 1e-6, memory_efficient: bool = False
) -> torch.Tensor:
    """Return rows normalised and scaled, in the dtype of the weight."""
    return fused_rms_norm_affine(input.to(weight.dtype), weight, normalized_shape, eps, memory_efficient)


def _shape(normalized_shape: Any) -> tuple[int, ...]:
    return (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
