# SPDX-License-Identifier: Apache-2.0
"""Implementations for `--impl`: honest ones that differ in how they sum, and wrong ones that the suite must catch.

They know nothing of the cases. Each wrong one differs from the honest implementation in one small thing.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from hal.moe.ops import Dispatch, ExpertWeights, LayerOutput, LayerWeights, Routing
from hal.moe.torch_ops import TorchMoEOps


def weighted(y_RD, weights_TK, slot_R, num_tokens) -> Tensor:
    """Each token's rows times their weights, [T, K, D] in float32; zeros where a slot has no row."""
    top_k = weights_TK.shape[1]
    rows = y_RD.new_zeros(num_tokens * top_k, y_RD.shape[1]).index_copy(0, slot_R, y_RD).view(num_tokens, top_k, y_RD.shape[1])
    return rows.float() * weights_TK.float()[:, :, None]


class Parts:
    """The honest operators, with a layer that is built from this object's own parts, so that a change reaches it."""

    def __init__(self):
        self.honest = TorchMoEOps()

    def route(self, x_TD, gate_ED, spec, bias_E=None, *, experts_TK=None) -> Routing:
        return self.honest.route(x_TD, gate_ED, spec, bias_E, experts_TK=experts_TK)

    def dispatch(self, x_TD, experts_TK, num_experts, *, capacity=None) -> Dispatch:
        return self.honest.dispatch(x_TD, experts_TK, num_experts, capacity=capacity)

    def experts(self, x_RD, counts_E, weights) -> Tensor:
        return self.honest.experts(x_RD, counts_E, weights)

    def combine(self, y_RD, weights_TK, slot_R, num_tokens) -> Tensor:
        return self.honest.combine(y_RD, weights_TK, slot_R, num_tokens)

    def aux_loss(self, scores_TE, experts_TK, spec) -> Tensor:
        return self.honest.aux_loss(scores_TE, experts_TK, spec)

    def z_loss(self, logits_TE) -> Tensor:
        return self.honest.z_loss(logits_TE)

    def layer(self, x_TD, weights: LayerWeights, spec, *, experts_TK=None, capacity=None) -> LayerOutput:
        routing = self.route(x_TD, weights.gate_ED, spec.router, weights.bias_E, experts_TK=experts_TK)
        sent = self.dispatch(x_TD, routing.experts_TK, spec.router.num_experts, capacity=capacity)
        y_RD = self.experts(sent.x_RD, sent.counts_E, weights.experts)
        y_TD = self.combine(y_RD, routing.weights_TK, sent.slot_R, len(x_TD))
        if weights.shared is not None:
            w1, w3, w2 = (w[None] for w in weights.shared)
            shared = self.experts(x_TD, torch.tensor([len(x_TD)]), ExpertWeights(w1, w3, w2))
            if weights.shared_gate_D is not None:
                shared = (x_TD @ weights.shared_gate_D[:, None]).sigmoid() * shared
            y_TD = y_TD + shared
        aux = self.aux_loss(routing.scores_TE, routing.experts_TK, spec.router)
        return LayerOutput(y_TD, routing, aux, self.z_loss(routing.logits_TE))


class OwnProduct(Parts):
    """Experts one by one, with a matrix product of its own; sums are in float32, stored in the dtype of x."""

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """[M, K] @ [K, N] in float32."""
        raise NotImplementedError

    def experts(self, x_RD, counts_E, weights):
        parts, start = [], 0
        matrices = zip(weights.w1_EFD.unbind(), weights.w3_EFD.unbind(), weights.w2_EDF.unbind(), strict=True)
        for count, (w1, w3, w2) in zip(counts_E.tolist(), matrices, strict=True):
            parts.append(self.expert(x_RD[start : start + count], w1, w3, w2))
            start += count
        return torch.cat(parts)

    def expert(self, x, w1, w3, w2):
        h = torch.nn.functional.silu(self.stored(x, w1)) * self.stored(x, w3)
        return self.stored(h, w2)

    def stored(self, x, w):
        return self.product(x.float(), w.float().t()).to(x.dtype)

    def combine(self, y_RD, weights_TK, slot_R, num_tokens):
        return self.add_choices(weighted(y_RD, weights_TK, slot_R, num_tokens)).to(y_RD.dtype)

    def add_choices(self, terms_TKD):
        return terms_TKD.flip(1).sum(1)


class Reversed(OwnProduct):
    """Sums the inner dimension backwards, and the choices backwards."""

    def product(self, a, b):
        return a.flip(1) @ b.flip(0)


class SplitK(OwnProduct):
    """Sums eight parts of the inner dimension apart, then adds them."""

    def product(self, a, b):
        total = None
        for left, right in zip(a.chunk(8, 1), b.chunk(8, 0), strict=True):
            part = left @ right
            total = part if total is None else total + part
        return total


class Sequential(OwnProduct):
    """One product after the other, in order: the order with the largest honest error."""

    def product(self, a, b):
        total = a[:, :1] * b[:1]
        for k in range(1, a.shape[1]):
            total = total + a[:, k : k + 1] * b[k : k + 1]
        return total


class Wide(OwnProduct):
    """Accumulates in float64 and rounds once: more precise than promised is honest, too."""

    def product(self, a, b):
        return (a.double() @ b.double()).float()


class DropsAToken(Parts):
    """The last row of the busiest expert is lost."""

    def experts(self, x_RD, counts_E, weights):
        y = super().experts(x_RD, counts_E, weights)
        last = int(counts_E.cumsum(0)[int(counts_E.argmax())]) - 1
        return torch.cat([y[:last], torch.zeros_like(y[last : last + 1]), y[last + 1 :]])


class SwapsTwoRows(Parts):
    """Two neighbouring rows of the output change places."""

    def experts(self, x_RD, counts_E, weights):
        y = super().experts(x_RD, counts_E, weights)
        order = torch.arange(len(y))
        if len(y) > 1:
            order[:2] = torch.tensor([1, 0])
        return y[order]


class LeaksBias(Parts):
    """The selection bias gets into the weights (vllm PR#12002)."""

    def route(self, x_TD, gate_ED, spec, bias_E=None, *, experts_TK=None):
        routing = super().route(x_TD, gate_ED, spec, bias_E, experts_TK=experts_TK)
        if bias_E is None:
            return routing
        weights = (routing.scores_TE + bias_E).gather(1, routing.experts_TK)
        if spec.normalize:
            weights = weights / (weights.sum(-1, keepdim=True) + spec.normalize_epsilon)
        return routing._replace(weights_TK=(weights * spec.scaling_factor).to(routing.weights_TK.dtype))


class SkipsRenormalisation(Parts):
    """`renormalize` is ignored (vllm PR#31246)."""

    def route(self, x_TD, gate_ED, spec, bias_E=None, *, experts_TK=None):
        raw = dataclasses.replace(spec, normalize=False)
        return super().route(x_TD, gate_ED, raw, bias_E, experts_TK=experts_TK)


class CombinesInBfloat16(Parts):
    """The sum over choices is kept in bfloat16 (torchtitan#2679)."""

    def combine(self, y_RD, weights_TK, slot_R, num_tokens):
        total = torch.zeros(num_tokens, y_RD.shape[1], dtype=torch.bfloat16)
        for term_TD in weighted(y_RD, weights_TK, slot_R, num_tokens).unbind(1):
            total = total + term_TD.bfloat16()
        return total.to(y_RD.dtype)


class AccumulatesInBfloat16(OwnProduct):
    """Products are added up in bfloat16, in blocks of 16."""

    def product(self, a, b):
        total = torch.zeros(a.shape[0], b.shape[1], dtype=torch.bfloat16)
        for left, right in zip(a.split(16, 1), b.split(16, 0), strict=True):
            total = total + (left @ right).bfloat16()
        return total.float()


class WrongTieOrder(Parts):
    """Equal scores go to the higher index."""

    def route(self, x_TD, gate_ED, spec, bias_E=None, *, experts_TK=None):
        flip = spec.num_experts - 1
        routing = super().route(
            x_TD, gate_ED.flip(0), spec, None if bias_E is None else bias_E.flip(0),
            experts_TK=None if experts_TK is None else flip - experts_TK,
        )  # fmt: skip
        return Routing(
            routing.logits_TE.flip(1), routing.scores_TE.flip(1), flip - routing.experts_TK, routing.weights_TK
        )


class TruncatesStores(OwnProduct):
    """Rounds to 16 bits by cutting off."""

    def product(self, a, b):
        return a @ b

    def stored(self, x, w):
        exact = self.product(x.float(), w.float().t())
        if x.dtype == torch.bfloat16:
            exact = exact + (((exact.detach().view(torch.int32) & -65536).view(torch.float32)) - exact).detach()
        return exact.to(x.dtype)


class TruncatesTheGate(TruncatesStores):
    """As `TruncatesStores`, but in the gate projection alone."""

    def expert(self, x, w1, w3, w2):
        return (torch.nn.functional.silu(self.stored(x, w1)) * (x @ w3.t())) @ w2.t()


class FlipsABit(Parts):
    """The lowest bit of every weight in one matrix of the busiest expert is flipped."""

    def __init__(self, matrix):
        super().__init__()
        self.matrix = matrix

    def experts(self, x_RD, counts_E, weights):
        w = getattr(weights, self.matrix)
        flipped = w.detach().clone()
        flipped.view(torch.int32 if w.dtype == torch.float32 else torch.int16)[int(counts_E.argmax())] ^= 1
        return super().experts(x_RD, counts_E, weights._replace(**{self.matrix: w + (flipped - w.detach())}))


class BiasInBfloat16(Parts):
    """The selection bias is kept in bfloat16, whose steps near 7 are 1/32 (sglang#37133)."""

    def route(self, x_TD, gate_ED, spec, bias_E=None, *, experts_TK=None):
        low = None if bias_E is None else bias_E.bfloat16().float()
        return super().route(x_TD, gate_ED, spec, low, experts_TK=experts_TK)


class LosesTailRow(Parts):
    """The last row of an expert is zero where its count is 1 modulo 16."""

    def experts(self, x_RD, counts_E, weights):
        y = super().experts(x_RD, counts_E, weights)
        keep = torch.ones(len(y), 1, dtype=y.dtype)
        keep[(counts_E.cumsum(0) - 1)[counts_E % 16 == 1]] = 0
        return y * keep


class ReducedInputs(OwnProduct):
    """float32 products whose inputs keep 11 bits, without saying so (TF32)."""

    def product(self, a, b):
        return self.cut(a) @ self.cut(b)

    def cut(self, x):
        return x + (((x.detach().view(torch.int32) + 0x1000) & -0x2000).view(torch.float32) - x).detach()


class ScalesOneExpert(Parts):
    """One expert's output is doubled (FNUZ weights read as OCP)."""

    def experts(self, x_RD, counts_E, weights):
        w2 = weights.w2_EDF * (1 + (torch.arange(len(weights.w2_EDF)) == 3).to(x_RD.dtype))[:, None, None]
        return super().experts(x_RD, counts_E, weights._replace(w2_EDF=w2))


class LosesAGradient(Parts):
    """The weight gradient of the gate projection misses one row."""

    def experts(self, x_RD, counts_E, weights):
        y = super().experts(x_RD, counts_E, weights)
        if not y.requires_grad or len(y) < 2:
            return y
        keep = torch.ones(len(y), 1, dtype=y.dtype)
        keep[1] = 0
        return super().experts(x_RD, counts_E, weights).detach() + (y * keep - (y * keep).detach())


class AuxWithoutK(Parts):
    """The balance loss is not divided by K."""

    def aux_loss(self, scores_TE, experts_TK, spec):
        return super().aux_loss(scores_TE, experts_TK, spec) * spec.top_k


class LosesARowOfOneGradient(Parts):
    """The weight gradient of the down projection misses the last row of one expert, the one with most rows."""

    def experts(self, x_RD, counts_E, weights):
        y = super().experts(x_RD, counts_E, weights)
        if not weights.w2_EDF.requires_grad:
            return y
        last = int(counts_E.cumsum(0)[int(counts_E.argmax())]) - 1
        keep = torch.ones(len(y), 1, dtype=y.dtype)
        keep[last] = 0
        frozen = weights._replace(w2_EDF=weights.w2_EDF.detach())
        inputs_only = super().experts(x_RD, counts_E, frozen)
        weight_only = super().experts(
            x_RD.detach(), counts_E, weights._replace(w1_EFD=weights.w1_EFD.detach(), w3_EFD=weights.w3_EFD.detach())
        )
        return inputs_only + (weight_only - weight_only.detach()) * keep


class LayerChanged(Parts):
    """A layer that differs from its own parts."""

    def layer(self, x_TD, weights, spec, *, experts_TK=None, capacity=None):
        return self.change(super().layer(x_TD, weights, spec, experts_TK=experts_TK, capacity=capacity), spec)


class LayerAuxOfTopK(LayerChanged):
    """The layer's balance loss averages over the chosen scores alone."""

    def change(self, out, spec):
        chosen = torch.zeros_like(out.routing.scores_TE).scatter(1, out.routing.experts_TK, 1.0)
        return out._replace(aux_loss=self.aux_loss(out.routing.scores_TE * chosen, out.routing.experts_TK, spec.router))


class LayerZOfMeans(LayerChanged):
    """The layer's z-loss squares the mean instead of averaging the squares."""

    def change(self, out, spec):
        return out._replace(z_loss=out.routing.logits_TE.float().logsumexp(-1).mean().square())


class FreezesSharedGate(Parts):
    """The shared expert's gate gets half of its gradient."""

    def layer(self, x_TD, weights, spec, *, experts_TK=None, capacity=None):
        gate = weights.shared_gate_D
        if gate is not None:
            weights = weights._replace(shared_gate_D=0.5 * gate + 0.5 * gate.detach())
        return super().layer(x_TD, weights, spec, experts_TK=experts_TK, capacity=capacity)


class FreezesSharedDown(Parts):
    """The shared experts' down projection is not trained on the first token."""

    def layer(self, x_TD, weights, spec, *, experts_TK=None, capacity=None):
        out = super().layer(x_TD, weights, spec, experts_TK=experts_TK, capacity=capacity)
        if weights.shared is None or not out.y_TD.requires_grad:
            return out
        w1, w3, w2 = weights.shared
        frozen = weights._replace(shared=(w1, w3, w2.detach()))
        other = super().layer(x_TD, frozen, spec, experts_TK=experts_TK, capacity=capacity)
        return out._replace(y_TD=torch.cat([other.y_TD[:1], out.y_TD[1:]]))


class UnsortedChoices(Parts):
    """The choices come in ascending order of score."""

    def route(self, x_TD, gate_ED, spec, bias_E=None, *, experts_TK=None):
        routing = super().route(x_TD, gate_ED, spec, bias_E, experts_TK=experts_TK)
        if experts_TK is not None:
            return routing
        return routing._replace(experts_TK=routing.experts_TK.flip(1), weights_TK=routing.weights_TK.flip(1))


class MasksWithZero(Parts):
    """Experts of groups that are not chosen score 0.0 instead of -inf (vllm PR#13474)."""

    def route(self, x_TD, gate_ED, spec, bias_E=None, *, experts_TK=None):
        zero = dataclasses.replace(spec, masked_score=0.0)
        return super().route(x_TD, gate_ED, zero, bias_E, experts_TK=experts_TK)


class IgnoresReplay(Parts):
    """`route` chooses by itself when a routing is given; the layer does not."""

    def route(self, x_TD, gate_ED, spec, bias_E=None, *, experts_TK=None):
        return self.honest.route(x_TD, gate_ED, spec, bias_E)

    def layer(self, *args, **options):
        return self.honest.layer(*args, **options)


class DropsEpsilon(Parts):
    """The epsilon is left out of the sum."""

    def route(self, x_TD, gate_ED, spec, bias_E=None, *, experts_TK=None):
        bare = dataclasses.replace(spec, normalize_epsilon=0.0)
        return super().route(x_TD, gate_ED, bare, bias_E, experts_TK=experts_TK)


class HugeTokensEverywhere(Parts):
    """Tokens with a logit beyond 60 go to the first experts with equal weights."""

    def route(self, x_TD, gate_ED, spec, bias_E=None, *, experts_TK=None):
        out = super().route(x_TD, gate_ED, spec, bias_E, experts_TK=experts_TK)
        hot = (out.logits_TE.abs().amax(1) > 60)[:, None]
        first = torch.arange(spec.top_k).expand_as(out.experts_TK)
        return out._replace(
            experts_TK=torch.where(hot, first, out.experts_TK),
            weights_TK=torch.where(hot, torch.full_like(out.weights_TK, 1 / spec.top_k), out.weights_TK),
        )


class IgnoresCapacity(Parts):
    """The layer takes every row, whatever the capacity."""

    def layer(self, x_TD, weights, spec, *, experts_TK=None, capacity=None):
        return super().layer(x_TD, weights, spec, experts_TK=experts_TK)


class TailOfTokens(Parts):
    """Combine loses the tokens beyond the last multiple of 32."""

    def combine(self, y_RD, weights_TK, slot_R, num_tokens):
        keep = torch.arange(num_tokens) < num_tokens // 32 * 32
        return super().combine(y_RD, weights_TK, slot_R, num_tokens) * keep[:, None].to(y_RD.dtype)


class LosesRowsBeyond64(Parts):
    """The last row of an expert with more than 64 rows is zero."""

    def experts(self, x_RD, counts_E, weights):
        y = super().experts(x_RD, counts_E, weights)
        keep = torch.ones(len(y), 1, dtype=y.dtype)
        keep[(counts_E.cumsum(0) - 1)[counts_E > 64]] = 0
        return y * keep


class SiluTails(OwnProduct):
    """silu through a tanh of 11 bits where the gate is beyond 4."""

    def product(self, a, b):
        return a @ b

    def expert(self, x, w1, w3, w2):
        g = self.stored(x, w1)
        wide = g.float()
        low = ((wide / 2).tanh() * 2048).round() / 2048
        half = torch.where(wide.abs() > 4, 0.5 + 0.5 * low, wide.sigmoid())
        return self.stored((wide * half).to(g.dtype) * self.stored(x, w3), w2)


class ReadsStorage(Parts):
    """Takes for granted that matrices lie in the order of memory."""

    def experts(self, x_RD, counts_E, weights):
        y = super().experts(x_RD, counts_E, weights)
        return y if all(w.is_contiguous() for w in weights) else y * 0


class SpreadsNan(Parts):
    """One NaN row makes all of them NaN."""

    def combine(self, y_RD, weights_TK, slot_R, num_tokens):
        y = super().combine(y_RD, weights_TK, slot_R, num_tokens)
        return y * float("nan") if y_RD.isnan().any() else y


class LowZLoss(Parts):
    """The z-loss is computed in the logits' dtype."""

    def z_loss(self, logits_TE):
        return logits_TE.logsumexp(-1).square().mean().float()


class UntrainedRouter(LayerChanged):
    """The balance loss reaches the router with half of its gradient."""

    def change(self, out, spec):
        return out._replace(aux_loss=0.5 * out.aux_loss + 0.5 * out.aux_loss.detach())


class FailsWithoutTokens(Parts):
    """A launch with no rows."""

    def experts(self, x_RD, counts_E, weights):
        if not len(x_RD):
            raise RuntimeError("invalid configuration argument")
        return super().experts(x_RD, counts_E, weights)


class WritesItsWeights(Parts):
    """The down projection is cleared after it was used in training."""

    def experts(self, x_RD, counts_E, weights):
        if not x_RD.requires_grad:
            return super().experts(x_RD, counts_E, weights)
        y = super().experts(x_RD, counts_E, ExpertWeights(*(w.clone() for w in weights)))
        weights.w2_EDF.data.zero_()
        return y


HONEST = {
    "honest": Parts(),
    "honest_reversed": Reversed(),
    "honest_split_k": SplitK(),
    "honest_sequential": Sequential(),
    "honest_wide": Wide(),
}

WRONG = {
    "drops_a_token": DropsAToken(),
    "swaps_two_rows": SwapsTwoRows(),
    "leaks_bias": LeaksBias(),
    "skips_renormalisation": SkipsRenormalisation(),
    "combines_in_bfloat16": CombinesInBfloat16(),
    "accumulates_in_bfloat16": AccumulatesInBfloat16(),
    "wrong_tie_order": WrongTieOrder(),
    "truncates_stores": TruncatesStores(),
    "truncates_the_gate": TruncatesTheGate(),
    "flips_a_bit_of_w1": FlipsABit("w1_EFD"),
    "flips_a_bit_of_w3": FlipsABit("w3_EFD"),
    "flips_a_bit_of_w2": FlipsABit("w2_EDF"),
    "bias_in_bfloat16": BiasInBfloat16(),
    "loses_tail_row": LosesTailRow(),
    "reduced_inputs": ReducedInputs(),
    "scales_one_expert": ScalesOneExpert(),
    "loses_a_gradient": LosesAGradient(),
    "aux_without_k": AuxWithoutK(),
    "loses_a_row_of_one_gradient": LosesARowOfOneGradient(),
    "layer_aux_of_top_k": LayerAuxOfTopK(),
    "layer_z_of_means": LayerZOfMeans(),
    "freezes_shared_gate": FreezesSharedGate(),
    "freezes_shared_down": FreezesSharedDown(),
    "unsorted_choices": UnsortedChoices(),
    "masks_with_zero": MasksWithZero(),
    "ignores_replay": IgnoresReplay(),
    "drops_epsilon": DropsEpsilon(),
    "huge_tokens_everywhere": HugeTokensEverywhere(),
    "ignores_capacity": IgnoresCapacity(),
    "tail_of_tokens": TailOfTokens(),
    "loses_rows_beyond_64": LosesRowsBeyond64(),
    "silu_tails": SiluTails(),
    "reads_storage": ReadsStorage(),
    "spreads_nan": SpreadsNan(),
    "low_z_loss": LowZLoss(),
    "untrained_router": UntrainedRouter(),
}

globals().update(HONEST)
globals().update(WRONG)
fails_without_tokens = FailsWithoutTokens()
writes_its_weights = WritesItsWeights()
