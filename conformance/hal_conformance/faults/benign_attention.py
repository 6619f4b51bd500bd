# SPDX-License-Identifier: Apache-2.0
"""Honest attention: float64, blocks of keys with an online softmax, keys in two parts, the latent absorbed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hal_conformance.faults.attention import Attention, Composed, hidden_keys
from hal_conformance.faults.catalogue import benign
from hal_conformance.faults.parts import gradient_of

LOG2_E = 1.4426950408889634


@benign()
class ComposedAttention(Composed):
    """Attention as products and a softmax in float32."""


@benign()
class TrainsItsMaximum(Composed):
    """A softmax from its steps, with a gradient through the maximum that is subtracted."""

    def softmax(self, logits_HTS: Tensor, dtype: torch.dtype) -> Tensor:
        """See `Composed.softmax`."""
        powers = (logits_HTS - logits_HTS.max(-1, keepdim=True).values).exp()
        return powers / powers.sum(-1, keepdim=True)


@benign()
class StartsAtTheLowest(Composed):
    """The maximum that is subtracted in the softmax starts at the lowest float32, not at minus infinity."""

    def softmax(self, logits_HTS: Tensor, dtype: torch.dtype) -> Tensor:
        """See `Composed.softmax`."""
        least = torch.finfo(torch.float32).min
        powers = (logits_HTS - logits_HTS.detach().amax(-1, keepdim=True).clamp(min=least)).exp()
        return powers / powers.sum(-1, keepdim=True)


@benign()
class StoresProbabilities(Composed):
    """Probabilities are normalised, and rounded to the dtype before they are multiplied by v."""

    def softmax(self, logits_HTS: Tensor, dtype: torch.dtype) -> Tensor:
        """See `Composed.softmax`."""
        p = super().softmax(logits_HTS, dtype)
        return gradient_of(p.to(dtype).float(), p)


@benign()
class WideAttention(Attention):
    """Attention in float64, rounded once."""

    def attention(self, q_THd: Tensor, k_SGd: Tensor, v_SGe: Tensor, scale: float, *, causal: bool) -> Tensor:
        """See `TrainingOps.attention`."""
        return super().attention(q_THd.double(), k_SGd.double(), v_SGe.double(), scale, causal=causal).to(q_THd.dtype)


@benign()
class BlockedAttention(Attention):
    """Attention over blocks of seven keys, with an online softmax and a backward pass that computes it again."""

    block = 7
    turned = False

    def attention(self, q_THd: Tensor, k_SGd: Tensor, v_SGe: Tensor, scale: float, *, causal: bool) -> Tensor:
        """See `TrainingOps.attention`."""
        given = q_THd, k_SGd, v_SGe, scale, causal, self.block, self.turned
        made: Tensor = _Flash.apply(*given)  # type: ignore[no-untyped-call]
        return made


@benign()
class TurnedAttention(BlockedAttention):
    """The backward pass adds up logits in another order than the forward pass, and has D from p dP instead of dy y."""

    block = 64
    turned = True


@benign()
class AttentionInTwoParts(Attention):
    """The keys in two halves whose results are put together by their log-sum-exp, as in decoding."""

    parts = 2

    def attention(self, q_THd: Tensor, k_SGd: Tensor, v_SGe: Tensor, scale: float, *, causal: bool) -> Tensor:
        """See `TrainingOps.attention`."""
        share = q_THd.shape[1] // k_SGd.shape[1]
        q, k, v = (t.float().transpose(0, 1) for t in (q_THd, k_SGd, v_SGe))
        logits = q @ k.repeat_interleave(share, 0).mT * scale
        if causal:
            logits = logits.masked_fill(hidden_keys(len(q_THd), len(k_SGd)), -torch.inf)
        of_each = -(-len(k_SGd) // self.parts)
        # A query may see no key of the last part: its maximum is minus infinity there.
        least = torch.finfo(torch.float32).min
        tops = [part.detach().amax(-1, keepdim=True).clamp(min=least) for part in logits.split(of_each, -1)]
        powers = [(part - top).exp() for part, top in zip(logits.split(of_each, -1), tops, strict=True)]
        values = v.repeat_interleave(share, 0).split(of_each, 1)
        top = torch.stack(tops).amax(0)
        shares = [(each - top).exp() for each in tops]
        total = sum((p.sum(-1, keepdim=True) * s for p, s in zip(powers, shares, strict=True)), torch.zeros(()))
        y = sum((p @ v * s for p, v, s in zip(powers, values, shares, strict=True)), torch.zeros(()))
        return (y / total).to(q_THd.dtype).transpose(0, 1)


@benign()
class AttentionInThreeParts(AttentionInTwoParts):
    """The keys in three parts, none of which has a power of two of them, put together by their log-sum-exp."""

    parts = 3


@benign()
class AttentionByLogarithms(Composed):
    """The keys in five parts, each normalised by its own log-sum-exp and weighted by the difference to that of all."""

    def softmax(self, logits_HTS: Tensor, dtype: torch.dtype) -> Tensor:
        """See `Composed.softmax`."""
        parts = logits_HTS.split(-(-logits_HTS.shape[-1] // 5), -1)
        # A query may see nothing of a part: its log-sum-exp is minus infinity there, and its weight is 0.
        logs = torch.stack([part.logsumexp(-1, keepdim=True) for part in parts])
        weights = (logs - logs.logsumexp(0)).exp()
        bases = torch.where(logs.isinf(), 0.0, logs)
        return torch.cat([(part - b).exp() * w for part, b, w in zip(parts, bases, weights, strict=True)], -1)


@benign()
class AttentionKeyByKey(Composed):
    """Results are added up key by key, in one accumulator of float32."""

    def sum(self, p_HTS: Tensor, v_SHe: Tensor, dtype: torch.dtype) -> Tensor:
        """See `Composed.sum`."""
        exact: Tensor = super().sum(p_HTS, v_SHe, dtype)
        total = torch.zeros_like(exact).numpy()
        for p_HT, v_He in zip(p_HTS.detach().unbind(-1), v_SHe.detach(), strict=True):
            total += (p_HT.T[..., None] * v_He).numpy()
        return gradient_of(torch.from_numpy(total), exact)


@benign()
class AbsorbedLatent(Attention):
    """Latent attention whose up projections are absorbed into queries and outputs."""

    def latent_attention(
        self, q_THd: Tensor, q_THR: Tensor, latent_SL: Tensor, k_SR: Tensor, up_k_HdL: Tensor, up_v_HeL: Tensor,
        scale: float, *, causal: bool,
    ) -> Tensor:  # fmt: skip
        """See `TrainingOps.latent_attention`."""
        dtype = q_THd.dtype
        absorbed_THL = torch.einsum("thd,hdl->thl", q_THd, up_k_HdL)
        plain = torch.einsum("thl,sl->hts", absorbed_THL.float(), latent_SL.float())
        logits = (plain + torch.einsum("thr,sr->hts", q_THR.float(), k_SR.float())) * scale
        if causal:
            logits = logits.masked_fill(hidden_keys(len(q_THd), len(latent_SL)), -torch.inf)
        wide = logits.softmax(-1)
        p = wide + (wide.to(dtype).float() - wide).detach()  # the gradient of a probability is not rounded
        summed_THL = torch.einsum("hts,sl->thl", p, latent_SL.float()).to(dtype)
        return torch.einsum("thl,hel->the", summed_THL.float(), up_v_HeL.float()).to(dtype)


class _Flash(torch.autograd.Function):
    """Online softmax over blocks of keys, probabilities in the dtype of storage, and the recomputing backward pass."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, block: int, turned: bool
    ) -> Tensor:
        share = q.shape[1] // k.shape[1]
        qq, kk, vv = (t.transpose(0, 1) for t in (q, k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)))
        hidden = hidden_keys(len(q), len(k), causal)
        top = torch.full((q.shape[1], len(q), 1), -torch.inf)
        total, out = torch.zeros_like(top), torch.zeros(q.shape[1], len(q), v.shape[2])
        for start in range(0, len(k), block):
            part = slice(start, start + block)
            logits = qq.float() @ kk[:, part].float().mT * (scale * LOG2_E)
            logits = logits.masked_fill(hidden[:, part], -torch.inf)
            new = torch.maximum(top, logits.max(-1, keepdim=True).values)
            base = torch.where(new == -torch.inf, 0.0, new)
            p, alpha = (logits - base).exp2(), (top - base).exp2()
            total = total * alpha + p.sum(-1, keepdim=True)
            out = out * alpha + p.to(q.dtype).float() @ vv[:, part].float()
            top = new
        y = (out / total).to(q.dtype)
        ctx.save_for_backward(q, k, v, y, top + total.log2(), hidden)
        ctx.scale, ctx.share, ctx.turned = scale, share, turned
        return y.transpose(0, 1)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        q, k, v, y, lse, hidden = ctx.saved_tensors
        dtype, share = q.dtype, ctx.share
        qq, dd = q.transpose(0, 1).float(), dy.transpose(0, 1).float()
        kk, vv = (t.repeat_interleave(share, 1).transpose(0, 1).float() for t in (k, v))
        logits = qq.flip(-1) @ kk.flip(-1).mT if ctx.turned else qq @ kk.mT
        p = (logits * (ctx.scale * LOG2_E) - lse).exp2().masked_fill(hidden, 0.0)
        dp = dd @ vv.mT
        delta = (p * dp if ctx.turned else dd * y.float()).sum(-1, keepdim=True)
        ds = (p * (dp - delta)).to(dtype).float()

        def grouped(per_head: Tensor) -> Tensor:  # each rounded, then added up
            summed: Tensor = per_head.to(dtype).unflatten(0, (-1, share)).float().sum(1)
            return summed.to(dtype).transpose(0, 1)

        dq = (ds @ kk * ctx.scale).to(dtype).transpose(0, 1)
        return dq, grouped(ds.mT @ qq * ctx.scale), grouped(p.to(dtype).float().mT @ dd), None, None, None, None
