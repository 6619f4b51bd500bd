# SPDX-License-Identifier: Apache-2.0
"""Implementations of `TrainingOps`: honest ones that differ in how they compute, and wrong ones, each in one thing."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from hal.moe.torch_training_ops import TorchTrainingOps


def backward(forward, gradients):
    """A function whose gradients are written by hand: `gradients(saved tensors, dy)` returns one for each tensor."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *tensors):
            ctx.save_for_backward(*tensors)
            return forward(*tensors)

        @staticmethod
        def backward(ctx, dy):
            return gradients(ctx.saved_tensors, dy)

    return Function.apply


# Honest.


class Wide(TorchTrainingOps):
    """Everything in float64, rounded once."""

    def rms_norm(self, x, w, eps):
        y = F.rms_norm(x.double(), (x.shape[1],), w.double(), eps)
        return y.to(x.dtype)

    def layer_norm(self, x, w, b, eps):
        return F.layer_norm(x.double(), (x.shape[1],), w.double(), b.double(), eps).to(x.dtype)

    def rotary(self, x, cos, sin):
        return super().rotary(x.double(), cos.double(), sin.double()).to(x.dtype)

    def attention(self, q, k, v, scale, *, causal):
        return super().attention(q.double(), k.double(), v.double(), scale, causal=causal).to(q.dtype)

    def norm_head(self, x, w, *, train, through_norm=True):
        return super().norm_head(x.double(), w.double(), train=train, through_norm=through_norm).to(x.dtype)

    def cross_entropy(self, logits, targets, *, ignore_index=-100, z_coefficient=0.0):
        return super().cross_entropy(logits.double(), targets, ignore_index=ignore_index, z_coefficient=z_coefficient).float()


class Blocked(TorchTrainingOps):
    """The last dimension is summed in blocks from the end; attention is FlashAttention's; cross-entropy is online."""

    BLOCK = 7

    def total(self, terms, dim=-1):
        parts = [part.flip(dim).sum(dim, keepdim=True) for part in terms.split(self.BLOCK, dim)] or [terms.sum(dim, keepdim=True)]
        whole = parts[-1]
        for part in parts[-2::-1]:
            whole = whole + part
        return whole

    def rms_norm(self, x, w, eps):
        wide = x.float()
        return (wide / (self.total(wide * wide) / x.shape[1] + eps).sqrt() * w.float()).to(x.dtype)

    def layer_norm(self, x, w, b, eps):
        wide, n = x.float(), x.shape[1]
        centred = wide - self.total(wide) / n
        return (centred * torch.rsqrt(self.total(centred * centred) / n + eps) * w.float() + b.float()).to(x.dtype)

    def rotary(self, x, cos, sin):
        half = cos.shape[1] // 2
        wide = x.float()
        a, b, rest = wide[..., :half], wide[..., half : 2 * half], wide[..., 2 * half :]
        c, s = cos[:, None, :half], sin[:, None, :half]
        return torch.cat((torch.addcmul(a * c, b, s, value=-1), torch.addcmul(a * s, b, c), rest), -1).to(x.dtype)

    def attention(self, q, k, v, scale, *, causal):
        return Flash.apply(q, k, v, scale, causal, self.BLOCK)

    def norm_head(self, x, w, *, train, through_norm=True):
        wide = w.float()
        square = self.total(wide * wide, 0)
        norm = (square if through_norm else square.detach()).sqrt()
        logits = x @ (wide / (norm + 1e-7)).to(x.dtype).t()
        return logits if train else logits.detach()

    def cross_entropy(self, logits, targets, *, ignore_index=-100, z_coefficient=0.0):
        wide = logits.float()
        if not len(wide):
            return wide.sum()
        top, total = torch.full_like(wide[:, :1], -torch.inf), torch.zeros_like(wide[:, :1])
        for part in wide.split(1000, 1):
            new = torch.maximum(top, part.detach().max(1, keepdim=True).values)
            total, top = total * (top - new).exp() + (part - new).exp().sum(1, keepdim=True), new
        lse = (top + total.log())[:, 0]
        counts = targets != ignore_index
        losses = lse - wide.gather(1, targets.clamp(min=0)[:, None])[:, 0] + z_coefficient * lse**2
        return torch.where(counts, losses, 0.0)[counts].sum() / max(1, int(counts.sum()))


class Flash(torch.autograd.Function):
    """Online softmax over blocks of keys, probabilities in the dtype of storage, and the recomputing backward pass."""

    @staticmethod
    def forward(ctx, q, k, v, scale, causal, block):
        share = q.shape[1] // k.shape[1]
        kk, vv = (t.repeat_interleave(share, 1).transpose(0, 1) for t in (k, v))
        qq = q.transpose(0, 1)
        hidden = torch.ones(len(q), len(k), dtype=torch.bool).triu(1 + len(k) - len(q)) if causal else torch.zeros(len(q), len(k), dtype=torch.bool)
        top = torch.full((q.shape[1], len(q), 1), -torch.inf)
        total, out = torch.zeros_like(top), torch.zeros(q.shape[1], len(q), v.shape[2])
        for start in range(0, len(k), block):
            part = slice(start, start + block)
            logits = qq.float() @ kk[:, part].float().mT * (scale * 1.4426950408889634)
            logits = logits.masked_fill(hidden[:, part], -torch.inf)
            new = torch.maximum(top, logits.max(-1, keepdim=True).values)
            base = torch.where(new == -torch.inf, 0.0, new)
            p, alpha = (logits - base).exp2(), (top - base).exp2()
            total = total * alpha + p.sum(-1, keepdim=True)
            out = out * alpha + p.to(q.dtype).float() @ vv[:, part].float()
            top = new
        y = (out / total).to(q.dtype)
        ctx.save_for_backward(q, k, v, y, top + total.log2(), hidden)
        ctx.scale, ctx.share = scale, share
        return y.transpose(0, 1)

    @staticmethod
    def backward(ctx, dy):
        q, k, v, y, lse, hidden = ctx.saved_tensors
        dtype = q.dtype
        qq, dd = q.transpose(0, 1).float(), dy.transpose(0, 1).float()
        kk, vv = (t.repeat_interleave(ctx.share, 1).transpose(0, 1).float() for t in (k, v))
        p = (qq @ kk.mT * (ctx.scale * 1.4426950408889634) - lse).exp2().masked_fill(hidden, 0.0)
        delta = (dd * y.float()).sum(-1, keepdim=True)
        ds = (p * (dd @ vv.mT - delta)).to(dtype).float()
        dq = (ds @ kk * ctx.scale).to(dtype).transpose(0, 1)

        def grouped(per_head):  # each rounded, then added up
            return per_head.to(dtype).unflatten(0, (-1, ctx.share)).float().sum(1).to(dtype).transpose(0, 1)

        return dq, grouped(ds.mT @ qq * ctx.scale), grouped(p.to(dtype).float().mT @ dd), None, None, None


class Folded(TorchTrainingOps):
    """One fused formula for each gradient, as kernels have them; the latent projections absorbed into q."""

    def rms_norm(self, x, w, eps):
        def gradients(saved, dy):
            x, w = (t.float() for t in saved)
            r = torch.rsqrt((x * x).mean(1, keepdim=True) + eps)
            g, hat = dy.float() * w, x * r
            return ((g - hat * (g * hat).mean(1, keepdim=True)) * r).to(dy.dtype), (dy.float() * hat).sum(0).to(dy.dtype)

        return backward(lambda x, w: super(Folded, self).rms_norm(x, w, eps), gradients)(x, w)

    def layer_norm(self, x, w, b, eps):
        def gradients(saved, dy):
            x, w, _ = (t.float() for t in saved)
            mean = x.mean(1, keepdim=True)
            r = torch.rsqrt(((x - mean) ** 2).mean(1, keepdim=True) + eps)
            g, hat = dy.float() * w, x * r - mean * r
            dx = (g - g.mean(1, keepdim=True) - hat * (g * hat).mean(1, keepdim=True)) * r
            return dx.to(dy.dtype), (dy.float() * hat).sum(0).to(dy.dtype), dy.float().sum(0).to(dy.dtype)

        return backward(lambda x, w, b: super(Folded, self).layer_norm(x, w, b, eps), gradients)(x, w, b)

    def latent_attention(self, q, q_r, latent, k_r, up_k, up_v, scale, *, causal):
        absorbed = torch.einsum("thd,hdl->thl", q, up_k)
        logits = (torch.einsum("thl,sl->hts", absorbed.float(), latent.float()) + torch.einsum("thr,sr->hts", q_r.float(), k_r.float())) * scale
        if causal:
            logits = logits.masked_fill(torch.ones(logits.shape[1:], dtype=torch.bool).triu(1 + len(latent) - len(q)), -torch.inf)
        p = logits.softmax(-1).to(q.dtype)
        summed = torch.einsum("hts,sl->thl", p.float(), latent.float()).to(q.dtype)
        return torch.einsum("thl,hel->the", summed.float(), up_v.float()).to(q.dtype)

    def cross_entropy(self, logits, targets, *, ignore_index=-100, z_coefficient=0.0):
        counts = targets != ignore_index
        number = max(1, int(counts.sum()))

        def forward(logits):
            return TorchTrainingOps.cross_entropy(self, logits, targets, ignore_index=ignore_index, z_coefficient=z_coefficient)

        def gradients(saved, dy):
            (x,) = saved
            x = x.float()
            lse = x.logsumexp(1, keepdim=True)
            p = (x - lse).exp() * (1.0 + 2.0 * z_coefficient * lse)
            p[torch.arange(len(x))[counts], targets[counts]] -= 1.0
            return (torch.where(counts[:, None], p, 0.0) * (dy / number)).to(logits.dtype)

        return backward(forward, gradients)(logits)


HONEST = {"portable": TorchTrainingOps(), "wide": Wide(), "blocked": Blocked(), "folded": Folded()}


# Wrong.


class EpsOutsideTheRoot(TorchTrainingOps):
    def rms_norm(self, x, w, eps):
        wide = x.float()
        return (wide / ((wide * wide).mean(1, keepdim=True).clamp(min=1e-30).sqrt() + eps) * w.float()).to(x.dtype)


class WeightAfterTheCast(TorchTrainingOps):
    def rms_norm(self, x, w, eps):
        return F.rms_norm(x.float(), (x.shape[1],), None, eps).to(x.dtype) * w


class SquaresInStorage(TorchTrainingOps):
    def rms_norm(self, x, w, eps):
        mean = (x * x).float().mean(1, keepdim=True)
        return (x.float() * torch.rsqrt(mean + eps) * w.float()).to(x.dtype)


class NoMeanTermInDx(Folded):
    """The norm is a constant in the backward pass."""

    def rms_norm(self, x, w, eps):
        wide = x.float()
        r = torch.rsqrt((wide * wide).mean(1, keepdim=True) + eps).detach()
        return (wide * r * w.float()).to(x.dtype)


class OnePassVariance(TorchTrainingOps):
    def layer_norm(self, x, w, b, eps):
        wide = x.float()
        mean = wide.mean(1, keepdim=True)
        var = (wide * wide).mean(1, keepdim=True) - mean * mean
        return ((wide - mean) * torch.rsqrt(var + eps) * w.float() + b.float()).to(x.dtype)


class UnbiasedVariance(TorchTrainingOps):
    def layer_norm(self, x, w, b, eps):
        wide = x.float()
        return ((wide - wide.mean(1, keepdim=True)) * torch.rsqrt(wide.var(1, keepdim=True) + eps) * w.float() + b.float()).to(x.dtype)


class LayerNormWithoutTheMeansGradient(TorchTrainingOps):
    def layer_norm(self, x, w, b, eps):
        wide = x.float()
        centred = wide - wide.mean(1, keepdim=True).detach()
        return (centred * torch.rsqrt((centred * centred).mean(1, keepdim=True) + eps) * w.float() + b.float()).to(x.dtype)


class TorchsOwnLayerNorm(TorchTrainingOps):
    """torch 2.13's CPU kernel adds up 16-bit gradients in 16 bits."""

    def layer_norm(self, x, w, b, eps):
        return F.layer_norm(x, (x.shape[1],), w, b, eps)


class Interleaved(TorchTrainingOps):
    def rotary(self, x, cos, sin):
        n = cos.shape[1]
        wide = x[..., :n].float()
        a, b, c, s = wide[..., ::2], wide[..., 1::2], cos[:, None, : n // 2], sin[:, None, : n // 2]
        y = torch.stack((a * c - b * s, b * c + a * s), -1).flatten(-2)
        return torch.cat((y.to(x.dtype), x[..., n:]), -1)


class RotatesForwardInBackward(TorchTrainingOps):
    """The sign of the second half is not turned in the backward pass."""

    def rotary(self, x, cos, sin):
        def forward(x):
            return TorchTrainingOps.rotary(self, x, cos, sin)

        return backward(forward, lambda saved, dy: forward(dy))(x)


class RotatesAllChannels(TorchTrainingOps):
    """A table of half the channels is applied to both halves."""

    def rotary(self, x, cos, sin):
        if cos.shape[1] < x.shape[2]:
            cos, sin = (torch.cat((t, t), 1)[:, : x.shape[2]] for t in (cos, sin))
        return super().rotary(x, cos, sin)


class TableInStorage(TorchTrainingOps):
    def rotary(self, x, cos, sin):
        return super().rotary(x, cos.to(x.dtype).float(), sin.to(x.dtype).float())


class ProductsInStorage(TorchTrainingOps):
    """As in transformers: x cos and rotate_half(x) sin are rounded, and so is their sum."""

    def rotary(self, x, cos, sin):
        n = cos.shape[1]
        part = x[..., :n]
        turned = torch.cat((-part[..., n // 2 :], part[..., : n // 2]), -1)
        c, s = cos.to(x.dtype)[:, None], sin.to(x.dtype)[:, None]
        return torch.cat((part * c + turned * s, x[..., n:]), -1)


class Composed(TorchTrainingOps):
    """Attention in float32, with a step that may be changed."""

    def attention(self, q, k, v, scale, *, causal):
        head = self.heads(q.shape[1], k.shape[1])
        logits = self.logits(torch.einsum("thd,shd->hts", q.float(), k[:, head].float()) * scale, q.dtype)
        if causal:
            logits = self.mask(logits, torch.ones(logits.shape[1:], dtype=torch.bool).triu(self.first(len(q), len(k))))
        p = self.softmax(logits, q.dtype)
        return torch.einsum("hts,she->the", p, v[:, head].float()).to(q.dtype)

    def heads(self, heads, groups):
        return torch.arange(heads) // (heads // groups)

    def logits(self, logits, dtype):
        return logits

    def first(self, queries, keys):
        return 1 + keys - queries

    def mask(self, logits, hidden):
        return logits.masked_fill(hidden, -torch.inf)

    def softmax(self, logits, dtype):
        return logits.softmax(-1)


class WrongKeyHead(Composed):
    def heads(self, heads, groups):
        return torch.arange(heads) % groups


class SeesOneTooMany(Composed):
    def first(self, queries, keys):
        return 2 + keys - queries


class DoesNotSeeItself(Composed):
    def first(self, queries, keys):
        return keys - queries

    def mask(self, logits, hidden):
        hidden[0, 0] = False
        return super().mask(logits, hidden)


class TopLeft(Composed):
    def first(self, queries, keys):
        return 1


class AddsItsMask(Composed):
    def mask(self, logits, hidden):
        return logits + torch.where(hidden, -torch.inf, 0.0)


class SoftmaxInStorage(Composed):
    def softmax(self, logits, dtype):
        low = torch.bfloat16 if dtype == torch.bfloat16 else torch.float16
        return logits.to(low).softmax(-1).float() if dtype != torch.float32 else logits.softmax(-1)


class SumInStorage(Composed):
    """Only the normaliser is added up in the dtype of storage."""

    def softmax(self, logits, dtype):
        e = (logits - logits.max(-1, keepdim=True).values).exp()
        total = torch.zeros_like(e[..., 0], dtype=dtype)
        for part in e.unbind(-1):
            total = (total.float() + part).to(dtype)
        return e / total.float()[..., None]


class LogitsInStorage(Composed):
    def logits(self, logits, dtype):
        return logits.to(dtype).float()


class LosesTheLastKeys(Composed):
    """Keys beyond a multiple of 32 are not read."""

    def logits(self, logits, dtype):
        keys = logits.shape[2]
        beyond = torch.arange(keys) >= max(32, keys // 32 * 32)
        return torch.where(beyond, -1e4, logits)


class ScalesByTheValuesWidth(TorchTrainingOps):
    def latent_attention(self, q, q_r, latent, k_r, up_k, up_v, scale, *, causal):
        factor = (q.shape[2] / (q.shape[2] + q_r.shape[2])) ** 0.5
        return super().latent_attention(q, q_r, latent, k_r, up_k, up_v, scale * factor, causal=causal)


class ForgetsTheRotatedKey(TorchTrainingOps):
    def latent_attention(self, q, q_r, latent, k_r, up_k, up_v, scale, *, causal):
        return super().latent_attention(q, q_r, latent, k_r.roll(1, 0), up_k, up_v, scale, causal=causal)


class KeysGradientOfOneHead(TorchTrainingOps):
    """Where heads share a key, only the first one's gradient arrives."""

    def attention(self, q, k, v, scale, *, causal):
        share = q.shape[1] // k.shape[1]
        if share == 1:
            return super().attention(q, k, v, scale, causal=causal)
        many = torch.stack([k if i == 0 else k.detach() for i in range(share)], 2).flatten(1, 2)
        return super().attention(q, many, v.repeat_interleave(share, 1), scale, causal=causal)


class CountsTheIgnored(TorchTrainingOps):
    def cross_entropy(self, logits, targets, *, ignore_index=-100, z_coefficient=0.0):
        loss = super().cross_entropy(logits, targets, ignore_index=ignore_index, z_coefficient=z_coefficient)
        return loss * (targets != ignore_index).sum() / max(1, len(targets))


class GradientWithoutTheMean(TorchTrainingOps):
    def cross_entropy(self, logits, targets, *, ignore_index=-100, z_coefficient=0.0):
        loss = super().cross_entropy(logits, targets, ignore_index=ignore_index, z_coefficient=z_coefficient)
        number = (targets != ignore_index).sum()
        return loss * number - (loss * (number - 1)).detach()


class StatisticsInStorage(TorchTrainingOps):
    def cross_entropy(self, logits, targets, *, ignore_index=-100, z_coefficient=0.0):
        lse = logits.float().logsumexp(1).to(logits.dtype).float()
        counts = targets != ignore_index
        picked = logits.float().gather(1, targets.clamp(min=0)[:, None])[:, 0]
        return torch.where(counts, lse - picked + z_coefficient * lse**2, 0.0).sum() / counts.sum().clamp(min=1)


class NotShifted(TorchTrainingOps):
    """exp of the logits as they are."""

    def cross_entropy(self, logits, targets, *, ignore_index=-100, z_coefficient=0.0):
        lse = logits.float().exp().sum(1).log()
        counts = targets != ignore_index
        picked = logits.float().gather(1, targets.clamp(min=0)[:, None])[:, 0]
        return torch.where(counts, lse - picked + z_coefficient * lse**2, 0.0).sum() / counts.sum().clamp(min=1)


class IgnoredNanReachesTheLoss(TorchTrainingOps):
    def cross_entropy(self, logits, targets, *, ignore_index=-100, z_coefficient=0.0):
        counts = (targets != ignore_index).float()
        losses = F.cross_entropy(logits.float(), targets.clamp(min=0), reduction="none")
        squares = logits.float().logsumexp(1) ** 2
        return ((losses + z_coefficient * squares) * counts).sum() / counts.sum().clamp(min=1)


class ZDoesNotTrain(TorchTrainingOps):
    def cross_entropy(self, logits, targets, *, ignore_index=-100, z_coefficient=0.0):
        plain = super().cross_entropy(logits, targets, ignore_index=ignore_index)
        full = super().cross_entropy(logits, targets, ignore_index=ignore_index, z_coefficient=z_coefficient)
        return plain + (full - plain).detach()


class LosesTheVocabularysTail(TorchTrainingOps):
    """The last entries of a vocabulary that is no multiple of 1,024 are not summed."""

    def cross_entropy(self, logits, targets, *, ignore_index=-100, z_coefficient=0.0):
        beyond = torch.arange(logits.shape[1]) >= max(1024, logits.shape[1] // 1024 * 1024)
        beyond = beyond[None] & (torch.arange(logits.shape[1])[None] != targets[:, None])
        return super().cross_entropy(logits.masked_fill(beyond, -torch.inf), targets, ignore_index=ignore_index, z_coefficient=z_coefficient)


class NoProjection(TorchTrainingOps):
    """The norm is a constant whatever was asked."""

    def norm_head(self, x, w, *, train, through_norm=True):
        return super().norm_head(x, w, train=train, through_norm=False)


class AlwaysProjects(TorchTrainingOps):
    def norm_head(self, x, w, *, train, through_norm=True):
        return super().norm_head(x, w, train=train, through_norm=True)


class NormInStorage(TorchTrainingOps):
    """As in Ling's published code, in training."""

    def norm_head(self, x, w, *, train, through_norm=True):
        norm = torch.norm(w, p=2, dim=0, keepdim=True) + 1e-7
        logits = F.linear(x, w / (norm if through_norm else norm.detach()))
        return logits if train else logits.detach()


class NormOfRows(TorchTrainingOps):
    """As in Baichuan 2."""

    def norm_head(self, x, w, *, train, through_norm=True):
        logits = F.linear(x, F.normalize(w.float(), dim=1).to(x.dtype))
        return logits if train else logits.detach()


class NormOfAShard(TorchTrainingOps):
    """Half of the vocabulary on each rank, and nobody adds up the squares."""

    def norm_head(self, x, w, *, train, through_norm=True):
        return torch.cat([super(NormOfAShard, self).norm_head(x, part, train=train, through_norm=through_norm) for part in w.chunk(2)], 1)


class EvaluationIsNotNormalised(TorchTrainingOps):
    def norm_head(self, x, w, *, train, through_norm=True):
        return super().norm_head(x, w, train=train, through_norm=through_norm) if train else F.linear(x, w).detach()


class StopsNormalisingAfterEvaluation(TorchTrainingOps):
    """As in Ling's published code, but for the weights that it overwrites."""

    normal = True

    def norm_head(self, x, w, *, train, through_norm=True):
        normal, self.normal = self.normal, self.normal and train
        return super().norm_head(x, w, train=train, through_norm=through_norm) if normal else F.linear(x, w)


class SpreadsNan(TorchTrainingOps):
    def rms_norm(self, x, w, eps):
        return super().rms_norm(x, w, eps) + 0.0 * x.sum(0, keepdim=True)


class ReadsStorage(TorchTrainingOps):
    """Reads keys in the order of memory."""

    def attention(self, q, k, v, scale, *, causal):
        k = torch.as_strided(k, k.shape, torch.empty(k.shape).stride())
        return super().attention(q, k, v, scale, causal=causal)


WRONG = {
    EpsOutsideTheRoot: ("norm.rms", "FAIL-NUMERIC"),
    WeightAfterTheCast: ("norm.rms", "FAIL-NUMERIC"),
    SquaresInStorage: ("norm.rms", "FAIL-NUMERIC"),
    NoMeanTermInDx: ("norm.rms", "FAIL-NUMERIC"),
    OnePassVariance: ("norm.layer", "FAIL-NUMERIC"),
    UnbiasedVariance: ("norm.layer_powers", "FAIL-NUMERIC"),
    LayerNormWithoutTheMeansGradient: ("norm.layer", "FAIL-NUMERIC"),
    SpreadsNan: ("norm.rms_nan_token", "FAIL-NONFINITE"),
    Interleaved: ("rotary.quarter_turns", "FAIL-NUMERIC"),
    RotatesForwardInBackward: ("rotary.quarter_turns", "FAIL-NUMERIC"),
    RotatesAllChannels: ("rotary.quarter_turns", "FAIL-NUMERIC"),
    TableInStorage: ("rotary.random", "FAIL-NUMERIC"),
    ProductsInStorage: ("rotary.random", "FAIL-NUMERIC"),
    WrongKeyHead: ("attention.pick", "FAIL-NUMERIC"),
    SeesOneTooMany: ("attention.causal", "FAIL-NUMERIC"),
    DoesNotSeeItself: ("attention.pick", "FAIL-NUMERIC"),
    TopLeft: ("attention.pick", "FAIL-NUMERIC"),
    AddsItsMask: ("attention.hidden", "FAIL-NONFINITE"),
    SoftmaxInStorage: ("attention.causal", "FAIL-NUMERIC"),
    SumInStorage: ("attention.full", "FAIL-NUMERIC"),
    LogitsInStorage: ("attention.causal", "FAIL-NUMERIC"),
    LosesTheLastKeys: ("attention.pick", "FAIL-NUMERIC"),
    KeysGradientOfOneHead: ("attention.causal", "FAIL-NUMERIC"),
    ReadsStorage: ("attention.strided", "FAIL-NUMERIC"),
    ScalesByTheValuesWidth: ("attention.latent", "FAIL-NUMERIC"),
    ForgetsTheRotatedKey: ("attention.latent", "FAIL-NUMERIC"),
    CountsTheIgnored: ("head.uniform", "FAIL-NUMERIC"),
    GradientWithoutTheMean: ("head.uniform", "FAIL-NUMERIC"),
    StatisticsInStorage: ("head.cross_entropy", "FAIL-NUMERIC"),
    NotShifted: ("head.cross_entropy", "FAIL-NONFINITE"),
    IgnoredNanReachesTheLoss: ("head.nan_token", "FAIL-NONFINITE"),
    ZDoesNotTrain: ("head.cross_entropy_z", "FAIL-NUMERIC"),
    LosesTheVocabularysTail: ("head.cross_entropy", "FAIL-NUMERIC"),
    NoProjection: ("head.norm", "FAIL-NUMERIC"),
    AlwaysProjects: ("head.norm_constant", "FAIL-NUMERIC"),
    NormInStorage: ("head.norm", "FAIL-NUMERIC"),
    NormOfRows: ("head.norm", "FAIL-NUMERIC"),
    NormOfAShard: ("head.norm", "FAIL-NUMERIC"),
    EvaluationIsNotNormalised: ("head.norm", "FAIL-NUMERIC"),
    StopsNormalisingAfterEvaluation: ("head.norm", "FAIL-NUMERIC"),
}
"""Each wrong implementation with the case that is meant for it."""
