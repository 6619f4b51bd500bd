# SPDX-License-Identifier: Apache-2.0
"""Faults of a layer whose operators are right one by one."""

from __future__ import annotations

import torch
from torch import Tensor

from hal.moe.model_spec import MoEModelSpec
from hal.moe.ops import LayerOutput, LayerWeights
from hal_conformance.faults.catalogue import fault
from hal_conformance.faults.parts import Parts, combined_in_any_order, gradient_of


class AfterLayer(Parts):
    """A layer whose result is changed."""

    def change(self, out: LayerOutput, x_TD: Tensor, spec: MoEModelSpec) -> LayerOutput:
        """Return the changed result."""
        raise NotImplementedError

    def layer(
        self, x_TD: Tensor, weights: LayerWeights, spec: MoEModelSpec, *, experts_TK: Tensor | None = None,
        capacity: int | None = None,
    ) -> LayerOutput:  # fmt: skip
        """See `MoEOps.layer`."""
        out = super().layer(x_TD, weights, spec, experts_TK=experts_TK, capacity=capacity)
        return self.change(out, x_TD, spec) if len(x_TD) else out


@fault()
class AuxOfChosen(AfterLayer):
    """The layer's balance loss averages over the chosen scores alone."""

    def change(self, out: LayerOutput, x_TD: Tensor, spec: MoEModelSpec) -> LayerOutput:
        """See `AfterLayer.change`."""
        routing = out.routing
        chosen = torch.zeros_like(routing.scores_TE).scatter(1, routing.experts_TK, 1.0)
        return out._replace(aux_loss=self.aux_loss(routing.scores_TE * chosen, routing.experts_TK, spec.router))


@fault("Megatron-LM#3672")
class HalfTheBalance(AfterLayer):
    """The balance loss reaches the router with half of its gradient."""

    def change(self, out: LayerOutput, x_TD: Tensor, spec: MoEModelSpec) -> LayerOutput:
        """See `AfterLayer.change`."""
        return out._replace(aux_loss=gradient_of(out.aux_loss, 0.5 * out.aux_loss))


@fault()
class ScoresOfAnotherStage(AfterLayer):
    """The layer returns scores that are already scaled."""

    def change(self, out: LayerOutput, x_TD: Tensor, spec: MoEModelSpec) -> LayerOutput:
        """See `AfterLayer.change`."""
        return out._replace(routing=out.routing._replace(scores_TE=out.routing.scores_TE * 1.001))


@fault("vllm-ascend#6710")
class ReducesTwice(AfterLayer):
    """The last token's output is added twice."""

    def change(self, out: LayerOutput, x_TD: Tensor, spec: MoEModelSpec) -> LayerOutput:
        """See `AfterLayer.change`."""
        return out._replace(y_TD=torch.cat([out.y_TD[:-1], 2 * out.y_TD[-1:]]))


@fault("vllm#57016")
class DependsOnBatchmates(AfterLayer):
    """The output of every token depends on the mean of the batch, slightly."""

    def change(self, out: LayerOutput, x_TD: Tensor, spec: MoEModelSpec) -> LayerOutput:
        """See `AfterLayer.change`."""
        return out._replace(y_TD=out.y_TD + (x_TD.mean(0) * 2.0**-6).to(out.y_TD.dtype))


@fault()
class SharedSlightlyOff(Parts):
    """The shared experts' output is too small by 2**-8."""

    def shared(self, x_TD: Tensor, weights: LayerWeights) -> Tensor | None:
        """See `Parts.shared`."""
        y_TD = super().shared(x_TD, weights)
        return None if y_TD is None else y_TD * (1 - 2.0**-8)


@fault("Megatron-LM PR#5718")
class AnotherOrderEachTime(Parts):
    """Combine adds the choices in an order that changes from call to call, as atomic additions do."""

    def combine(self, y_RD: Tensor, weights_TK: Tensor, slot_R: Tensor, num_tokens: int) -> Tensor:
        """See `MoEOps.combine`."""
        return combined_in_any_order(y_RD, weights_TK, slot_R, num_tokens)


@fault()
class IgnoresCapacity(Parts):
    """The layer takes every row, whatever the capacity."""

    def layer(
        self, x_TD: Tensor, weights: LayerWeights, spec: MoEModelSpec, *, experts_TK: Tensor | None = None,
        capacity: int | None = None,
    ) -> LayerOutput:  # fmt: skip
        """See `MoEOps.layer`."""
        return super().layer(x_TD, weights, spec, experts_TK=experts_TK)


@fault()
class ReplaysWithOwnWeights(Parts):
    """With a replayed routing the weights are those of the layer's own choice."""

    def layer(
        self, x_TD: Tensor, weights: LayerWeights, spec: MoEModelSpec, *, experts_TK: Tensor | None = None,
        capacity: int | None = None,
    ) -> LayerOutput:  # fmt: skip
        """See `MoEOps.layer`."""
        if experts_TK is None:
            return super().layer(x_TD, weights, spec, capacity=capacity)
        own = self.route(x_TD, weights.gate_ED, spec.router, weights.bias_E)
        sent = self.dispatch(x_TD, experts_TK, spec.router.num_experts, capacity=capacity)
        y_RD = self.experts(sent.x_RD, sent.counts_E, weights.experts)
        y_TD = self.output(y_RD, own.weights_TK, sent.slot_R, self.shared(x_TD, weights), len(x_TD))
        aux = self.aux_loss(own.scores_TE, experts_TK, spec.router)
        return LayerOutput(y_TD, own._replace(experts_TK=experts_TK), aux, self.z_loss(own.logits_TE))
