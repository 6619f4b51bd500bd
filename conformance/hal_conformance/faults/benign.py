# SPDX-License-Identifier: Apache-2.0
"""Honest implementations: other orders, other blockings, more precision, other forms of the same equations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hal.moe.ops import Dispatch, ExpertWeights, Routing
from hal.moe.router_spec import RouterSpec
from hal.moe.torch_ops import TorchMoEOps
from hal_conformance.faults.by_hand import by_hand
from hal_conformance.faults.catalogue import benign
from hal_conformance.faults.parts import OwnProduct, Parts, by_token, chosen_weights, weighted


@benign()
class BuiltFromParts(Parts):
    """The portable operators, put together once more."""


@benign()
class ExpertByExpert(Parts):
    """The loop over experts instead of one grouped product."""

    def __init__(self) -> None:
        super().__init__()
        self.honest = TorchMoEOps(grouped=False)


@benign()
class Reversed(OwnProduct):
    """Sums the inner dimension backwards, and the choices backwards."""

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """See `OwnProduct.product`."""
        return a.flip(-1) @ b.flip(-2)

    def combine(self, y_RD: Tensor, weights_TK: Tensor, slot_R: Tensor, num_tokens: int) -> Tensor:
        """See `MoEOps.combine`."""
        return weighted(y_RD, weights_TK, slot_R).flip(1).sum(1).to(y_RD.dtype)


@benign()
class SplitK(OwnProduct):
    """Sums eight parts of the inner dimension apart, then adds them."""

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """See `OwnProduct.product`."""
        parts = [left @ right for left, right in zip(a.chunk(8, -1), b.chunk(8, -2), strict=True)]
        return torch.stack(parts).sum(0)


@benign()
class Blocked(OwnProduct):
    """Adds blocks of 16 products to a running sum."""

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """See `OwnProduct.product`."""
        parts = [left @ right for left, right in zip(a.split(16, -1), b.split(16, -2), strict=True)]
        total: Tensor = parts[0]
        for part in parts[1:]:
            total = total + part
        return total


class Looped(OwnProduct):
    """Products by a loop over the inner dimension, in both passes; autograd would keep every partial sum."""

    families = ("experts",)  # a loop takes long, and layers say the same of an order

    def loop(self, a: Tensor, b: Tensor) -> Tensor:
        """Return [.., M, K] @ [.., K, N] in float32."""
        raise NotImplementedError

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """See `OwnProduct.product`."""
        return by_hand(self.loop, lambda dy, a, b: (self.loop(dy, b.mT), self.loop(a.mT, dy)), a, b)


@benign()
class Sequential(Looped):
    """One product after the other, in order: the order with the largest honest error."""

    def loop(self, a: Tensor, b: Tensor) -> Tensor:
        """See `Looped.loop`."""
        total = a[..., :1] * b[..., :1, :]
        for k in range(1, a.shape[-1]):
            total = total + a[..., k : k + 1] * b[..., k : k + 1, :]
        return total


@benign()
class FusedMultiplyAdd(Looped):
    """In order, each product and sum rounded once: float64 holds a float32 product exactly."""

    def loop(self, a: Tensor, b: Tensor) -> Tensor:
        """See `Looped.loop`."""
        left, right = a.double(), b.double()
        total = (left[..., :1] * right[..., :1, :]).float()
        for k in range(1, a.shape[-1]):
            total = (total.double() + left[..., k : k + 1] * right[..., k : k + 1, :]).float()
        return total


@benign()
class Pairwise(Looped):
    """Adds neighbours, then their sums, as a tree."""

    def loop(self, a: Tensor, b: Tensor) -> Tensor:
        """See `Looped.loop`."""
        terms = [a[..., k : k + 1] * b[..., k : k + 1, :] for k in range(a.shape[-1])]
        while len(terms) > 1:
            odd = terms[len(terms) // 2 * 2 :]
            terms = [left + right for left, right in zip(terms[::2], terms[1::2], strict=False)] + odd
        return terms[0]


@benign()
class Wide(OwnProduct):
    """Accumulates in float64 and rounds once: more precise than promised."""

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """See `OwnProduct.product`."""
        return (a.double() @ b.double()).float()


@benign()
class FusedExpert(OwnProduct):
    """Everything inside an expert stays in float32; only its result is stored."""

    def expert(self, x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
        """See `OwnProduct.expert`."""
        wide = x.float()
        hidden = self.activate(wide @ w1.float().mT) * (wide @ w3.float().mT)
        return (hidden @ w2.float().mT).to(x.dtype)


@benign()
class WideFused(OwnProduct):
    """A whole expert in float64, rounded once."""

    def expert(self, x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
        """See `OwnProduct.expert`."""
        wide = x.double()
        hidden = self.activate(wide @ w1.double().mT) * (wide @ w3.double().mT)
        return (hidden @ w2.double().mT).to(x.dtype)


@benign()
class PackedProjections(OwnProduct):
    """Gate and up projection as one product."""

    def expert(self, x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
        """See `OwnProduct.expert`."""
        g, u = (x @ torch.cat([w1, w3], -2).mT).chunk(2, -1)
        return (self.activate(g) * u) @ w2.mT


@benign()
class Transposed(OwnProduct):
    """All products with their operands exchanged."""

    def expert(self, x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
        """See `OwnProduct.expert`."""
        return (w2 @ (self.activate(w1 @ x.mT) * (w3 @ x.mT))).mT


@benign()
class PaddedBatch(OwnProduct):
    """Experts as one batched product over rows that are padded to the busiest."""

    def stored(self, x: Tensor, w: Tensor) -> Tensor:
        """See `OwnProduct.stored`."""
        return torch.bmm(x, w.mT)


@benign()
class TokensInChunks(OwnProduct):
    """The rows of each expert in chunks of five, whose weight gradients are added in float32."""

    def expert(self, x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
        """See `OwnProduct.expert`."""
        whole = super().expert
        wide = [w.float() for w in (w1, w3, w2)]
        return torch.cat([whole(part, *wide) for part in x.split(5, -2)], -2)


@benign()
class PermutedExperts(Parts):
    """The experts are computed in another order and put back."""

    def experts(self, x_RD: Tensor, counts_E: Tensor, weights: ExpertWeights) -> Tensor:
        """See `MoEOps.experts`."""
        order = torch.arange(len(counts_E) - 1, -1, -1, device=x_RD.device)
        rows = torch.arange(len(x_RD), device=x_RD.device).split(counts_E.tolist())
        forth = torch.cat([rows[e] for e in order.tolist()])
        y_RD = super().experts(x_RD[forth], counts_E[order], ExpertWeights(*(w[order] for w in weights)))
        return torch.zeros_like(y_RD).index_copy(0, forth, y_RD)


@benign()
class AddsByIndex(Parts):
    """Combine adds rows to tokens in float32, in the order of the experts."""

    def combine(self, y_RD: Tensor, weights_TK: Tensor, slot_R: Tensor, num_tokens: int) -> Tensor:
        """See `MoEOps.combine`."""
        slot_R = slot_R.long()  # torch does not index by all dtypes of the protocol
        terms = y_RD.float() * weights_TK.reshape(-1)[slot_R, None].float()
        total = torch.zeros(num_tokens, y_RD.shape[1], device=y_RD.device)
        return total.index_add(0, slot_R // max(1, weights_TK.shape[1]), terms).to(y_RD.dtype)


@benign()
class WideCombine(Parts):
    """Combine multiplies and adds in float64."""

    def combine(self, y_RD: Tensor, weights_TK: Tensor, slot_R: Tensor, num_tokens: int) -> Tensor:
        """See `MoEOps.combine`."""
        rows, weights = by_token(y_RD, weights_TK, slot_R)
        return torch.einsum("tk,tkd->td", weights.double(), rows.double()).to(y_RD.dtype)


@benign()
class PlainDispatch(Parts):
    """Dispatch by plain indexing of float32 rows, whose gradients torch adds up."""

    def dispatch(self, x_TD: Tensor, experts_TK: Tensor, num_experts: int, *, capacity: int | None = None) -> Dispatch:
        """See `MoEOps.dispatch`."""
        sent = super().dispatch(x_TD.detach(), experts_TK, num_experts, capacity=capacity)
        rows = x_TD.float()[sent.slot_R // max(1, experts_TK.shape[1])]
        return sent._replace(x_RD=rows.to(x_TD.dtype))


class OtherScores(Parts):
    """A router with another form of the scores or the weights."""

    def scores(self, logits_TE: Tensor, spec: RouterSpec) -> Tensor:
        """Return the scores in float32."""
        return logits_TE.softmax(-1) if spec.score == "softmax" else logits_TE.sigmoid()

    def weights(self, out: Routing, spec: RouterSpec) -> Tensor:
        """Return the weights of the chosen."""
        return chosen_weights(out.scores_TE, out.experts_TK, spec, out.weights_TK.dtype)

    def route(
        self, x_TD: Tensor, gate_ED: Tensor, spec: RouterSpec, bias_E: Tensor | None = None, *,
        experts_TK: Tensor | None = None,
    ) -> Routing:  # fmt: skip
        """See `MoEOps.route`."""
        out = self.honest.route(x_TD, gate_ED, spec, bias_E, experts_TK=experts_TK)
        out = out._replace(scores_TE=self.scores(out.logits_TE.float(), spec))
        return out._replace(weights_TK=self.weights(out, spec))


@benign()
class PowersOfTwo(OtherScores):
    """exp as a power of two, and divisions as products with a reciprocal."""

    def scores(self, logits_TE: Tensor, spec: RouterSpec) -> Tensor:
        """See `OtherScores.scores`."""
        scaled = logits_TE * 1.4426950408889634
        if spec.score == "sigmoid":
            return 1.0 / (1.0 + torch.exp2(-scaled))
        powers = torch.exp2(scaled - scaled.amax(-1, keepdim=True)) if scaled.numel() else scaled
        return powers * (1.0 / powers.sum(-1, keepdim=True))


@benign()
class FoldedScale(OtherScores):
    """The scaling factor is folded into the reciprocal of the sum."""

    def weights(self, out: Routing, spec: RouterSpec) -> Tensor:
        """See `OtherScores.weights`."""
        chosen = out.scores_TE.gather(1, out.experts_TK)
        if not spec.normalize:
            return (chosen * spec.scaling_factor).to(out.weights_TK.dtype)
        factor = spec.scaling_factor / (chosen.sum(-1, keepdim=True) + spec.normalize_epsilon)
        return (chosen * factor).to(out.weights_TK.dtype)


@benign()
class SoftmaxOfChosen(OtherScores):
    """Weights as a softmax over the chosen logits, where that is the same."""

    def weights(self, out: Routing, spec: RouterSpec) -> Tensor:
        """See `OtherScores.weights`."""
        if spec.score != "softmax" or not spec.normalize or spec.normalize_epsilon:
            return super().weights(out, spec)
        chosen = out.logits_TE.float().gather(1, out.experts_TK).softmax(-1)
        return (chosen * spec.scaling_factor).to(out.weights_TK.dtype)


@benign()
class WideLosses(Parts):
    """Both losses in float64."""

    def aux_loss(self, scores_TE: Tensor, experts_TK: Tensor, spec: RouterSpec) -> Tensor:
        """See `MoEOps.aux_loss`."""
        return super().aux_loss(scores_TE.double(), experts_TK, spec).float()

    def z_loss(self, logits_TE: Tensor) -> Tensor:
        """See `MoEOps.z_loss`."""
        return super().z_loss(logits_TE.double()).float()


@benign()
class OneStore(Parts):
    """The routed and the shared output are added in float32 and stored once."""

    def output(
        self, y_RD: Tensor, weights_TK: Tensor, slot_R: Tensor, shared_TD: Tensor | None, num_tokens: int
    ) -> Tensor:
        """See `Parts.output`."""
        total = weighted(y_RD, weights_TK, slot_R).sum(1)
        return (total if shared_TD is None else total + shared_TD.float()).to(y_RD.dtype)


class InThreads(Parts):
    """The portable operators, in another number of threads."""

    threads = 1

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name in ("route", "dispatch", "experts", "combine", "aux_loss", "z_loss", "layer"):
            torch.set_num_threads(super().__getattribute__("threads"))
        return found


@benign()
class OneThread(InThreads):
    """One thread."""


@benign()
class ThreeThreads(InThreads):
    """Three threads, which no size here is a multiple of."""

    threads = 3
