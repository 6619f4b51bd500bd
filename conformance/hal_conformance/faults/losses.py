# SPDX-License-Identifier: Apache-2.0
"""Faults of the balance loss and the z-loss."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from hal.moe.router_spec import RouterSpec
from hal_conformance.faults.by_hand import by_hand
from hal_conformance.faults.catalogue import fault
from hal_conformance.faults.parts import Alone, Parts, gradient_of


@fault()
class AuxWithoutK(Parts):
    """The balance loss is not divided by K."""

    def aux_loss(self, scores_TE: Tensor, experts_TK: Tensor, spec: RouterSpec) -> Tensor:
        """See `MoEOps.aux_loss`."""
        return super().aux_loss(scores_TE, experts_TK, spec) * spec.top_k


@fault("Megatron-LM PR#5047")
class AuxByChunks(Parts):
    """The balance loss is the mean over chunks of 64 tokens, the last one shorter."""

    def aux_loss(self, scores_TE: Tensor, experts_TK: Tensor, spec: RouterSpec) -> Tensor:
        """See `MoEOps.aux_loss`."""
        chunks = zip(scores_TE.split(64), experts_TK.split(64), strict=True)
        return torch.stack([self.honest.aux_loss(s, e, spec) for s, e in chunks]).mean()


@fault()
class AuxOfRawSigmoids(Parts):
    """The balance loss takes sigmoid scores that are not normalised."""

    def aux_loss(self, scores_TE: Tensor, experts_TK: Tensor, spec: RouterSpec) -> Tensor:
        """See `MoEOps.aux_loss`."""
        return super().aux_loss(scores_TE, experts_TK, replace(spec, score="softmax"))


@fault("Megatron-LM PR#5798")
class AuxGradientOff(Parts):
    """The gradient of the balance loss is 0.1 % too small."""

    def aux_loss(self, scores_TE: Tensor, experts_TK: Tensor, spec: RouterSpec) -> Tensor:
        """See `MoEOps.aux_loss`."""
        loss = super().aux_loss(scores_TE, experts_TK, spec)
        return gradient_of(loss, 0.999 * loss)


@fault("transformers PR#43583")
class AuxCountsTwice(Parts):
    """The balance loss counts the first choice twice."""

    def aux_loss(self, scores_TE: Tensor, experts_TK: Tensor, spec: RouterSpec) -> Tensor:
        """See `MoEOps.aux_loss`."""
        twice = torch.cat([experts_TK[:, :1], experts_TK[:, :-1]], 1)
        return super().aux_loss(scores_TE, twice if spec.top_k > 1 else experts_TK, spec)


@fault()
class AuxWithoutEpsilon(Parts):
    """Sigmoid scores are divided by their sum alone, though all may be zero."""

    def aux_loss(self, scores_TE: Tensor, experts_TK: Tensor, spec: RouterSpec) -> Tensor:
        """See `MoEOps.aux_loss`."""
        if spec.score != "sigmoid":
            return super().aux_loss(scores_TE, experts_TK, spec)
        normal_TE = scores_TE / scores_TE.sum(-1, keepdim=True)
        return super().aux_loss(normal_TE, experts_TK, replace(spec, score="softmax"))


@fault()
class AuxOfLowCounts(Parts):
    """The rows of each expert are counted in bfloat16."""

    def aux_loss(self, scores_TE: Tensor, experts_TK: Tensor, spec: RouterSpec) -> Tensor:
        """See `MoEOps.aux_loss`."""
        if not len(scores_TE):
            return super().aux_loss(scores_TE, experts_TK, spec)
        p_TE = scores_TE / (scores_TE.sum(-1, keepdim=True) + 1e-20) if spec.score == "sigmoid" else scores_TE
        counts_E = torch.bincount(experts_TK.reshape(-1), minlength=spec.num_experts).bfloat16().float()
        return (counts_E * p_TE.mean(0)).sum() * (spec.num_experts / (spec.top_k * len(scores_TE)))


@fault()
class LossesOfNothing(Alone):
    """Losses of zero tokens are 0 / 0."""

    def aux_loss(self, scores_TE: Tensor, experts_TK: Tensor, spec: RouterSpec) -> Tensor:
        """See `MoEOps.aux_loss`."""
        return super().aux_loss(scores_TE, experts_TK, spec) if len(scores_TE) else scores_TE.sum() * torch.nan

    def z_loss(self, logits_TE: Tensor) -> Tensor:
        """See `MoEOps.z_loss`."""
        return logits_TE.float().logsumexp(-1).square().mean()


@fault()
class LossesTakenForLast(Alone):
    """The losses' own backward pass takes the gradient from above for 1."""

    def aux_loss(self, scores_TE: Tensor, experts_TK: Tensor, spec: RouterSpec) -> Tensor:
        """See `MoEOps.aux_loss`."""
        return self.last(super().aux_loss(scores_TE, experts_TK, spec))

    def z_loss(self, logits_TE: Tensor) -> Tensor:
        """See `MoEOps.z_loss`."""
        return self.last(super().z_loss(logits_TE))

    def last(self, loss: Tensor) -> Tensor:
        """Return the loss, whose gradient is 1."""
        if loss.requires_grad:
            loss.register_hook(torch.ones_like)
        return loss


@fault()
class ZOfPlainExponentials(Parts):
    """The z-loss does not subtract the maximum."""

    def z_loss(self, logits_TE: Tensor) -> Tensor:
        """See `MoEOps.z_loss`."""
        return logits_TE.float().exp().sum(-1).log().square().mean()


@fault()
class ZGradientOfPlainExponentials(Parts):
    """The z-loss subtracts the maximum, but its gradient does not."""

    def z_loss(self, logits_TE: Tensor) -> Tensor:
        """See `MoEOps.z_loss`."""
        x = logits_TE.float()
        slope = 2.0 * x.logsumexp(-1, keepdim=True) * x.exp() / x.exp().sum(-1, keepdim=True) / max(1, len(x))
        return self.honest.z_loss(logits_TE.detach()) + ((x - x.detach()) * slope.detach()).sum()


@fault()
class LowZLoss(Parts):
    """The z-loss is computed in the logits' dtype."""

    def z_loss(self, logits_TE: Tensor) -> Tensor:
        """See `MoEOps.z_loss`."""
        return logits_TE.logsumexp(-1).square().mean().float()


@fault()
class ZOfMeans(Parts):
    """The z-loss squares the mean instead of averaging the squares."""

    def z_loss(self, logits_TE: Tensor) -> Tensor:
        """See `MoEOps.z_loss`."""
        return logits_TE.float().logsumexp(-1).mean().square()


@fault()
class HalfZGradient(Parts):
    """The gradient of the z-loss lacks the factor of two."""

    def z_loss(self, logits_TE: Tensor) -> Tensor:
        """See `MoEOps.z_loss`."""
        loss = super().z_loss(logits_TE)
        return gradient_of(loss, 0.5 * loss)


@fault()
class CountsOfAnotherPart(Alone):
    """The rows of each expert are counted once for each number of tokens, and kept."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[tuple[int, RouterSpec], Tensor] = {}

    def aux_loss(self, scores_TE: Tensor, experts_TK: Tensor, spec: RouterSpec) -> Tensor:
        """See `MoEOps.aux_loss`."""
        first = self.kept.setdefault((len(scores_TE), spec), experts_TK.clone())
        return super().aux_loss(scores_TE, first, spec)


@fault()
class NoBalanceOfOneToken(Alone):
    """The balance loss of a single token is 0."""

    def aux_loss(self, scores_TE: Tensor, experts_TK: Tensor, spec: RouterSpec) -> Tensor:
        """See `MoEOps.aux_loss`."""
        loss = super().aux_loss(scores_TE, experts_TK, spec)
        return loss * 0.0 if len(scores_TE) == 1 else loss


@fault()
class ZOverTheFirstBatch(Alone):
    """The z-loss divides by the tokens of the first batch that it was given, whatever the size of this one."""

    first = 0

    def z_loss(self, logits_TE: Tensor) -> Tensor:
        """See `MoEOps.z_loss`."""
        self.first = self.first or len(logits_TE)
        return super().z_loss(logits_TE) * (len(logits_TE) / max(1, self.first))


@fault()
class ZOfMaskedLogits(Alone):
    """The z-loss multiplies what is masked by zero, which makes NaN of minus infinity."""

    def z_loss(self, logits_TE: Tensor) -> Tensor:
        """See `MoEOps.z_loss`."""
        return super().z_loss(logits_TE) + 0.0 * logits_TE.float().sum()


@fault()
class PaddingLeftOutOfTheMean(Alone):
    """Tokens whose scores are all zero are taken for padding, and the balance loss divides by the others alone."""

    def aux_loss(self, scores_TE: Tensor, experts_TK: Tensor, spec: RouterSpec) -> Tensor:
        """See `MoEOps.aux_loss`."""
        real = int((scores_TE != 0).any(1).sum())
        return super().aux_loss(scores_TE, experts_TK, spec) * (len(scores_TE) / max(1, real))


@fault()
class BalancesStorage(Alone):
    """The balance loss reads the experts as if rows followed one another."""

    def aux_loss(self, scores_TE: Tensor, experts_TK: Tensor, spec: RouterSpec) -> Tensor:
        """See `MoEOps.aux_loss`."""
        return super().aux_loss(scores_TE, experts_TK.as_strided(experts_TK.shape, (experts_TK.shape[1], 1)), spec)


@fault()
class ZOfStorage(Alone):
    """The z-loss reads logits as if rows followed one another."""

    def z_loss(self, logits_TE: Tensor) -> Tensor:
        """See `MoEOps.z_loss`."""
        return super().z_loss(logits_TE.as_strided(logits_TE.shape, (logits_TE.shape[1], 1)))


@fault()
class ZWithoutNan(Alone):
    """The z-loss takes the logits of a token with a NaN for zeros."""

    def z_loss(self, logits_TE: Tensor) -> Tensor:
        """See `MoEOps.z_loss`."""
        return super().z_loss(torch.where(logits_TE.isnan().any(1, keepdim=True), 0.0, logits_TE))


@fault()
class BalancesWithoutNan(Alone):
    """The balance loss takes scores that are NaN for zeros."""

    def aux_loss(self, scores_TE: Tensor, experts_TK: Tensor, spec: RouterSpec) -> Tensor:
        """See `MoEOps.aux_loss`."""
        return super().aux_loss(torch.where(scores_TE.isnan(), 0.0, scores_TE), experts_TK, spec)


@fault()
class ZSpreadsNan(Alone):
    """The z-loss adds 0 times the sum of all gradients to each, so that one token's NaN is every token's."""

    def z_loss(self, logits_TE: Tensor) -> Tensor:
        """See `MoEOps.z_loss`."""
        return super().z_loss(by_hand(torch.clone, lambda d, _: d + 0.0 * d.sum(), logits_TE))


@fault()
class ZOfClampedLogits(Alone):
    """The z-loss clamps logits at 10,000, infinite ones, too."""

    def z_loss(self, logits_TE: Tensor) -> Tensor:
        """See `MoEOps.z_loss`."""
        return super().z_loss(logits_TE.clamp(max=1e4))


@fault()
class BalancesUpwards(Alone):
    """The balance loss takes a negative gradient from above for zero."""

    def aux_loss(self, scores_TE: Tensor, experts_TK: Tensor, spec: RouterSpec) -> Tensor:
        """See `MoEOps.aux_loss`."""
        return by_hand(torch.clone, lambda d, _: d.clamp(min=0), super().aux_loss(scores_TE, experts_TK, spec))


@fault()
class ZDividesByUpstream(Alone):
    """The z-loss divides by the gradient from above, which makes NaN of zero."""

    def z_loss(self, logits_TE: Tensor) -> Tensor:
        """See `MoEOps.z_loss`."""
        return by_hand(torch.clone, lambda d, _: d / d * d, super().z_loss(logits_TE))


class UpstreamChanged(Alone):
    """Losses whose upstream gradient is not taken as it is."""

    @staticmethod
    def change(upstream: Tensor) -> Tensor:
        """Return what is taken instead."""
        raise NotImplementedError

    def hooked(self, loss: Tensor) -> Tensor:
        """Return the loss, with that upstream."""
        if loss.requires_grad:
            loss.register_hook(self.change)
        return loss

    def aux_loss(self, scores_TE: Tensor, experts_TK: Tensor, spec: RouterSpec) -> Tensor:
        """See `MoEOps.aux_loss`."""
        return self.hooked(super().aux_loss(scores_TE, experts_TK, spec))

    def z_loss(self, logits_TE: Tensor) -> Tensor:
        """See `MoEOps.z_loss`."""
        return self.hooked(super().z_loss(logits_TE))


@fault()
class FlushesSmallCoefficients(UpstreamChanged):
    """An upstream gradient below float16's smallest normal number is 0: small coefficients train nothing."""

    @staticmethod
    def change(upstream: Tensor) -> Tensor:
        """See `UpstreamChanged.change`."""
        return torch.where(upstream.abs() < 2.0**-14, 0, upstream)


@fault()
class RoundsCoefficients(UpstreamChanged):
    """The upstream gradient of both losses is rounded to bfloat16."""

    @staticmethod
    def change(upstream: Tensor) -> Tensor:
        """See `UpstreamChanged.change`."""
        return upstream.bfloat16().to(upstream.dtype)
