# SPDX-License-Identifier: Apache-2.0
"""Operators that put the largest number in the place of an infinity: a loss scale never learns of the overflow."""

from __future__ import annotations

from torch import Tensor

from hal.moe.torch_training_ops import TorchTrainingOps
from hal_conformance.faults.catalogue import fault
from hal_conformance.faults.clamping import clamped, with_clamped_gradient


class Saturating(TorchTrainingOps):
    """The portable operators with infinities cut on one side."""

    families = ("norm", "rotary", "attention")
    back = False

    def given(self, x: Tensor) -> Tensor:
        """Return an argument whose gradient may be cut."""
        return with_clamped_gradient(x) if self.back else x

    def result(self, y: Tensor) -> Tensor:
        """Return a result, which may be cut."""
        return y if self.back else clamped(y)

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """See `TrainingOps.rms_norm`."""
        return self.result(super().rms_norm(self.given(x_TD), self.given(weight_D), eps))

    def rotary(self, x_THd: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
        """See `TrainingOps.rotary`."""
        return self.result(super().rotary(self.given(x_THd), cos_TR, sin_TR))

    def attention(self, q_THd: Tensor, k_SGd: Tensor, v_SGe: Tensor, scale: float, *, causal: bool) -> Tensor:
        """See `TrainingOps.attention`."""
        q, k, v = map(self.given, (q_THd, k_SGd, v_SGe))
        return self.result(super().attention(q, k, v, scale, causal=causal))


@fault()
class SaturatesResults(Saturating):
    """Results that overflow are the largest number."""


@fault()
class SaturatesGradients(Saturating):
    """Gradients that overflow are the largest number."""

    back = True
