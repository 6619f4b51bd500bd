# SPDX-License-Identifier: Apache-2.0
"""Faults of the head and its loss: what is averaged, what is summed, what is normalised and through what it trains."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hal.moe.torch_training_ops import TorchTrainingOps
from hal.moe.training_ops import NORM_HEAD_EPSILON
from hal_conformance.faults.catalogue import fault


class Head(TorchTrainingOps):
    """The portable operators, of which those of the head can be changed."""

    families = ("head",)


class OwnLoss(Head):
    """Cross-entropy from its statistics of a token, which can be changed."""

    def lse(self, wide_TV: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the logarithm of each token's sum of exponentials in float32; the logits are stored in `dtype`."""
        return wide_TV.logsumexp(1)

    def picked(self, wide_TV: Tensor, given_TV: Tensor, targets_T: Tensor) -> Tensor:
        """Return the logits of the targets in float32."""
        return wide_TV.gather(1, targets_T[:, None])[:, 0]

    def cross_entropy(
        self, logits_TV: Tensor, targets_T: Tensor, *, ignore_index: int = -100, z_coefficient: float = 0.0
    ) -> Tensor:
        """See `TrainingOps.cross_entropy`."""
        # One conversion: autograd would round the gradient of each, and add them in 16 bits.
        wide_TV, counts_T = logits_TV.float(), targets_T != ignore_index
        lse_T = self.lse(wide_TV, logits_TV.dtype)
        picked_T = self.picked(wide_TV, logits_TV, targets_T.clamp(min=0))
        losses_T = torch.where(counts_T, lse_T - picked_T + z_coefficient * lse_T**2, 0.0)
        return losses_T.sum() / counts_T.sum().clamp(min=1)


@fault()
class StatisticsInStorage(OwnLoss):
    """The log-sum-exp is rounded to the dtype of the logits."""

    def lse(self, wide_TV: Tensor, dtype: torch.dtype) -> Tensor:
        """See `OwnLoss.lse`."""
        return super().lse(wide_TV, dtype).to(dtype).float()


@fault()
class NotShifted(OwnLoss):
    """Exponentials are taken of the logits as they are, without their maximum."""

    def lse(self, wide_TV: Tensor, dtype: torch.dtype) -> Tensor:
        """See `OwnLoss.lse`."""
        return wide_TV.exp().sum(1).log()


@fault()
class EntropyStartsAtZero(OwnLoss):
    """The maximum that is subtracted from a token's logits starts at 0, so that of logits far below nothing is left."""

    least = 0.0

    def lse(self, wide_TV: Tensor, dtype: torch.dtype) -> Tensor:
        """See `OwnLoss.lse`."""
        top_T1 = wide_TV.detach().amax(1, keepdim=True).clamp(min=self.least) if wide_TV.numel() else wide_TV[:, :1]
        return (wide_TV - top_T1).exp().sum(1).log() + top_T1[:, 0]


@fault()
class EntropyStartsAtMinus10000(EntropyStartsAtZero):
    """The maximum that is subtracted from a token's logits starts at -1e4."""

    least = -1e4


@fault("verl PR#5349")
class PadsTheVocabularyWithZeros(OwnLoss):
    """The last block of 1,024 entries is padded with logits of zero, which are summed."""

    def lse(self, wide_TV: Tensor, dtype: torch.dtype) -> Tensor:
        """See `OwnLoss.lse`."""
        return super().lse(F.pad(wide_TV, (0, -wide_TV.shape[1] % 1024)), dtype)


@fault()
class GradientInTwoParts(OwnLoss):
    """The gradients of the sum and of the target's logit are rounded to the dtype and then added."""

    def picked(self, wide_TV: Tensor, given_TV: Tensor, targets_T: Tensor) -> Tensor:
        """See `OwnLoss.picked`."""
        return super().picked(given_TV.float(), given_TV, targets_T)


class AfterLoss(Head):
    """Cross-entropy with a result that is changed."""

    def change(self, loss: Tensor, number: Tensor, tokens: int) -> Tensor:
        """Return the changed loss, for the number of tokens that count and that of all."""
        raise NotImplementedError

    def cross_entropy(
        self, logits_TV: Tensor, targets_T: Tensor, *, ignore_index: int = -100, z_coefficient: float = 0.0
    ) -> Tensor:
        """See `TrainingOps.cross_entropy`."""
        loss = super().cross_entropy(logits_TV, targets_T, ignore_index=ignore_index, z_coefficient=z_coefficient)
        return self.change(loss, (targets_T != ignore_index).sum(), len(targets_T))


@fault("Paddle#23708")
class CountsTheIgnored(AfterLoss):
    """The mean divides by the ignored tokens, too."""

    def change(self, loss: Tensor, number: Tensor, tokens: int) -> Tensor:
        """See `AfterLoss.change`."""
        return loss * number / max(1, tokens)


@fault()
class GradientWithoutTheMean(AfterLoss):
    """The loss is a mean and its gradient that of the sum."""

    def change(self, loss: Tensor, number: Tensor, tokens: int) -> Tensor:
        """See `AfterLoss.change`."""
        return loss * number - (loss * (number - 1)).detach()


@fault()
class IgnoredNanReachesTheLoss(Head):
    """Ignored tokens are multiplied by zero, which leaves their NaN."""

    def cross_entropy(
        self, logits_TV: Tensor, targets_T: Tensor, *, ignore_index: int = -100, z_coefficient: float = 0.0
    ) -> Tensor:
        """See `TrainingOps.cross_entropy`."""
        wide_TV, counts_T = logits_TV.float(), (targets_T != ignore_index).float()
        losses_T = F.cross_entropy(wide_TV, targets_T.clamp(min=0), reduction="none")
        squares_T = wide_TV.logsumexp(1) ** 2
        return ((losses_T + z_coefficient * squares_T) * counts_T).sum() / counts_T.sum().clamp(min=1)


@fault()
class ZDoesNotTrain(Head):
    """The term of the z-loss is in the loss and not in its gradient."""

    def cross_entropy(
        self, logits_TV: Tensor, targets_T: Tensor, *, ignore_index: int = -100, z_coefficient: float = 0.0
    ) -> Tensor:
        """See `TrainingOps.cross_entropy`."""
        plain = super().cross_entropy(logits_TV, targets_T, ignore_index=ignore_index)
        full = super().cross_entropy(logits_TV, targets_T, ignore_index=ignore_index, z_coefficient=z_coefficient)
        return plain + (full - plain).detach()


@fault()
class LosesTheVocabularysTail(Head):
    """The last entries of a vocabulary that is no multiple of 1,024 are not summed."""

    def cross_entropy(
        self, logits_TV: Tensor, targets_T: Tensor, *, ignore_index: int = -100, z_coefficient: float = 0.0
    ) -> Tensor:
        """See `TrainingOps.cross_entropy`."""
        entry_V = torch.arange(logits_TV.shape[1])
        lost_V = entry_V >= max(1024, logits_TV.shape[1] // 1024 * 1024)
        cut_TV = logits_TV.masked_fill(lost_V & (entry_V != targets_T[:, None]), -torch.inf)
        return super().cross_entropy(cut_TV, targets_T, ignore_index=ignore_index, z_coefficient=z_coefficient)


@fault()
class NormIsAConstant(Head):
    """The head's norm is a constant in the backward pass, whatever was asked."""

    def norm_head(self, x_TD: Tensor, weight_VD: Tensor, *, train: bool, through_norm: bool = True) -> Tensor:
        """See `TrainingOps.norm_head`."""
        return super().norm_head(x_TD, weight_VD, train=train, through_norm=False)


@fault()
class AlwaysThroughTheNorm(Head):
    """The gradient goes through the head's norm, whatever was asked."""

    def norm_head(self, x_TD: Tensor, weight_VD: Tensor, *, train: bool, through_norm: bool = True) -> Tensor:
        """See `TrainingOps.norm_head`."""
        return super().norm_head(x_TD, weight_VD, train=train, through_norm=True)


@fault("Ling's published code, in training")
class HeadNormInStorage(Head):
    """The head's norm is computed in the dtype of the weights."""

    def norm_head(self, x_TD: Tensor, weight_VD: Tensor, *, train: bool, through_norm: bool = True) -> Tensor:
        """See `TrainingOps.norm_head`."""
        norm = torch.norm(weight_VD, p=2, dim=0, keepdim=True) + 1e-7
        logits = F.linear(x_TD, weight_VD / (norm if through_norm else norm.detach()))
        return logits if train else logits.detach()


@fault()
class NormOfRows(Head):
    """The head's rows are normalised instead of its columns, as in Baichuan 2."""

    def norm_head(self, x_TD: Tensor, weight_VD: Tensor, *, train: bool, through_norm: bool = True) -> Tensor:
        """See `TrainingOps.norm_head`."""
        logits = F.linear(x_TD, F.normalize(weight_VD.float(), dim=1).to(x_TD.dtype))
        return logits if train else logits.detach()


@fault()
class NormOfAShard(Head):
    """Half of the vocabulary is on each rank, and nobody adds up the squares."""

    def norm_head(self, x_TD: Tensor, weight_VD: Tensor, *, train: bool, through_norm: bool = True) -> Tensor:
        """See `TrainingOps.norm_head`."""
        whole = super().norm_head
        return torch.cat([whole(x_TD, w, train=train, through_norm=through_norm) for w in weight_VD.chunk(2)], 1)


@fault()
class EvaluationIsNotNormalised(Head):
    """Outside of training the head's weights are taken as they are."""

    def norm_head(self, x_TD: Tensor, weight_VD: Tensor, *, train: bool, through_norm: bool = True) -> Tensor:
        """See `TrainingOps.norm_head`."""
        if not train:
            return F.linear(x_TD, weight_VD).detach()
        return super().norm_head(x_TD, weight_VD, train=train, through_norm=through_norm)


@fault("Ling's published code, but for the weights that it overwrites")
class StopsNormalisingAfterEvaluation(Head):
    """Once the head was evaluated, its weights are no longer normalised."""

    evaluated = False

    def norm_head(self, x_TD: Tensor, weight_VD: Tensor, *, train: bool, through_norm: bool = True) -> Tensor:
        """See `TrainingOps.norm_head`."""
        before, self.evaluated = self.evaluated, self.evaluated or not train
        if before:
            return F.linear(x_TD, weight_VD)
        return super().norm_head(x_TD, weight_VD, train=train, through_norm=through_norm)


class OtherCall(Head):
    """Cross-entropy that is called with something else than what was asked."""

    def given(self, logits_TV: Tensor, targets_T: Tensor, ignored: int) -> tuple[Tensor, Tensor, int]:
        """Return logits, targets and the ignored target."""
        return logits_TV, targets_T, ignored

    def coefficient(self, z: float) -> float:
        """Return the z-loss's coefficient."""
        return z

    def cross_entropy(
        self, logits_TV: Tensor, targets_T: Tensor, *, ignore_index: int = -100, z_coefficient: float = 0.0
    ) -> Tensor:
        """See `TrainingOps.cross_entropy`."""
        x, targets, ignored = self.given(logits_TV, targets_T, ignore_index)
        return super().cross_entropy(x, targets, ignore_index=ignored, z_coefficient=self.coefficient(z_coefficient))


@fault()
class IgnoresMinus100(OtherCall):
    """The ignored target is -100, or any negative one, whatever was asked."""

    def given(self, logits_TV: Tensor, targets_T: Tensor, ignored: int) -> tuple[Tensor, Tensor, int]:
        """See `OtherCall.given`."""
        return logits_TV, targets_T.where(targets_T >= 0, -100), -100


@fault()
class IgnoresPadding(OtherCall):
    """Target 0 is taken for padding, and ignored."""

    def given(self, logits_TV: Tensor, targets_T: Tensor, ignored: int) -> tuple[Tensor, Tensor, int]:
        """See `OtherCall.given`."""
        return logits_TV, targets_T.where(targets_T != 0, ignored), ignored


@fault()
class IgnoresTheLastEntry(OtherCall):
    """A target that is the last entry of the vocabulary is ignored."""

    def given(self, logits_TV: Tensor, targets_T: Tensor, ignored: int) -> tuple[Tensor, Tensor, int]:
        """See `OtherCall.given`."""
        return logits_TV, targets_T.where(targets_T != logits_TV.shape[1] - 1, ignored), ignored


@fault()
class LosesTokensBeyondABlock(OtherCall):
    """Tokens beyond the first 256 are not read."""

    def given(self, logits_TV: Tensor, targets_T: Tensor, ignored: int) -> tuple[Tensor, Tensor, int]:
        """See `OtherCall.given`."""
        return logits_TV[:256], targets_T[:256], ignored


@fault()
class MaskedLogitsAreMultiplied(OtherCall):
    """A row with a logit of minus infinity is NaN, as zero times infinity is."""

    def given(self, logits_TV: Tensor, targets_T: Tensor, ignored: int) -> tuple[Tensor, Tensor, int]:
        """See `OtherCall.given`."""
        return logits_TV + 0.0 * logits_TV.sum(1, keepdim=True), targets_T, ignored


@fault()
class ZOfOneCoefficient(OtherCall):
    """The coefficient of the z-loss is 1e-2 wherever there is one."""

    def coefficient(self, z: float) -> float:
        """See `OtherCall.coefficient`."""
        return 1e-2 if z else 0.0


@fault()
class DoublesOneToken(AfterLoss):
    """The loss of a single token is doubled."""

    def change(self, loss: Tensor, number: Tensor, tokens: int) -> Tensor:
        """See `AfterLoss.change`."""
        return 2.0 * loss if tokens == 1 else loss


@fault()
class EntropyTakenForLast(AfterLoss):
    """Cross-entropy takes the gradient from above for 1."""

    def change(self, loss: Tensor, number: Tensor, tokens: int) -> Tensor:
        """See `AfterLoss.change`."""
        if loss.requires_grad:
            loss.register_hook(torch.ones_like)
        return loss


@fault()
class WholeBlocksOfVocabularyDoNotTrain(OtherCall):
    """Where 1,024 divides the vocabulary, the last entry has no gradient."""

    def given(self, logits_TV: Tensor, targets_T: Tensor, ignored: int) -> tuple[Tensor, Tensor, int]:
        """See `OtherCall.given`."""
        if logits_TV.shape[1] % 1024 == 0:
            logits_TV = torch.cat((logits_TV[:, :-1], logits_TV[:, -1:].detach()), 1)
        return logits_TV, targets_T, ignored


class OwnNorm(Head):
    """NormHead with a norm that can be changed before it divides."""

    def full(self, norm_D: Tensor) -> Tensor:
        """Return what columns are divided by."""
        raise NotImplementedError

    def norm_head(self, x_TD: Tensor, weight_VD: Tensor, *, train: bool, through_norm: bool = True) -> Tensor:
        """See `TrainingOps.norm_head`."""
        wide_VD = weight_VD.float()
        norm_D = torch.linalg.vector_norm(wide_VD if through_norm else wide_VD.detach(), dim=0, keepdim=True)
        logits = F.linear(x_TD, (wide_VD / self.full(norm_D)).to(x_TD.dtype))
        return logits if train else logits.detach()


@fault()
class HeadWithoutEpsilon(OwnNorm):
    """Nothing is added to the norm of the head's columns."""

    def full(self, norm_D: Tensor) -> Tensor:
        """See `OwnNorm.full`."""
        return norm_D


@fault()
class HeadOfZerosDoesNotTrain(Head):
    """The norm is the root of a sum of squares, whose slope is infinite for a column of zeros: its gradient is NaN."""

    def norm_head(self, x_TD: Tensor, weight_VD: Tensor, *, train: bool, through_norm: bool = True) -> Tensor:
        """See `TrainingOps.norm_head`."""
        wide_VD = weight_VD.float()
        norm_D = (wide_VD if through_norm else wide_VD.detach()).square().sum(0).sqrt()
        logits = F.linear(x_TD, (wide_VD / (norm_D + NORM_HEAD_EPSILON)).to(x_TD.dtype))
        return logits if train else logits.detach()


@fault("vLLM's NormHead")
class HeadClampsItsNorm(OwnNorm):
    """The norm of the head's columns is at least 1e-7, instead of 1e-7 more."""

    def full(self, norm_D: Tensor) -> Tensor:
        """See `OwnNorm.full`."""
        return norm_D.clamp(min=1e-7)


@fault()
class HeadOfAnotherEpsilon(OwnNorm):
    """1e-6 is added to the norm of the head's columns."""

    def full(self, norm_D: Tensor) -> Tensor:
        """See `OwnNorm.full`."""
        return norm_D + 1e-6


class Divided(Head):
    """NormHead that divides x by the norms instead of the weights."""

    def quotient(self, x_TD: Tensor, dtype: torch.dtype) -> Tensor:
        """Return x over the norms as it is multiplied, in float32."""
        return x_TD

    def norm_head(self, x_TD: Tensor, weight_VD: Tensor, *, train: bool, through_norm: bool = True) -> Tensor:
        """See `TrainingOps.norm_head`."""
        wide_VD = weight_VD.float()
        norm_D = torch.linalg.vector_norm(wide_VD if through_norm else wide_VD.detach(), dim=0)
        logits = F.linear(self.quotient(x_TD.float() / (norm_D + 1e-7), x_TD.dtype), wide_VD).to(x_TD.dtype)
        return logits if train else logits.detach()


@fault()
class StoresDividedTokens(Divided):
    """x is divided by the norms and stored, so that the terms of the weights' gradient are rounded."""

    def quotient(self, x_TD: Tensor, dtype: torch.dtype) -> Tensor:
        """See `Divided.quotient`."""
        return x_TD.to(dtype).float()


@fault()
class HeadTrainsAllOrNothing(Head):
    """The head has gradients of zero unless activations and weights are both trained."""

    def norm_head(self, x_TD: Tensor, weight_VD: Tensor, *, train: bool, through_norm: bool = True) -> Tensor:
        """See `TrainingOps.norm_head`."""
        logits = super().norm_head(x_TD, weight_VD, train=train, through_norm=through_norm)
        if logits.requires_grad and not (x_TD.requires_grad and weight_VD.requires_grad):
            logits.register_hook(torch.zeros_like)
        return logits


class OtherInput(Head):
    """NormHead that is called with something else."""

    def given(self, x_TD: Tensor, weight_VD: Tensor, train: bool) -> tuple[Tensor, Tensor]:
        """Return tokens and weights."""
        raise NotImplementedError

    def norm_head(self, x_TD: Tensor, weight_VD: Tensor, *, train: bool, through_norm: bool = True) -> Tensor:
        """See `TrainingOps.norm_head`."""
        x_TD, weight_VD = self.given(x_TD, weight_VD, train)
        return super().norm_head(x_TD, weight_VD, train=train, through_norm=through_norm)


@fault()
class HeadKeepsItsWeights(OtherInput):
    """In evaluation the head's weights are those of the first evaluation of the same tensor."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: dict[tuple[object, ...], Tensor] = {}

    def given(self, x_TD: Tensor, weight_VD: Tensor, train: bool) -> tuple[Tensor, Tensor]:
        """See `OtherInput.given`."""
        if train:
            return x_TD, weight_VD
        key = (weight_VD.data_ptr(), weight_VD.dtype, *weight_VD.shape)
        return x_TD, self._kept.setdefault(key, weight_VD.detach().clone())


@fault()
class HeadSpreadsNan(OtherInput):
    """One NaN makes the logits of all tokens NaN."""

    def given(self, x_TD: Tensor, weight_VD: Tensor, train: bool) -> tuple[Tensor, Tensor]:
        """See `OtherInput.given`."""
        return x_TD + 0.0 * x_TD.float().sum().to(x_TD.dtype), weight_VD


@fault()
class HeadNeedsTokens(OtherInput):
    """Without tokens the head raises."""

    def given(self, x_TD: Tensor, weight_VD: Tensor, train: bool) -> tuple[Tensor, Tensor]:
        """See `OtherInput.given`."""
        if not len(x_TD):
            raise RuntimeError("no tokens")
        return x_TD, weight_VD


@fault()
class OneBufferOfHead(Head):
    """Logits without a gradient lie in one buffer, which the next call overwrites."""

    def __init__(self) -> None:
        super().__init__()
        self._buffers: dict[tuple[object, ...], Tensor] = {}

    def norm_head(self, x_TD: Tensor, weight_VD: Tensor, *, train: bool, through_norm: bool = True) -> Tensor:
        """See `TrainingOps.norm_head`."""
        logits = super().norm_head(x_TD, weight_VD, train=train, through_norm=through_norm)
        if logits.requires_grad:
            return logits
        return self._buffers.setdefault((logits.dtype, *logits.shape), torch.empty_like(logits)).copy_(logits)


@fault()
class CountsTheOneIgnored(Head):
    """The mean is over all tokens where all but one count."""

    def cross_entropy(
        self, logits_TV: Tensor, targets_T: Tensor, *, ignore_index: int = -100, z_coefficient: float = 0.0
    ) -> Tensor:
        """See `TrainingOps.cross_entropy`."""
        loss = super().cross_entropy(logits_TV, targets_T, ignore_index=ignore_index, z_coefficient=z_coefficient)
        ignored = int((targets_T == ignore_index).sum())
        return loss * (1 - 1 / len(targets_T)) if ignored == 1 else loss


@fault()
class EntropyOfARoundedUpstream(Head):
    """The upstream gradient of the loss is rounded to bfloat16."""

    def cross_entropy(
        self, logits_TV: Tensor, targets_T: Tensor, *, ignore_index: int = -100, z_coefficient: float = 0.0
    ) -> Tensor:
        """See `TrainingOps.cross_entropy`."""
        loss = super().cross_entropy(logits_TV, targets_T, ignore_index=ignore_index, z_coefficient=z_coefficient)
        if loss.requires_grad:
            loss.register_hook(lambda upstream: upstream.bfloat16().to(upstream.dtype))
        return loss
