# SPDX-License-Identifier: Apache-2.0
"""Faults of `route` that no layer shows: what is not finite, gradients of scores and logits, one token, one choice."""

from __future__ import annotations

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
