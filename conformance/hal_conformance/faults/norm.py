# SPDX-License-Identifier: Apache-2.0
"""Faults of the norms: statistics in low precision, terms that a gradient lacks, rows that see each other."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hal.moe.torch_training_ops import TorchTrainingOps
from hal_conformance.faults.catalogue import fault
from hal_conformance.faults.parts import spread_backward


class Norm(TorchTrainingOps):
    """The portable operators, of which one of the norms can be changed."""

    families = ("norm",)


@fault()
class EpsOutsideTheRoot(Norm):
    """Epsilon is added to the root of the mean square instead of under it."""

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """See `TrainingOps.rms_norm`."""
        wide = x_TD.float()
        root = (wide * wide).mean(1, keepdim=True).clamp(min=1e-30).sqrt()
        return (wide / (root + eps) * weight_D.float()).to(x_TD.dtype)


@fault("TransformerEngine#1132")
class WeightAfterTheCast(Norm):
    """The normalised row is stored before it is multiplied by the weight, as in Llama's published code."""

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """See `TrainingOps.rms_norm`."""
        return F.rms_norm(x_TD.float(), (x_TD.shape[1],), None, eps).to(x_TD.dtype) * weight_D


@fault("pytorch#77507")
class SquaresInStorage(Norm):
    """The squares are rounded to the dtype before they are added in float32."""

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """See `TrainingOps.rms_norm`."""
        mean = (x_TD * x_TD).float().mean(1, keepdim=True)
        return (x_TD.float() * torch.rsqrt(mean + eps) * weight_D.float()).to(x_TD.dtype)


@fault()
class NoMeanTermInDx(Norm):
    """The RMS is taken for a constant in the backward pass."""

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """See `TrainingOps.rms_norm`."""
        wide = x_TD.float()
        inverse = torch.rsqrt((wide * wide).mean(1, keepdim=True) + eps).detach()
        return (wide * inverse * weight_D.float()).to(x_TD.dtype)


@fault()
class NormSpreadsNan(Norm):
    """One NaN token makes the channel NaN in all tokens."""

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """See `TrainingOps.rms_norm`."""
        return super().rms_norm(x_TD, weight_D, eps) + 0.0 * x_TD.sum(0, keepdim=True)


@fault("pytorch PR#55044")
class OnePassVariance(Norm):
    """The variance is the mean square less the square of the mean."""

    def layer_norm(self, x_TD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
        """See `TrainingOps.layer_norm`."""
        wide = x_TD.float()
        mean = wide.mean(1, keepdim=True)
        var = (wide * wide).mean(1, keepdim=True) - mean * mean
        return ((wide - mean) * torch.rsqrt(var + eps) * weight_D.float() + bias_D.float()).to(x_TD.dtype)


@fault()
class UnbiasedVariance(Norm):
    """The variance is divided by one less than the width."""

    def layer_norm(self, x_TD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
        """See `TrainingOps.layer_norm`."""
        wide = x_TD.float()
        normal = (wide - wide.mean(1, keepdim=True)) * torch.rsqrt(wide.var(1, keepdim=True, correction=1) + eps)
        return (normal * weight_D.float() + bias_D.float()).to(x_TD.dtype)


@fault()
class MeanWithoutGradient(Norm):
    """LayerNorm's mean is taken for a constant in the backward pass."""

    def layer_norm(self, x_TD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
        """See `TrainingOps.layer_norm`."""
        wide = x_TD.float()
        centred = wide - wide.mean(1, keepdim=True).detach()
        normal = centred * torch.rsqrt((centred * centred).mean(1, keepdim=True) + eps)
        return (normal * weight_D.float() + bias_D.float()).to(x_TD.dtype)


@fault("llm.c PR#476")
class NormGradientsInStorage(Norm):
    """LayerNorm as torch 2.13 has it on the CPU, which adds up 16-bit gradients in 16 bits."""

    def layer_norm(self, x_TD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
        """See `TrainingOps.layer_norm`."""
        return F.layer_norm(x_TD, (x_TD.shape[1],), weight_D, bias_D, eps)


class OtherEpsilon(Norm):
    """Norms that are called with another epsilon."""

    def epsilon(self, eps: float) -> float:
        """Return the epsilon."""
        raise NotImplementedError

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """See `TrainingOps.rms_norm`."""
        return super().rms_norm(x_TD, weight_D, self.epsilon(eps))

    def layer_norm(self, x_TD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
        """See `TrainingOps.layer_norm`."""
        return super().layer_norm(x_TD, weight_D, bias_D, self.epsilon(eps))


@fault()
class NormOfOneEpsilon(OtherEpsilon):
    """Epsilon is 1e-5 wherever there is one."""

    def epsilon(self, eps: float) -> float:
        """See `OtherEpsilon.epsilon`."""
        return 1e-5 if eps else 0.0


@fault()
class NormLimitsEpsilon(OtherEpsilon):
    """Epsilon is at most 1e-5."""

    def epsilon(self, eps: float) -> float:
        """See `OtherEpsilon.epsilon`."""
        return min(eps, 1e-5)


@fault()
class NormTrainsAllOrNothing(Norm):
    """RMSNorm has gradients of zero unless activations and weight are both trained."""

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """See `TrainingOps.rms_norm`."""
        y_TD = super().rms_norm(x_TD, weight_D, eps)
        if y_TD.requires_grad and not (x_TD.requires_grad and weight_D.requires_grad):
            y_TD.register_hook(torch.zeros_like)
        return y_TD


@fault()
class NormSpreadsNanBackward(Norm):
    """One NaN among the activations makes all of their gradients NaN."""

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """See `TrainingOps.rms_norm`."""
        y_TD = super().rms_norm(x_TD, weight_D, eps)
        if x_TD.requires_grad:
            dirt = 0.0 * x_TD.detach().float().sum()
            x_TD.register_hook(lambda dx: dx + dirt.to(dx.dtype))
        return y_TD


@fault()
class NormSpreadsUpstreamNan(Norm):
    """Gradients of all tokens are multiplied by zeros and ones: a NaN in one of them reaches all."""

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """See `TrainingOps.rms_norm`."""
        return spread_backward(super().rms_norm(x_TD, weight_D, eps))


@fault()
class NormsNoWholeTiles(Norm):
    """Where 32 divides the number of tokens, the last token's result is zero."""

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """See `TrainingOps.rms_norm`."""
        y_TD = super().rms_norm(x_TD, weight_D, eps)
        return torch.cat((y_TD[:-1], 0.0 * y_TD[-1:])) if len(x_TD) and len(x_TD) % 32 == 0 else y_TD


@fault()
class NormsNoTokenBeyondABlock(Norm):
    """Results beyond the first 1,024 tokens are zero."""

    def layer_norm(self, x_TD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
        """See `TrainingOps.layer_norm`."""
        y_TD = super().layer_norm(x_TD, weight_D, bias_D, eps)
        return torch.cat((y_TD[:1024], 0.0 * y_TD[1024:]))


@fault()
class DoublesOneRow(Norm):
    """The result of a single token is doubled."""

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """See `TrainingOps.rms_norm`."""
        y_TD = super().rms_norm(x_TD, weight_D, eps)
        return 2.0 * y_TD if len(x_TD) == 1 else y_TD


@fault()
class MeanOfOneBlock(Norm):
    """The mean square is that of the first 256 channels."""

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """See `TrainingOps.rms_norm`."""
        wide = x_TD.float()
        inverse = torch.rsqrt((wide * wide)[:, :256].mean(1, keepdim=True) + eps)
        return (wide * inverse * weight_D.float()).to(x_TD.dtype)


@fault()
class InfiniteRowsAreFinite(Norm):
    """A token that holds an infinity is taken for one that holds the largest number."""

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """See `TrainingOps.rms_norm`."""
        infinite = x_TD.isinf()
        signs = torch.where(infinite, x_TD.sign(), 0.0 * x_TD.sign())
        return super().rms_norm(torch.where(infinite.any(1, keepdim=True), signs, x_TD), weight_D, eps)


@fault()
class InfinityReachesAllRows(Norm):
    """An infinity in one token makes the gradients of all of them NaN."""

    def layer_norm(self, x_TD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
        """See `TrainingOps.layer_norm`."""
        y_TD = super().layer_norm(x_TD, weight_D, bias_D, eps)
        if x_TD.requires_grad:
            dirt = 0.0 * x_TD.detach().float().sum()
            x_TD.register_hook(lambda dx: dx + dirt.to(dx.dtype))
        return y_TD


@fault()
class NormsNoLastOfATile(Norm):
    """The last row is a hundredth too large where the number of tokens is one less than a multiple of 32."""

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """See `TrainingOps.rms_norm`."""
        y_TD = super().rms_norm(x_TD, weight_D, eps)
        return torch.cat((y_TD[:-1], y_TD[-1:] * 1.01)) if len(y_TD) % 32 == 31 else y_TD
