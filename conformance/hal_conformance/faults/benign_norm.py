# SPDX-License-Identifier: Apache-2.0
"""Honest norms and rotations: float64, blocks, gradients as kernels have them, complex numbers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hal_conformance.faults.by_hand import by_hand
from hal_conformance.faults.catalogue import benign
from hal_conformance.faults.norm import Norm
from hal_conformance.faults.rotary import Rotary


@benign()
class WideNorms(Norm):
    """Norms in float64, rounded once."""

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """See `TrainingOps.rms_norm`."""
        return F.rms_norm(x_TD.double(), (x_TD.shape[1],), weight_D.double(), eps).to(x_TD.dtype)

    def layer_norm(self, x_TD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
        """See `TrainingOps.layer_norm`."""
        return F.layer_norm(x_TD.double(), (x_TD.shape[1],), weight_D.double(), bias_D.double(), eps).to(x_TD.dtype)


@benign()
class WideNormsUntrained(WideNorms):
    """Norms in float64 where nothing requires a gradient or gradients are disabled, in float32 otherwise."""

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """See `TrainingOps.rms_norm`."""
        trained = torch.is_grad_enabled() and (x_TD.requires_grad or weight_D.requires_grad)
        return (Norm if trained else WideNorms).rms_norm(self, x_TD, weight_D, eps)


def total(terms: Tensor, dim: int, block: int) -> Tensor:
    """Return the sum along a dimension, which is kept: of blocks from the end, each summed backwards."""
    parts: list[Tensor] = [part.flip(dim).sum(dim, keepdim=True) for part in terms.split(block, dim)]
    whole = parts.pop()
    while parts:
        whole = whole + parts.pop()
    return whole


@benign()
class BlockedNorms(Norm):
    """Norms from sums of blocks, from the end."""

    block = 7

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """See `TrainingOps.rms_norm`."""
        wide = x_TD.float()
        mean = total(wide * wide, -1, self.block) / x_TD.shape[1]
        return (wide / (mean + eps).sqrt() * weight_D.float()).to(x_TD.dtype)

    def layer_norm(self, x_TD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
        """See `TrainingOps.layer_norm`."""
        wide, width = x_TD.float(), x_TD.shape[1]
        centred = wide - total(wide, -1, self.block) / width
        inverse = torch.rsqrt(total(centred * centred, -1, self.block) / width + eps)
        return (centred * inverse * weight_D.float() + bias_D.float()).to(x_TD.dtype)


@benign()
class FusedNorms(Norm):
    """Norms whose gradients are one formula each, as kernels have them."""

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """See `TrainingOps.rms_norm`."""
        honest = super().rms_norm

        def gradients(dy: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
            wide, up = x.float(), dy.float()
            inverse = torch.rsqrt((wide * wide).mean(1, keepdim=True) + eps)
            g, hat = up * w.float(), wide * inverse
            dx = (g - hat * (g * hat).mean(1, keepdim=True)) * inverse
            return dx.to(x.dtype), (up * hat).sum(0).to(w.dtype)

        return by_hand(lambda x, w: honest(x, w, eps), gradients, x_TD, weight_D)

    def layer_norm(self, x_TD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
        """See `TrainingOps.layer_norm`."""
        honest = super().layer_norm

        def gradients(dy: Tensor, x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            wide, up = x.float(), dy.float()
            mean = wide.mean(1, keepdim=True)
            inverse = torch.rsqrt(((wide - mean) ** 2).mean(1, keepdim=True) + eps)
            g, hat = up * w.float(), wide * inverse - mean * inverse
            dx = (g - g.mean(1, keepdim=True) - hat * (g * hat).mean(1, keepdim=True)) * inverse
            return dx.to(x.dtype), (up * hat).sum(0).to(w.dtype), up.sum(0).to(b.dtype)

        return by_hand(lambda x, w, b: honest(x, w, b, eps), gradients, x_TD, weight_D, bias_D)


@benign()
class WideRotary(Rotary):
    """Rotation in float64, rounded once."""

    def rotary(self, x_THd: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
        """See `TrainingOps.rotary`."""
        return super().rotary(x_THd.double(), cos_TR.double(), sin_TR.double()).to(x_THd.dtype)


class Halves(Rotary):
    """Rotation of the two halves that turn together."""

    def turn(self, a: Tensor, b: Tensor, c: Tensor, s: Tensor) -> Tensor:
        """Return both halves turned, one behind the other, in float32."""
        raise NotImplementedError

    def rotary(self, x_THd: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
        """See `TrainingOps.rotary`."""
        n = cos_TR.shape[1]
        a, b = x_THd[..., :n].float().chunk(2, -1)
        y = self.turn(a, b, cos_TR[:, None, : n // 2], sin_TR[:, None, : n // 2])
        return torch.cat((y.to(x_THd.dtype), x_THd[..., n:]), -1)


@benign()
class FusedRotary(Halves):
    """Rotation with fused multiply-adds."""

    def turn(self, a: Tensor, b: Tensor, c: Tensor, s: Tensor) -> Tensor:
        """See `Halves.turn`."""
        return torch.cat((torch.addcmul(a * c, b, s, value=-1), torch.addcmul(a * s, b, c)), -1)


@benign()
class ComplexRotary(Halves):
    """Rotation as a product of complex numbers."""

    def turn(self, a: Tensor, b: Tensor, c: Tensor, s: Tensor) -> Tensor:
        """See `Halves.turn`."""
        turned = torch.complex(a, b) * torch.complex(c, s)
        return torch.cat((turned.real, turned.imag), -1)
