# SPDX-License-Identifier: Apache-2.0
"""Faults of the router."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hal.moe.ops import Routing
from hal.moe.router_spec import RouterSpec
from hal.moe.routing import largest
from hal_conformance.faults.catalogue import fault
from hal_conformance.faults.parts import Alone, Parts, chosen_weights, gradient_of


class OtherSpec(Parts):
    """A router that follows another specification."""

    def changed(self, spec: RouterSpec) -> RouterSpec:
        """Return the specification that is followed."""
        raise NotImplementedError

    def route(
        self, x_TD: Tensor, gate_ED: Tensor, spec: RouterSpec, bias_E: Tensor | None = None, **given: Any
    ) -> Routing:
        """See `MoEOps.route`."""
        return self.honest.route(x_TD, gate_ED, self.changed(spec), bias_E, **given)


@fault("vllm PR#31246")
class SkipsRenormalisation(OtherSpec):
    """`normalize` is ignored."""

    def changed(self, spec: RouterSpec) -> RouterSpec:
        """See `OtherSpec.changed`."""
        return replace(spec, normalize=False)


@fault()
class DropsEpsilon(OtherSpec):
    """The epsilon is left out of the sum."""

    def changed(self, spec: RouterSpec) -> RouterSpec:
        """See `OtherSpec.changed`."""
        return replace(spec, normalize_epsilon=0.0)


@fault("vllm PR#13474")
class MasksWithZero(OtherSpec):
    """Experts of groups that are not chosen score 0.0 instead of -inf."""

    def changed(self, spec: RouterSpec) -> RouterSpec:
        """See `OtherSpec.changed`."""
        return replace(spec, masked_score=0.0)


@fault("vllm PR#13474")
class GroupsByMaximum(OtherSpec):
    """A group is scored by its best expert instead of its two best."""

    def changed(self, spec: RouterSpec) -> RouterSpec:
        """See `OtherSpec.changed`."""
        return replace(spec, group_score="max")


class AfterRoute(Parts):
    """A router whose result is changed."""

    def change(self, out: Routing, x_TD: Tensor, spec: RouterSpec, bias_E: Tensor | None, replayed: bool) -> Routing:
        """Return the changed result."""
        raise NotImplementedError

    def route(
        self, x_TD: Tensor, gate_ED: Tensor, spec: RouterSpec, bias_E: Tensor | None = None, *,
        experts_TK: Tensor | None = None,
    ) -> Routing:  # fmt: skip
        """See `MoEOps.route`."""
        out = self.honest.route(x_TD, gate_ED, spec, bias_E, experts_TK=experts_TK)
        return self.change(out, x_TD, spec, bias_E, experts_TK is not None)


@fault("vllm PR#12002")
class LeaksBias(AfterRoute):
    """The selection bias gets into the weights."""

    def change(self, out: Routing, x_TD: Tensor, spec: RouterSpec, bias_E: Tensor | None, replayed: bool) -> Routing:
        """See `AfterRoute.change`."""
        if bias_E is None:
            return out
        weights = chosen_weights(out.scores_TE + bias_E, out.experts_TK, spec, out.weights_TK.dtype)
        return out._replace(weights_TK=weights)


@fault()
class OrdersByScore(AfterRoute):
    """The right set, ordered by the scores without the bias."""

    def change(self, out: Routing, x_TD: Tensor, spec: RouterSpec, bias_E: Tensor | None, replayed: bool) -> Routing:
        """See `AfterRoute.change`."""
        if replayed or bias_E is None:
            return out
        order = out.scores_TE.detach().gather(1, out.experts_TK).argsort(dim=1, descending=True, stable=True)
        return out._replace(
            experts_TK=out.experts_TK.gather(1, order), weights_TK=out.weights_TK.gather(1, order)
        )  # fmt: skip


@fault()
class AscendingChoices(AfterRoute):
    """The choices come in ascending order of score."""

    def change(self, out: Routing, x_TD: Tensor, spec: RouterSpec, bias_E: Tensor | None, replayed: bool) -> Routing:
        """See `AfterRoute.change`."""
        if replayed:
            return out
        return out._replace(experts_TK=out.experts_TK.flip(1), weights_TK=out.weights_TK.flip(1))


@fault("sglang PR#30079")
class HugeTokensEverywhere(AfterRoute):
    """Tokens with a logit beyond 60 go to the first experts with equal weights."""

    def change(self, out: Routing, x_TD: Tensor, spec: RouterSpec, bias_E: Tensor | None, replayed: bool) -> Routing:
        """See `AfterRoute.change`."""
        hot = (out.logits_TE.abs().amax(1) > 60)[:, None] if out.logits_TE.numel() else out.logits_TE[:, :1] > 0
        first = torch.arange(spec.top_k, device=x_TD.device).expand_as(out.experts_TK)
        return out._replace(
            experts_TK=torch.where(hot, first, out.experts_TK),
            weights_TK=torch.where(hot, torch.full_like(out.weights_TK, 1 / spec.top_k), out.weights_TK),
        )


@fault()
class FlushesScores(AfterRoute):
    """Scores below 1e-30 are flushed to zero, though float32 has normal numbers there."""

    def change(self, out: Routing, x_TD: Tensor, spec: RouterSpec, bias_E: Tensor | None, replayed: bool) -> Routing:
        """See `AfterRoute.change`."""
        return out._replace(scores_TE=out.scores_TE * (out.scores_TE > 1e-30))


@fault()
class TailOfTokens(AfterRoute):
    """The weights of the tokens beyond the last multiple of 16 are zero."""

    def change(self, out: Routing, x_TD: Tensor, spec: RouterSpec, bias_E: Tensor | None, replayed: bool) -> Routing:
        """See `AfterRoute.change`."""
        whole = torch.arange(len(x_TD), device=x_TD.device) < len(x_TD) // 16 * 16
        return out._replace(weights_TK=out.weights_TK * whole[:, None].to(out.weights_TK.dtype))


@fault("MetaX vLLM-metax#270")
class SoftmaxForSigmoid(AfterRoute):
    """The first token's scores are a softmax where the router asks for a sigmoid."""

    def change(self, out: Routing, x_TD: Tensor, spec: RouterSpec, bias_E: Tensor | None, replayed: bool) -> Routing:
        """See `AfterRoute.change`."""
        if spec.score != "sigmoid":
            return out
        softmax = out.logits_TE.float().softmax(-1)
        scores = torch.cat([softmax[:1], out.scores_TE[1:]])
        return out._replace(scores_TE=scores)


@fault()
class WeightsWithoutScale(AfterRoute):
    """The scaling factor is left out of the gradient of the weights."""

    def change(self, out: Routing, x_TD: Tensor, spec: RouterSpec, bias_E: Tensor | None, replayed: bool) -> Routing:
        """See `AfterRoute.change`."""
        return out._replace(weights_TK=gradient_of(out.weights_TK, out.weights_TK / spec.scaling_factor))


@fault("transformers#48687")
class LosesATokenOfTheGate(AfterRoute):
    """The gradient of the gate misses one token."""

    def change(self, out: Routing, x_TD: Tensor, spec: RouterSpec, bias_E: Tensor | None, replayed: bool) -> Routing:
        """See `AfterRoute.change`."""
        keep = torch.ones_like(out.weights_TK[:, :1])
        keep[len(keep) // 2 : len(keep) // 2 + 1] = 0
        return out._replace(weights_TK=gradient_of(out.weights_TK, out.weights_TK * keep))


@fault()
class DiagonalSoftmax(AfterRoute):
    """The gradient of the softmax is its diagonal alone."""

    def change(self, out: Routing, x_TD: Tensor, spec: RouterSpec, bias_E: Tensor | None, replayed: bool) -> Routing:
        """See `AfterRoute.change`."""
        if spec.score != "softmax":
            return out
        scores = out.scores_TE.detach()
        slope = scores * (1 - scores) * out.logits_TE.float()
        own = gradient_of(scores, slope)
        return out._replace(scores_TE=own, weights_TK=chosen_weights(own, out.experts_TK, spec, out.weights_TK.dtype))


@fault()
class ConstantNormaliser(AfterRoute):
    """The sum that normalises the weights carries no gradient."""

    def change(self, out: Routing, x_TD: Tensor, spec: RouterSpec, bias_E: Tensor | None, replayed: bool) -> Routing:
        """See `AfterRoute.change`."""
        if not spec.normalize:
            return out
        chosen = out.scores_TE.gather(1, out.experts_TK)
        total = (chosen.sum(-1, keepdim=True) + spec.normalize_epsilon).detach()
        return out._replace(weights_TK=(chosen / total * spec.scaling_factor).to(out.weights_TK.dtype))


@fault("sglang#37133")
class BiasInBfloat16(Parts):
    """The selection bias is kept in bfloat16, whose steps near 7 are 1/32."""

    def route(
        self, x_TD: Tensor, gate_ED: Tensor, spec: RouterSpec, bias_E: Tensor | None = None, **given: Any
    ) -> Routing:
        """See `MoEOps.route`."""
        low = None if bias_E is None else bias_E.bfloat16().float()
        return self.honest.route(x_TD, gate_ED, spec, low, **given)


@fault("pytorch#127196")
class HigherIndexFirst(Parts):
    """Equal scores go to the higher index."""

    def route(
        self, x_TD: Tensor, gate_ED: Tensor, spec: RouterSpec, bias_E: Tensor | None = None, *,
        experts_TK: Tensor | None = None,
    ) -> Routing:  # fmt: skip
        """See `MoEOps.route`."""
        last = spec.num_experts - 1
        out = self.honest.route(
            x_TD, gate_ED.flip(0), spec, None if bias_E is None else bias_E.flip(0),
            experts_TK=None if experts_TK is None else last - experts_TK,
        )  # fmt: skip
        return Routing(out.logits_TE.flip(1), out.scores_TE.flip(1), last - out.experts_TK, out.weights_TK)


@fault("vllm PR#55514")
class GroupsWithoutBias(Parts):
    """Groups are scored without the selection bias."""

    def route(
        self, x_TD: Tensor, gate_ED: Tensor, spec: RouterSpec, bias_E: Tensor | None = None, *,
        experts_TK: Tensor | None = None,
    ) -> Routing:  # fmt: skip
        """See `MoEOps.route`."""
        out = self.honest.route(x_TD, gate_ED, spec, bias_E, experts_TK=experts_TK)
        if experts_TK is not None or bias_E is None or spec.num_groups == 1:
            return out
        scores = out.scores_TE.detach()
        groups = scores.view(len(scores), spec.num_groups, spec.group_size).topk(2, -1).values.sum(-1)
        kept = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, largest(groups, spec.top_groups), True)
        masked = (scores + bias_E).masked_fill(~kept.repeat_interleave(spec.group_size, 1), -math.inf)
        return self.honest.route(x_TD, gate_ED, spec, bias_E, experts_TK=largest(masked, spec.top_k))


@fault("AstrAI PR#57")
class ChoosesInBfloat16(Parts):
    """The scores are rounded to bfloat16 before the choice."""

    def route(
        self, x_TD: Tensor, gate_ED: Tensor, spec: RouterSpec, bias_E: Tensor | None = None, *,
        experts_TK: Tensor | None = None,
    ) -> Routing:  # fmt: skip
        """See `MoEOps.route`."""
        out = self.honest.route(x_TD, gate_ED, spec, bias_E, experts_TK=experts_TK)
        if experts_TK is not None or spec.num_groups > 1:
            return out
        low = (out.scores_TE.detach() + (0.0 if bias_E is None else bias_E)).bfloat16().float()
        return self.honest.route(x_TD, gate_ED, spec, bias_E, experts_TK=largest(low, spec.top_k))


@fault("prime-rl PR#2952")
class LowGate(Parts):
    """The gate's product is rounded to bfloat16 where the router asks for float32."""

    def route(
        self, x_TD: Tensor, gate_ED: Tensor, spec: RouterSpec, bias_E: Tensor | None = None, **given: Any
    ) -> Routing:
        """See `MoEOps.route`."""
        x_TD, gate_ED = x_TD.bfloat16().to(x_TD.dtype), gate_ED.bfloat16().to(gate_ED.dtype)
        return self.honest.route(x_TD, gate_ED, spec, bias_E, **given)


@fault()
class IgnoresReplay(Alone):
    """`route` chooses by itself when a routing is given; the layer does not."""

    def route(
        self, x_TD: Tensor, gate_ED: Tensor, spec: RouterSpec, bias_E: Tensor | None = None, *,
        experts_TK: Tensor | None = None,
    ) -> Routing:  # fmt: skip
        """See `MoEOps.route`."""
        return self.honest.route(x_TD, gate_ED, spec, bias_E)


@fault()
class RouteWithoutGradient(Alone):
    """`route` alone carries no gradient; the layer's does."""

    def route(
        self, x_TD: Tensor, gate_ED: Tensor, spec: RouterSpec, bias_E: Tensor | None = None, **given: Any
    ) -> Routing:
        """See `MoEOps.route`."""
        with torch.no_grad():
            return self.honest.route(x_TD, gate_ED, spec, bias_E, **given)


@fault("megatron-core: the softmax before top-k is in the logits' dtype")
class ChoosesAmongRoundedScores(Parts):
    """The choice is made among scores in bfloat16; the weights are those of the float32 scores."""

    def route(
        self, x_TD: Tensor, gate_ED: Tensor, spec: RouterSpec, bias_E: Tensor | None = None, *,
        experts_TK: Tensor | None = None,
    ) -> Routing:  # fmt: skip
        """See `MoEOps.route`."""
        honest = self.honest.route(x_TD, gate_ED, spec, bias_E, experts_TK=experts_TK)
        if experts_TK is not None or spec.num_groups > 1:
            return honest
        rounded = honest.scores_TE.detach().bfloat16().float()
        chosen = largest(rounded if bias_E is None else rounded + bias_E, spec.top_k)
        return self.honest.route(x_TD, gate_ED, spec, bias_E, experts_TK=chosen)


@fault()
class SecondBestByValue(AfterRoute):
    """A group's second best is sought among what is not equal to its best: of two equal ones it loses both."""

    def change(self, out: Routing, x_TD: Tensor, spec: RouterSpec, bias_E: Tensor | None, replayed: bool) -> Routing:
        """See `AfterRoute.change`."""
        if replayed or spec.group_score != "top2_sum" or spec.num_groups == 1:
            return out
        scores = out.scores_TE.detach() + (0 if bias_E is None else bias_E)
        grouped = scores.view(-1, spec.num_groups, spec.group_size)
        best = grouped.amax(-1, keepdim=True)
        second = grouped.masked_fill(grouped == best, -torch.inf).amax(-1)
        kept = torch.zeros_like(second, dtype=torch.bool)
        kept.scatter_(1, largest(best[..., 0] + second, spec.top_groups), True)
        masked = scores.masked_fill(~kept.repeat_interleave(spec.group_size, 1), spec.masked_score)
        experts = largest(masked, spec.top_k)
        weights = chosen_weights(out.scores_TE, experts, spec, out.weights_TK.dtype)
        return out._replace(experts_TK=experts, weights_TK=weights)
