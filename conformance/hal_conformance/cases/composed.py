# SPDX-License-Identifier: Apache-2.0
"""A layer's case, where the layer is made of an implementation's other operators: they follow one another, as in use.

A case of one operator runs that one alone. Two that share a workspace, so that one's backward pass finds there what the
other's next call has left, are right in each of their own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hal.moe.model_spec import MoEModelSpec
from hal.moe.ops import ExpertWeights, LayerOutput, LayerWeights
from hal_conformance.case import Params
from hal_conformance.cases.base import fields_of
from hal_conformance.cases.wrapped import Wrapped

if TYPE_CHECKING:
    import torch


class Composed(Wrapped):
    """The case `inner` of a layer, for one preset, with the layer that an implementation's operators make."""

    @property
    def what(self) -> str:
        """See `Case.what`."""
        return (
            f"As {self.inner.name}, of a layer that is made of the operators: route, dispatch, experts, combine, the "
            f"losses, and the shared experts as a group of one expert. {self.inner.what}"
        )

    @property
    def needs(self) -> tuple[str, ...]:
        """See `Case.needs`."""
        return ("route", "dispatch", "experts", "combine", "aux_loss", "z_loss")

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """See `Case.run`."""
        return super().run(_OfOperators(ops), tensors, p)


class _OfOperators:
    def __init__(self, ops: Any) -> None:
        self._ops = ops

    def layer(
        self, x_TD: torch.Tensor, weights: LayerWeights, spec: MoEModelSpec, *, experts_TK: torch.Tensor | None = None
    ) -> LayerOutput:
        """See `MoEOps.layer`."""
        ops, router = self._ops, spec.router
        routing = ops.route(x_TD, weights.gate_ED, router, weights.bias_E, experts_TK=experts_TK)
        routed = fields_of(routing, "Routing")
        sent = fields_of(ops.dispatch(x_TD, routed["experts_TK"], router.num_experts), "Dispatch")
        y_RD = ops.experts(sent["x_RD"], sent["counts_E"], weights.experts)
        y_TD = ops.combine(y_RD, routed["weights_TK"], sent["slot_R"], len(x_TD))
        if weights.shared is not None:
            all_E = sent["counts_E"].new_tensor([len(x_TD)])
            y_TD = y_TD + ops.experts(x_TD, all_E, ExpertWeights(*(weight[None] for weight in weights.shared)))
        aux_loss = ops.aux_loss(routed["scores_TE"], routed["experts_TK"], router)
        return LayerOutput(y_TD, routing, aux_loss, ops.z_loss(routed["logits_TE"]))
