# SPDX-License-Identifier: Apache-2.0
"""Faults of `route` that no layer shows: what is not finite, gradients of scores and logits, one token, one choice."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hal.moe.ops import Routing
from hal.moe.router_spec import RouterSpec
from hal_conformance.faults.catalogue import fault
from hal_conformance.faults.parts import Alone, chosen_weights, gradient_of, spread_backward


class RouteAlone(Alone):
    """A router whose result is changed, beside a layer that is right."""

    def change(self, out: Routing, x_TD: Tensor, spec: RouterSpec) -> Routing:
        """Return the changed result."""
        raise NotImplementedError

    def route(
        self, x_TD: Tensor, gate_ED: Tensor, spec: RouterSpec, bias_E: Tensor | None = None, *,
        experts_TK: Tensor | None = None,
    ) -> Routing:  # fmt: skip
        """See `MoEOps.route`."""
        return self.change(super().route(x_TD, gate_ED, spec, bias_E, experts_TK=experts_TK), x_TD, spec)


def without_gradient(result: Tensor) -> Tensor:
    """Return a result, whose gradient is taken and comes to nothing."""
    same = result.view_as(result)
    if same.requires_grad:
        same.register_hook(torch.zeros_like)
    return same


@fault()
class SwallowsNan(RouteAlone):
    """Scores and weights that are NaN become zero."""

    def change(self, out: Routing, x_TD: Tensor, spec: RouterSpec) -> Routing:
        """See `RouteAlone.change`."""
        return out._replace(scores_TE=out.scores_TE.nan_to_num(0.0), weights_TK=out.weights_TK.nan_to_num(0.0))


@fault()
class ClampsLogits(RouteAlone):
    """Infinite logits are clamped before the scores, so that a softmax of them looks like any other."""

    def change(self, out: Routing, x_TD: Tensor, spec: RouterSpec) -> Routing:
        """See `RouteAlone.change`."""
        if spec.score != "softmax":
            return out
        scores = out.logits_TE.float().clamp(-1e30, 1e30).softmax(-1)
        weights = chosen_weights(scores, out.experts_TK, spec, out.weights_TK.dtype)
        return out._replace(scores_TE=scores, weights_TK=weights)


@fault()
class NanOfInfiniteSigmoids(RouteAlone):
    """A sigmoid as exp(x) / (1 + exp(x)), guarded against large numbers but not against infinity."""

    def change(self, out: Routing, x_TD: Tensor, spec: RouterSpec) -> Routing:
        """See `RouteAlone.change`."""
        if spec.score != "sigmoid":
            return out
        scores = out.scores_TE.masked_fill(out.logits_TE == torch.inf, torch.nan)
        weights = chosen_weights(scores, out.experts_TK, spec, out.weights_TK.dtype)
        return out._replace(scores_TE=scores, weights_TK=weights)


@fault()
class SpreadsNanToTokens(RouteAlone):
    """A NaN in the gradient of one token's weights reaches all tokens."""

    def change(self, out: Routing, x_TD: Tensor, spec: RouterSpec) -> Routing:
        """See `RouteAlone.change`."""
        return out._replace(weights_TK=spread_backward(out.weights_TK))


@fault()
class IgnoresScoresGradient(RouteAlone):
    """A backward pass of its own takes the gradient of the weights, and leaves that of the scores."""

    def change(self, out: Routing, x_TD: Tensor, spec: RouterSpec) -> Routing:
        """See `RouteAlone.change`."""
        return out._replace(scores_TE=without_gradient(out.scores_TE))


@fault()
class IgnoresLogitsGradient(RouteAlone):
    """A backward pass of its own takes the gradient of the weights, and leaves that of the logits."""

    def change(self, out: Routing, x_TD: Tensor, spec: RouterSpec) -> Routing:
        """See `RouteAlone.change`."""
        return out._replace(logits_TE=without_gradient(out.logits_TE))


@fault()
class DetachedScores(RouteAlone):
    """Scores and logits carry no gradient; the weights do."""

    def change(self, out: Routing, x_TD: Tensor, spec: RouterSpec) -> Routing:
        """See `RouteAlone.change`."""
        return out._replace(scores_TE=out.scores_TE.detach(), logits_TE=out.logits_TE.detach())


@fault()
class WeightsOfTheFirst(RouteAlone):
    """With one token an axis is dropped, and the weights are those of the first K experts."""

    def change(self, out: Routing, x_TD: Tensor, spec: RouterSpec) -> Routing:
        """See `RouteAlone.change`."""
        if len(x_TD) != 1:
            return out
        first = torch.arange(spec.top_k, device=x_TD.device)[None]
        return out._replace(weights_TK=chosen_weights(out.scores_TE, first, spec, out.weights_TK.dtype))


@fault()
class OneChoiceWeighsOne(RouteAlone):
    """With K = 1 the weight is 1, whether the router normalises or not."""

    def change(self, out: Routing, x_TD: Tensor, spec: RouterSpec) -> Routing:
        """See `RouteAlone.change`."""
        return out._replace(weights_TK=torch.ones_like(out.weights_TK)) if spec.top_k == 1 else out


@fault()
class TokensNeedATrainedGate(Alone):
    """Activations have a gradient of zero unless the gate is trained, too."""

    def route(
        self, x_TD: Tensor, gate_ED: Tensor, spec: RouterSpec, bias_E: Tensor | None = None, *,
        experts_TK: Tensor | None = None,
    ) -> Routing:  # fmt: skip
        """See `MoEOps.route`."""
        given = x_TD if gate_ED.requires_grad else gradient_of(x_TD, x_TD * 0)
        return super().route(given, gate_ED, spec, bias_E, experts_TK=experts_TK)


@fault()
class GateNeedsTrainedTokens(Alone):
    """The gate has a gradient of zero unless the activations have one, too."""

    def route(
        self, x_TD: Tensor, gate_ED: Tensor, spec: RouterSpec, bias_E: Tensor | None = None, *,
        experts_TK: Tensor | None = None,
    ) -> Routing:  # fmt: skip
        """See `MoEOps.route`."""
        given = gate_ED if x_TD.requires_grad else gradient_of(gate_ED, gate_ED * 0)
        return super().route(x_TD, given, spec, bias_E, experts_TK=experts_TK)


class OneGradientOnly(RouteAlone):
    """A router that loses the gradient of one of its results where the others have none."""

    of = 0

    def change(self, out: Routing, x_TD: Tensor, spec: RouterSpec) -> Routing:
        """See `RouteAlone.change`."""
        logits, scores, weights = _lose(self.of, out.logits_TE, out.scores_TE, out.weights_TK)
        return out._replace(logits_TE=logits, scores_TE=scores, weights_TK=weights)


class _Lose(torch.autograd.Function):
    """Forward nothing; backward zero, where there is a gradient of one of the tensors and of no other."""

    @staticmethod
    def forward(ctx: Any, of: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.of = of
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        alone = [at for at, gradient in enumerate(gradients) if gradient is not None] == [ctx.of]
        return None, *(None if d is None else d * 0 if alone else d for d in gradients)


def _lose(of: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    lost: tuple[Tensor, ...] = _Lose.apply(of, *tensors)  # type: ignore[no-untyped-call]
    return lost


@fault()
class LosesALonelyLogitsGradient(OneGradientOnly):
    """The gradient of the logits comes to nothing where scores and weights have none."""

    of = 0


@fault()
class LosesALonelyScoresGradient(OneGradientOnly):
    """The gradient of the scores comes to nothing where logits and weights have none."""

    of = 1


class BiasAlone(Alone):
    """A router that takes its bias for another, beside a layer that is right."""

    def bias(self, bias_E: Tensor) -> Tensor:
        """Return the bias that is used."""
        raise NotImplementedError

    def route(
        self, x_TD: Tensor, gate_ED: Tensor, spec: RouterSpec, bias_E: Tensor | None = None, *,
        experts_TK: Tensor | None = None,
    ) -> Routing:  # fmt: skip
        """See `MoEOps.route`."""
        used = None if bias_E is None else self.bias(bias_E)
        return super().route(x_TD, gate_ED, spec, used, experts_TK=experts_TK)


@fault()
class IgnoresInfiniteBias(BiasAlone):
    """A bias of -inf, which switches an expert off, is taken for zero."""

    def bias(self, bias_E: Tensor) -> Tensor:
        """See `BiasAlone.bias`."""
        return torch.where(bias_E.isinf(), 0.0, bias_E)


@fault()
class ClampsTheBias(BiasAlone):
    """The bias is clamped to 8 in size."""

    def bias(self, bias_E: Tensor) -> Tensor:
        """See `BiasAlone.bias`."""
        return bias_E.clamp(-8.0, 8.0)


@fault()
class ReadsTheBiasDensely(BiasAlone):
    """The bias is read as if its elements followed one another."""

    def bias(self, bias_E: Tensor) -> Tensor:
        """See `BiasAlone.bias`."""
        return bias_E.as_strided(bias_E.shape, (1,))


@fault()
class TrainsTheBias(Alone):
    """The bias has the gradient of the weights."""

    def route(
        self, x_TD: Tensor, gate_ED: Tensor, spec: RouterSpec, bias_E: Tensor | None = None, *,
        experts_TK: Tensor | None = None,
    ) -> Routing:  # fmt: skip
        """See `MoEOps.route`."""
        out = super().route(x_TD, gate_ED, spec, bias_E, experts_TK=experts_TK)
        if bias_E is None:
            return out
        return out._replace(weights_TK=out.weights_TK + (bias_E - bias_E.detach()).sum().to(out.weights_TK.dtype))


@fault()
class ReplaysWithoutEpsilon(Alone):
    """The weights of a routing that is replayed are divided by their sum alone."""

    def route(
        self, x_TD: Tensor, gate_ED: Tensor, spec: RouterSpec, bias_E: Tensor | None = None, *,
        experts_TK: Tensor | None = None,
    ) -> Routing:  # fmt: skip
        """See `MoEOps.route`."""
        used = spec if experts_TK is None else replace(spec, normalize_epsilon=0.0)
        return super().route(x_TD, gate_ED, used, bias_E, experts_TK=experts_TK)
