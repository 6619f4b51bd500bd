# SPDX-License-Identifier: Apache-2.0
"""Faults of attention: who sees whom, what is kept in 16 bits, and which head a gradient belongs to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hal.moe.torch_training_ops import TorchTrainingOps
from hal_conformance.faults.catalogue import fault
from hal_conformance.faults.parts import gradient_of, in_order_of_memory


class Attention(TorchTrainingOps):
    """The portable operators, of which attention can be changed."""

    families = ("attention",)


def hidden_keys(queries: int, keys: int, causal: bool = True) -> Tensor:
    """Return which keys each query does not see, [T, S]; the queries are the last positions."""
    hidden = torch.ones(queries, keys, dtype=torch.bool)
    return hidden.triu(1 + keys - queries) if causal else ~hidden


class Composed(Attention):
    """Attention from its steps in float32, each of which can be changed.

    Legend: H query heads, T queries, S keys.
    """

    def attention(self, q_THd: Tensor, k_SGd: Tensor, v_SGe: Tensor, scale: float, *, causal: bool) -> Tensor:
        """See `TrainingOps.attention`."""
        head_H = self.heads(q_THd.shape[1], k_SGd.shape[1])
        logits = torch.einsum("thd,shd->hts", q_THd.float(), k_SGd.float()[:, head_H]) * scale
        logits = self.logits(logits, q_THd.dtype)
        if causal:
            hidden = torch.ones(logits.shape[1:], dtype=torch.bool, device=logits.device)
            logits = self.mask(logits, hidden.triu(self.first(len(q_THd), len(k_SGd))))
        p = self.softmax(logits, q_THd.dtype)
        return self.sum(p, v_SGe.float()[:, head_H], q_THd.dtype).to(q_THd.dtype)

    def heads(self, heads: int, groups: int) -> Tensor:
        """Return the key head of each query head."""
        return torch.arange(heads) // (heads // groups)

    def logits(self, logits_HTS: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the scaled products as the softmax gets them."""
        return logits_HTS

    def first(self, queries: int, keys: int) -> int:
        """Return the first key that query 0 does not see."""
        return 1 + keys - queries

    def mask(self, logits_HTS: Tensor, hidden_TS: Tensor) -> Tensor:
        """Return the logits without the hidden ones."""
        return logits_HTS.masked_fill(hidden_TS, -torch.inf)

    def softmax(self, logits_HTS: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the probabilities in float32."""
        return logits_HTS.softmax(-1)

    def sum(self, p_HTS: Tensor, v_SHe: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the sums of values, [T, H, e] in float32."""
        return torch.einsum("hts,she->the", p_HTS, v_SHe)


@fault("native-sparse-attention-triton#27")
class WrongKeyHead(Composed):
    """Query heads are dealt out to key heads in turn instead of in groups."""

    def heads(self, heads: int, groups: int) -> Tensor:
        """See `Composed.heads`."""
        return torch.arange(heads) % groups


@fault()
class SeesOneTooMany(Composed):
    """Each query sees the key after its own."""

    def first(self, queries: int, keys: int) -> int:
        """See `Composed.first`."""
        return 2 + keys - queries


@fault()
class DoesNotSeeItself(Composed):
    """A query does not see its own key, but for the first one."""

    def first(self, queries: int, keys: int) -> int:
        """See `Composed.first`."""
        return keys - queries

    def mask(self, logits_HTS: Tensor, hidden_TS: Tensor) -> Tensor:
        """See `Composed.mask`."""
        hidden_TS[0, 0] = False
        return super().mask(logits_HTS, hidden_TS)


@fault("flash-attention#517")
class MasksTopLeft(Composed):
    """With more keys than queries, the first query is put beside the first key."""

    def first(self, queries: int, keys: int) -> int:
        """See `Composed.first`."""
        return 1


@fault("pytorch#101967")
class AddsItsMask(Composed):
    """Minus infinity is added to hidden logits, so that a hidden NaN shows."""

    def mask(self, logits_HTS: Tensor, hidden_TS: Tensor) -> Tensor:
        """See `Composed.mask`."""
        return logits_HTS + torch.where(hidden_TS, -torch.inf, 0.0)


@fault()
class SoftmaxInStorage(Composed):
    """The softmax is computed in 16 bits where the dtype has 16."""

    def softmax(self, logits_HTS: Tensor, dtype: torch.dtype) -> Tensor:
        """See `Composed.softmax`."""
        return logits_HTS.to(dtype).softmax(-1).float()


@fault()
class NormaliserInStorage(Composed):
    """Only the sum under the softmax is added up in the dtype of storage."""

    def softmax(self, logits_HTS: Tensor, dtype: torch.dtype) -> Tensor:
        """See `Composed.softmax`."""
        powers = (logits_HTS - logits_HTS.max(-1, keepdim=True).values).exp()
        total = torch.zeros_like(powers[..., 0], dtype=dtype)
        for part in powers.unbind(-1):
            total = (total.float() + part).to(dtype)
        return powers / total.float()[..., None]


@fault()
class LogitsInStorage(Composed):
    """The logits are rounded to the dtype before the softmax."""

    def logits(self, logits_HTS: Tensor, dtype: torch.dtype) -> Tensor:
        """See `Composed.logits`."""
        return logits_HTS.to(dtype).float()


@fault()
class NormaliserRoundedOnce(Composed):
    """The sum under the softmax is rounded to the dtype of storage when it is complete."""

    def softmax(self, logits_HTS: Tensor, dtype: torch.dtype) -> Tensor:
        """See `Composed.softmax`."""
        powers = (logits_HTS - logits_HTS.detach().amax(-1, keepdim=True)).exp()
        total = powers.sum(-1, keepdim=True)
        return powers / (total + (total.to(dtype).float() - total).detach())


@fault()
class NothingIsRescaled(Composed):
    """In an online softmax over blocks of 128 keys, what was summed is kept when the maximum grows."""

    def softmax(self, logits_HTS: Tensor, dtype: torch.dtype) -> Tensor:
        """See `Composed.softmax`."""
        tops = [part.detach().amax(-1, keepdim=True) for part in logits_HTS.split(128, -1)]
        for i in range(1, len(tops)):
            tops[i] = torch.maximum(tops[i - 1], tops[i])
        powers = [(part - top).exp() for part, top in zip(logits_HTS.split(128, -1), tops, strict=True)]
        total = (logits_HTS - tops[-1]).exp().sum(-1, keepdim=True)
        p: Tensor = torch.cat(powers, -1) / total
        return p


@fault()
class StartsAtZero(Composed):
    """The maximum that is subtracted in the softmax starts at 0, so that of logits far below nothing is left."""

    least = 0.0

    def softmax(self, logits_HTS: Tensor, dtype: torch.dtype) -> Tensor:
        """See `Composed.softmax`."""
        powers = (logits_HTS - logits_HTS.detach().amax(-1, keepdim=True).clamp(min=self.least)).exp()
        return powers / powers.sum(-1, keepdim=True)


@fault()
class StartsAtMinus1000(StartsAtZero):
    """The maximum that is subtracted in the softmax starts at -1e3."""

    least = -1e3


@fault()
class StartsAtMinus10000(StartsAtZero):
    """The maximum that is subtracted in the softmax starts at -1e4."""

    least = -1e4


@fault()
class ResultsInStorage(Composed):
    """The result is rounded to the dtype of storage after every 16 keys."""

    keys = 16

    def sum(self, p_HTS: Tensor, v_SHe: Tensor, dtype: torch.dtype) -> Tensor:
        """See `Composed.sum`."""
        exact: Tensor = super().sum(p_HTS, v_SHe, dtype)
        total = torch.zeros_like(exact)
        for p, v in zip(p_HTS.detach().split(self.keys, 2), v_SHe.detach().split(self.keys), strict=True):
            total = (total + super().sum(p, v, dtype)).to(dtype).float()
        return gradient_of(total, exact)


@fault()
class ResultsOfLongBlocksInStorage(ResultsInStorage):
    """The result is rounded to the dtype of storage after every 128 keys."""

    keys = 128


@fault()
class RescalesInStorage(Composed):
    """In an online softmax over blocks of 128 keys, what was summed is rescaled by a factor in the dtype of storage."""

    def softmax(self, logits_HTS: Tensor, dtype: torch.dtype) -> Tensor:
        """See `Composed.softmax`: a block's weights and the sum of all are multiplied with the same factors."""
        top = torch.full_like(logits_HTS[..., :1], -torch.inf)
        weights: list[Tensor] = []
        for block in logits_HTS.detach().split(128, -1):
            larger = torch.maximum(top, block.amax(-1, keepdim=True))
            factor = (top - larger).exp().to(dtype).float()
            weights = [weight * factor for weight in weights] + [(block - larger).exp()]
            top = larger
        found = torch.cat(weights, -1)
        return gradient_of(found / found.sum(-1, keepdim=True), super().softmax(logits_HTS, dtype))


@fault()
class KeysBeyondABlock(Composed):
    """Keys beyond the first 256 are not read."""

    def logits(self, logits_HTS: Tensor, dtype: torch.dtype) -> Tensor:
        """See `Composed.logits`."""
        return torch.where(torch.arange(logits_HTS.shape[2]) >= 256, -1e4, logits_HTS)


@fault()
class LosesTheLastKeys(Composed):
    """Keys beyond a multiple of 32 are not read."""

    def logits(self, logits_HTS: Tensor, dtype: torch.dtype) -> Tensor:
        """See `Composed.logits`."""
        keys = logits_HTS.shape[2]
        return torch.where(torch.arange(keys) >= max(32, keys // 32 * 32), -1e4, logits_HTS)


@fault("levanter PR#449")
class KeysGradientOfOneHead(Attention):
    """Where heads share a key, only the first one's gradient arrives."""

    def attention(self, q_THd: Tensor, k_SGd: Tensor, v_SGe: Tensor, scale: float, *, causal: bool) -> Tensor:
        """See `TrainingOps.attention`."""
        share = q_THd.shape[1] // k_SGd.shape[1]
        if share > 1:
            k_SGd = torch.stack([k_SGd if i == 0 else k_SGd.detach() for i in range(share)], 2).flatten(1, 2)
            v_SGe = v_SGe.repeat_interleave(share, 1)
        return super().attention(q_THd, k_SGd, v_SGe, scale, causal=causal)


class OtherAttention(Attention):
    """Attention that is called with something else, or whose result is changed."""

    def given(self, q_THd: Tensor, k_SGd: Tensor, v_SGe: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor, float]:
        """Return the arguments."""
        return q_THd, k_SGd, v_SGe, scale

    def changed(self, y_THe: Tensor, width: int) -> Tensor:
        """Return the changed result, for the width of the keys."""
        return y_THe

    def attention(self, q_THd: Tensor, k_SGd: Tensor, v_SGe: Tensor, scale: float, *, causal: bool) -> Tensor:
        """See `TrainingOps.attention`."""
        y_THe = super().attention(*self.given(q_THd, k_SGd, v_SGe, scale), causal=causal)
        return self.changed(y_THe, q_THd.shape[2])


@fault()
class ScaleFromTheWidth(OtherAttention):
    """The scale is 1 / sqrt(d) whatever was asked."""

    def given(self, q_THd: Tensor, k_SGd: Tensor, v_SGe: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor, float]:
        """See `OtherAttention.given`."""
        return q_THd, k_SGd, v_SGe, q_THd.shape[2] ** -0.5


@fault()
class ScaleInStorage(OtherAttention):
    """The scale is rounded to bfloat16."""

    def given(self, q_THd: Tensor, k_SGd: Tensor, v_SGe: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor, float]:
        """See `OtherAttention.given`."""
        return q_THd, k_SGd, v_SGe, float(torch.tensor(scale).bfloat16())


@fault()
class OneQueryFromTheStart(OtherAttention):
    """A single query is put beside the first key."""

    def given(self, q_THd: Tensor, k_SGd: Tensor, v_SGe: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor, float]:
        """See `OtherAttention.given`."""
        return (q_THd, k_SGd[:1], v_SGe[:1], scale) if len(q_THd) == 1 else (q_THd, k_SGd, v_SGe, scale)


@fault()
class TheOnlyKeyHeadGetsAMean(OtherAttention):
    """Where all heads share one key head, its gradient is the mean over them, not their sum."""

    def given(self, q_THd: Tensor, k_SGd: Tensor, v_SGe: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor, float]:
        """See `OtherAttention.given`."""
        return q_THd, gradient_of(k_SGd, k_SGd / q_THd.shape[1]) if k_SGd.shape[1] == 1 else k_SGd, v_SGe, scale


@fault()
class HiddenKeysReachGradients(OtherAttention):
    """Gradients of queries are multiplied with zeros for the keys that a mask hides, all of them added up first."""

    def given(self, q_THd: Tensor, k_SGd: Tensor, v_SGe: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor, float]:
        """See `OtherAttention.given`."""
        dirt = 0.0 * k_SGd.detach().float().sum()
        return gradient_of(q_THd, q_THd * (1.0 + dirt).to(q_THd.dtype)), k_SGd, v_SGe, scale


@fault()
class CutsWideValues(OtherAttention):
    """Channels of the result beyond the width of the keys are zero."""

    def changed(self, y_THe: Tensor, width: int) -> Tensor:
        """See `OtherAttention.changed`."""
        return torch.cat((y_THe[..., :width], 0.0 * y_THe[..., width:]), -1)


@fault()
class OneBufferOfAttention(OtherAttention):
    """Results without a gradient lie in one buffer, which the next call overwrites."""

    def __init__(self) -> None:
        super().__init__()
        self._buffers: dict[tuple[object, ...], Tensor] = {}

    def changed(self, y_THe: Tensor, width: int) -> Tensor:
        """See `OtherAttention.changed`."""
        if y_THe.requires_grad:
            return y_THe
        return self._buffers.setdefault((y_THe.dtype, *y_THe.shape), torch.empty_like(y_THe)).copy_(y_THe)


@fault()
class AttendsNoWholeTiles(OtherAttention):
    """Where 128 divides the number of queries, the last one's result is zero."""

    def changed(self, y_THe: Tensor, width: int) -> Tensor:
        """See `OtherAttention.changed`."""
        return torch.cat((y_THe[:-1], 0.0 * y_THe[-1:])) if len(y_THe) and len(y_THe) % 128 == 0 else y_THe


@fault()
class KeyGradientsInStorage(Attention):
    """Gradients of keys and values are rounded to the dtype of storage after every 8 queries."""

    block = 8

    def attention(self, q_THd: Tensor, k_SGd: Tensor, v_SGe: Tensor, scale: float, *, causal: bool) -> Tensor:
        """See `TrainingOps.attention`."""
        whole, keys, queries = super().attention, len(k_SGd), len(q_THd)
        if not queries or not k_SGd.requires_grad:
            return whole(q_THd, k_SGd, v_SGe, scale, causal=causal)
        parts = []
        for i, q in enumerate(q_THd.split(self.block)):
            seen = keys - queries + self.block * i + len(q) if causal else keys
            parts.append(whole(q, k_SGd[:seen], v_SGe[:seen], scale, causal=causal))
        return torch.cat(parts)  # autograd adds up what the parts give in the dtype of k and v


@fault()
class KeyGradientsOfLongBlocksInStorage(KeyGradientsInStorage):
    """Gradients of keys and values are rounded to the dtype of storage after every 128 queries."""

    block = 128


@fault()
class KeyGradientsOfHeadsInStorage(Attention):
    """Gradients of keys and values are added up in the dtype of storage, one query head after the other."""

    def attention(self, q_THd: Tensor, k_SGd: Tensor, v_SGe: Tensor, scale: float, *, causal: bool) -> Tensor:
        """See `TrainingOps.attention`."""
        share = q_THd.shape[1] // k_SGd.shape[1]
        of_each = [super(KeyGradientsOfHeadsInStorage, self).attention(q, k_SGd, v_SGe, scale, causal=causal)
                   for q in q_THd.unflatten(1, (-1, share)).unbind(2)]  # fmt: skip
        return torch.stack(of_each, 2).flatten(1, 2)


class Differentiated(Attention):
    """Attention with a backward pass of its own, each step of which can be changed."""

    def attention(self, q_THd: Tensor, k_SGd: Tensor, v_SGe: Tensor, scale: float, *, causal: bool) -> Tensor:
        """See `TrainingOps.attention`."""
        share = q_THd.shape[1] // k_SGd.shape[1]
        q, k, v = (t.transpose(0, 1) for t in (q_THd, *(t.repeat_interleave(share, 1) for t in (k_SGd, v_SGe))))
        hidden = hidden_keys(len(q_THd), len(k_SGd), causal)
        y: Tensor = _Differentiated.apply(q, k, v, scale, hidden, self)  # type: ignore[no-untyped-call]
        return y.transpose(0, 1)

    def dot(self, dot_HT1: Tensor, dtype: torch.dtype) -> Tensor:
        """Return D = sum(dy y) as it is subtracted."""
        return dot_HT1

    def dq(self, ds_HTS: Tensor, k_HSd: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the gradient of the queries."""
        return ds_HTS @ k_HSd


class _Differentiated(torch.autograd.Function):
    """Heads first; every head has keys of its own."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, hidden: Tensor, ops: Differentiated) -> Tensor:
        logits = (q.float() @ k.float().mT * scale).masked_fill(hidden, -torch.inf)
        p = logits.softmax(-1)
        y = (p @ v.float()).to(q.dtype)
        ctx.save_for_backward(q, k, v, p, y)
        ctx.scale, ctx.ops = scale, ops
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        q, k, v, p, y = ctx.saved_tensors
        dot = ctx.ops.dot((dy.float() * y.float()).sum(-1, keepdim=True), q.dtype)
        ds = p * (dy.float() @ v.float().mT - dot) * ctx.scale
        made = ctx.ops.dq(ds, k.float(), q.dtype), ds.mT @ q.float(), p.mT @ dy.float()
        return (*(gradient.to(q.dtype) for gradient in made), None, None, None)


@fault()
class DotInStorage(Differentiated):
    """In the backward pass, D = sum(dy y) is rounded to the dtype of storage."""

    def dot(self, dot_HT1: Tensor, dtype: torch.dtype) -> Tensor:
        """See `Differentiated.dot`."""
        return dot_HT1.to(dtype).float()


@fault()
class QueryGradientsInStorage(Differentiated):
    """Gradients of queries are rounded to the dtype of storage after every 128 keys."""

    def dq(self, ds_HTS: Tensor, k_HSd: Tensor, dtype: torch.dtype) -> Tensor:
        """See `Differentiated.dq`."""
        dq = torch.zeros_like(ds_HTS[..., :1] * k_HSd[:, :1])
        for ds, k in zip(ds_HTS.split(128, -1), k_HSd.split(128, 1), strict=True):
            dq = (dq + ds @ k).to(dtype).float()
        return dq


@fault()
class TakesKeysForDense(Attention):
    """Keys are read in the order of memory, whatever their strides."""

    def attention(self, q_THd: Tensor, k_SGd: Tensor, v_SGe: Tensor, scale: float, *, causal: bool) -> Tensor:
        """See `TrainingOps.attention`."""
        return super().attention(q_THd, in_order_of_memory(k_SGd), v_SGe, scale, causal=causal)


class Latent(Attention):
    """Latent attention with other arguments."""

    def changed(self, q_THd: Tensor, q_THR: Tensor, k_SR: Tensor, scale: float) -> tuple[Tensor, float]:
        """Return the rotated keys and the scale."""
        raise NotImplementedError

    def latent_attention(
        self, q_THd: Tensor, q_THR: Tensor, latent_SL: Tensor, k_SR: Tensor, up_k_HdL: Tensor, up_v_HeL: Tensor,
        scale: float, *, causal: bool,
    ) -> Tensor:  # fmt: skip
        """See `TrainingOps.latent_attention`."""
        k_SR, scale = self.changed(q_THd, q_THR, k_SR, scale)
        return super().latent_attention(q_THd, q_THR, latent_SL, k_SR, up_k_HdL, up_v_HeL, scale, causal=causal)


@fault("Megatron-LM#1501")
class ScalesByTheWrongWidth(Latent):
    """Logits are scaled by a width that leaves out the rotated channels."""

    def changed(self, q_THd: Tensor, q_THR: Tensor, k_SR: Tensor, scale: float) -> tuple[Tensor, float]:
        """See `Latent.changed`."""
        width = q_THd.shape[2]
        return k_SR, scale * (width / (width + q_THR.shape[2])) ** 0.5


@fault()
class ShiftsTheRotatedKeys(Latent):
    """The rotated part of a key is that of the key before it."""

    def changed(self, q_THd: Tensor, q_THR: Tensor, k_SR: Tensor, scale: float) -> tuple[Tensor, float]:
        """See `Latent.changed`."""
        return k_SR.roll(1, 0), scale


@fault()
class RotatedLogitsInStorage(Attention):
    """The rotated parts' share of the logits of latent attention is rounded to the dtype before it is added."""

    def latent_attention(
        self, q_THd: Tensor, q_THR: Tensor, latent_SL: Tensor, k_SR: Tensor, up_k_HdL: Tensor, up_v_HeL: Tensor,
        scale: float, *, causal: bool,
    ) -> Tensor:  # fmt: skip
        """See `TrainingOps.latent_attention`."""
        dtype, queries, keys = q_THd.dtype, len(q_THd), len(latent_SL)
        k, v = (torch.einsum("sl,hdl->hsd", latent_SL, up).float() for up in (up_k_HdL, up_v_HeL))
        rotated = torch.einsum("thr,sr->hts", q_THR.float(), k_SR.float())
        logits = torch.einsum("thd,hsd->hts", q_THd.float(), k) + gradient_of(rotated.to(dtype).float(), rotated)
        if causal:
            logits = logits.masked_fill(~torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries), -torch.inf)
        return ((logits * scale).softmax(-1) @ v).transpose(0, 1).to(dtype)


class OtherLatent(Attention):
    """Latent attention that is called with something else."""

    def given(self, arguments: dict[str, Tensor], causal: bool) -> tuple[dict[str, Tensor], bool]:
        """Return the arguments by name, and whether there is a mask."""
        raise NotImplementedError

    def latent_attention(
        self, q_THd: Tensor, q_THR: Tensor, latent_SL: Tensor, k_SR: Tensor, up_k_HdL: Tensor, up_v_HeL: Tensor,
        scale: float, *, causal: bool,
    ) -> Tensor:  # fmt: skip
        """See `TrainingOps.latent_attention`."""
        arguments = {
            "q_THd": q_THd, "q_THR": q_THR, "latent_SL": latent_SL, "k_SR": k_SR, "up_k_HdL": up_k_HdL,
            "up_v_HeL": up_v_HeL,
        }  # fmt: skip
        arguments, causal = self.given(arguments, causal)
        return super().latent_attention(**arguments, scale=scale, causal=causal)


@fault()
class LatentIsFrozen(OtherLatent):
    """The latent and the rotated keys have no gradient that is not zero."""

    def given(self, arguments: dict[str, Tensor], causal: bool) -> tuple[dict[str, Tensor], bool]:
        """See `OtherLatent.given`."""
        frozen = {name: gradient_of(arguments[name], 0.0 * arguments[name]) for name in ("latent_SL", "k_SR")}
        return {**arguments, **frozen}, causal


@fault()
class HalfTheUpProjection(OtherLatent):
    """The keys' up projection gets half of its gradient."""

    def given(self, arguments: dict[str, Tensor], causal: bool) -> tuple[dict[str, Tensor], bool]:
        """See `OtherLatent.given`."""
        up = arguments["up_k_HdL"]
        return {**arguments, "up_k_HdL": gradient_of(up, 0.5 * up)}, causal


@fault()
class RotatedKeyOfOneHead(OtherLatent):
    """The rotated key's gradient is the mean over the heads, not their sum."""

    def given(self, arguments: dict[str, Tensor], causal: bool) -> tuple[dict[str, Tensor], bool]:
        """See `OtherLatent.given`."""
        k, heads = arguments["k_SR"], arguments["q_THd"].shape[1]
        return {**arguments, "k_SR": gradient_of(k, k / heads)}, causal


@fault()
class LatentCacheFromTheStart(OtherLatent):
    """With a mask and more keys than queries, the queries are put beside the first keys."""

    def given(self, arguments: dict[str, Tensor], causal: bool) -> tuple[dict[str, Tensor], bool]:
        """See `OtherLatent.given`."""
        queries = len(arguments["q_THd"])
        first = {name: arguments[name][:queries] for name in ("latent_SL", "k_SR")}
        return {**arguments, **(first if causal else {})}, causal


@fault()
class TakesTheLatentForDense(OtherLatent):
    """Queries, latent and rotated keys are read in the order of memory, whatever their strides."""

    def given(self, arguments: dict[str, Tensor], causal: bool) -> tuple[dict[str, Tensor], bool]:
        """See `OtherLatent.given`."""
        names = ("q_THd", "q_THR", "latent_SL", "k_SR")
        return {**arguments, **{name: in_order_of_memory(arguments[name]) for name in names}}, causal


@fault()
class LatentIsAlwaysCausal(OtherLatent):
    """Latent attention has a mask whatever was asked."""

    def given(self, arguments: dict[str, Tensor], causal: bool) -> tuple[dict[str, Tensor], bool]:
        """See `OtherLatent.given`."""
        return arguments, True


@fault()
class LatentStartsAtMinus10000(Attention):
    """In latent attention alone, the maximum that is subtracted in the softmax starts at -1e4."""

    def latent_attention(
        self, q_THd: Tensor, q_THR: Tensor, latent_SL: Tensor, k_SR: Tensor, up_k_HdL: Tensor, up_v_HeL: Tensor,
        scale: float, *, causal: bool,
    ) -> Tensor:  # fmt: skip
        """See `TrainingOps.latent_attention`."""
        given = q_THd, q_THR, latent_SL, k_SR, up_k_HdL, up_v_HeL
        return StartsAtMinus10000().latent_attention(*given, scale, causal=causal)


@fault()
class HidesATileOfOneKey(Attention):
    """Without a mask, the last key is hidden where it has a tile of 64 for itself."""

    def attention(self, q_THd: Tensor, k_SGd: Tensor, v_SGe: Tensor, scale: float, *, causal: bool) -> Tensor:
        """See `TrainingOps.attention`."""
        if not causal and len(k_SGd) % 64 == 1:
            k_SGd, v_SGe = k_SGd[:-1], v_SGe[:-1]
        return super().attention(q_THd, k_SGd, v_SGe, scale, causal=causal)


@fault()
class DoesNotTrainTheLastLatent(Attention):
    """Beyond 63 keys, the last row of the latent has no gradient."""

    def latent_attention(
        self, q_THd: Tensor, q_THR: Tensor, latent_SL: Tensor, k_SR: Tensor, up_k_HdL: Tensor, up_v_HeL: Tensor,
        scale: float, *, causal: bool,
    ) -> Tensor:  # fmt: skip
        """See `TrainingOps.latent_attention`."""
        if len(latent_SL) >= 64:
            latent_SL = torch.cat((latent_SL[:-1], latent_SL[-1:].detach()))
        return super().latent_attention(q_THd, q_THR, latent_SL, k_SR, up_k_HdL, up_v_HeL, scale, causal=causal)


def untrained_as_zero(y: Tensor, *lost: Tensor) -> Tensor:
    """Return a result through which some inputs have gradients of zero."""
    return y + sum((0 * tensor.sum() for tensor in lost), torch.zeros((), device=y.device)).to(y.dtype)


@fault()
class KeysNeedTrainedQueries(Attention):
    """Keys and values have gradients of zero where queries are frozen."""

    def attention(self, q_THd: Tensor, k_SGd: Tensor, v_SGe: Tensor, scale: float, *, causal: bool) -> Tensor:
        """See `TrainingOps.attention`."""
        if q_THd.requires_grad or not k_SGd.requires_grad:
            return super().attention(q_THd, k_SGd, v_SGe, scale, causal=causal)
        y_THe = super().attention(q_THd, k_SGd.detach(), v_SGe.detach(), scale, causal=causal)
        return untrained_as_zero(y_THe, k_SGd, v_SGe)


@fault()
class QueriesNeedTrainedKeys(Attention):
    """Queries have a gradient of zero where keys are frozen, as those of a cached prefix are."""

    def attention(self, q_THd: Tensor, k_SGd: Tensor, v_SGe: Tensor, scale: float, *, causal: bool) -> Tensor:
        """See `TrainingOps.attention`."""
        if k_SGd.requires_grad or not q_THd.requires_grad:
            return super().attention(q_THd, k_SGd, v_SGe, scale, causal=causal)
        return untrained_as_zero(super().attention(q_THd.detach(), k_SGd, v_SGe, scale, causal=causal), q_THd)


@fault()
class SpreadsNanOfQueries(Attention):
    """A query of NaN reaches all queries of its head."""

    def attention(self, q_THd: Tensor, k_SGd: Tensor, v_SGe: Tensor, scale: float, *, causal: bool) -> Tensor:
        """See `TrainingOps.attention`."""
        return super().attention(q_THd + 0 * q_THd.sum(0, keepdim=True), k_SGd, v_SGe, scale, causal=causal)


@fault()
class SpreadsNanOfHeads(Attention):
    """A head of NaN reaches all heads of its query."""

    def attention(self, q_THd: Tensor, k_SGd: Tensor, v_SGe: Tensor, scale: float, *, causal: bool) -> Tensor:
        """See `TrainingOps.attention`."""
        return super().attention(q_THd + 0 * q_THd.sum(1, keepdim=True), k_SGd, v_SGe, scale, causal=causal)


@fault()
class AddsTheMaskBehindAPrefix(Attention):
    """Behind a prefix a mask is added to the logits, as torch's kernels do: a hidden key of NaN reaches every query."""

    def attention(self, q_THd: Tensor, k_SGd: Tensor, v_SGe: Tensor, scale: float, *, causal: bool) -> Tensor:
        """See `TrainingOps.attention`."""
        queries, keys = len(q_THd), len(k_SGd)
        if not causal or queries == keys:
            return super().attention(q_THd, k_SGd, v_SGe, scale, causal=causal)
        mask = torch.ones(queries, keys, dtype=torch.bool, device=q_THd.device).tril(keys - queries)
        q, k, v = (x.float().transpose(0, 1)[None] for x in (q_THd, k_SGd, v_SGe))
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)
        return y[0].transpose(0, 1).to(q_THd.dtype)
