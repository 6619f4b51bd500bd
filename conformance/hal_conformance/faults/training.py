# SPDX-License-Identifier: Apache-2.0
"""Faults that show in training alone: a term, a row or an expert of a gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hal.moe.model_spec import MoEModelSpec
from hal.moe.ops import ExpertWeights, LayerOutput, LayerWeights, SharedWeights
from hal_conformance.faults.catalogue import fault
from hal_conformance.faults.parts import OwnProduct, Parts, gradient_of, last_rows, without


class _Silu(torch.autograd.Function):
    """silu with a slope of its own."""

    @staticmethod
    def forward(ctx: Any, g: Tensor) -> Tensor:
        ctx.save_for_backward(g)
        return torch.nn.functional.silu(g)


class _SiluWithoutProduct(_Silu):
    """silu whose slope lacks the term of the product rule."""

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        (g,) = ctx.saved_tensors
        return (dy.float() * g.float().sigmoid()).to(g.dtype)


class _SiluStep(_Silu):
    """silu whose slope is a step beyond 4."""

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        (g,) = ctx.saved_tensors
        wide = g.float()
        sigma = torch.where(wide.abs() > 4, (wide > 0).float(), wide.sigmoid())
        return (dy.float() * sigma * (1 + wide * (1 - sigma))).to(g.dtype)


@fault()
class SlopeWithoutProduct(OwnProduct):
    """The slope of silu lacks x sigma (1 - sigma)."""

    def activate(self, g: Tensor) -> Tensor:
        """See `OwnProduct.activate`."""
        return _SiluWithoutProduct.apply(g)  # type: ignore[no-any-return, no-untyped-call]


@fault()
class SlopeOfSteps(OwnProduct):
    """The slope of silu is 0 or 1 where the gate is beyond 4."""

    def activate(self, g: Tensor) -> Tensor:
        """See `OwnProduct.activate`."""
        return _SiluStep.apply(g)  # type: ignore[no-any-return, no-untyped-call]


@fault()
class SaturatedUp(OwnProduct):
    """The up projection carries no gradient beyond 7."""

    def expert(self, x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
        """See `OwnProduct.expert`."""
        up = self.stored(x, w3)
        return self.stored(self.activate(self.stored(x, w1)) * gradient_of(up, up.clamp(-7, 7)), w2)


@fault()
class RowsWithoutGate(OwnProduct):
    """The gradient of the rows misses the path through the gate."""

    def expert(self, x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
        """See `OwnProduct.expert`."""
        return self.stored(self.activate(self.stored(x.detach(), w1)) * self.stored(x, w3), w2)


@fault("MSLK PR#158")
class LosesARowOfOneGradient(Parts):
    """The gradient of one expert's down projection misses the expert's last row."""

    def experts(self, x_RD: Tensor, counts_E: Tensor, weights: ExpertWeights) -> Tensor:
        """See `MoEOps.experts`."""
        y_RD = super().experts(x_RD, counts_E, weights)
        if not weights.w2_EDF.requires_grad or not len(y_RD):
            return y_RD
        w1, w3, w2 = weights
        rest = super().experts(x_RD, counts_E, ExpertWeights(w1, w3, w2.detach()))
        own = super().experts(x_RD.detach(), counts_E, ExpertWeights(w1.detach(), w3.detach(), w2))
        lost = last_rows(counts_E, counts_E == counts_E.max())[:1]
        return rest + without(own - own.detach(), lost)


@fault()
class AccumulatesGradientsLow(OwnProduct):
    """Weight gradients are accumulated over blocks of four rows in the dtype of the weights."""

    def expert(self, x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
        """See `OwnProduct.expert`."""
        alone = super().expert
        return torch.cat([alone(part, w1, w3, w2) for part in x.split(4, -2)], -2)


@fault("pytorch PR#174314")
class GarbageOfEmptyExperts(Parts):
    """An expert without rows gets a gradient that is not zero."""

    def experts(self, x_RD: Tensor, counts_E: Tensor, weights: ExpertWeights) -> Tensor:
        """See `MoEOps.experts`."""
        y_RD = super().experts(x_RD, counts_E, weights)
        empty = weights.w1_EFD[counts_E == 0]
        if not len(y_RD) or not empty.requires_grad:
            return y_RD
        dirt = (empty - empty.detach()).sum() * 1e-3
        return y_RD + dirt.to(y_RD.dtype)


@fault("torchtitan PR#2416")
class RouterWithoutX(Parts):
    """The router's gradient does not reach the activations."""

    def layer(
        self, x_TD: Tensor, weights: LayerWeights, spec: MoEModelSpec, *, experts_TK: Tensor | None = None,
        capacity: int | None = None,
    ) -> LayerOutput:  # fmt: skip
        """See `MoEOps.layer`."""
        out = super().layer(x_TD, weights, spec, experts_TK=experts_TK, capacity=capacity)
        routing = self.route(
            x_TD.detach(), weights.gate_ED, spec.router, weights.bias_E, experts_TK=out.routing.experts_TK
        )  # fmt: skip
        sent = self.dispatch(x_TD, routing.experts_TK, spec.router.num_experts, capacity=capacity)
        y_RD = self.experts(sent.x_RD, sent.counts_E, weights.experts)
        shared = self.shared(x_TD, weights)
        return out._replace(y_TD=self.output(y_RD, routing.weights_TK, sent.slot_R, shared, len(x_TD)))


@fault()
class HalfTheSharedGate(Parts):
    """The shared experts' gate gets half of its gradient."""

    def shared(self, x_TD: Tensor, weights: LayerWeights) -> Tensor | None:
        """See `Parts.shared`."""
        gate = weights.shared_gate_D
        if gate is not None:
            weights = weights._replace(shared_gate_D=gradient_of(gate, 0.5 * gate))
        return super().shared(x_TD, weights)


@fault()
class SharedOnAllButOne(Parts):
    """The shared experts' down projection is not trained on the first token."""

    def shared(self, x_TD: Tensor, weights: LayerWeights) -> Tensor | None:
        """See `Parts.shared`."""
        y_TD = super().shared(x_TD, weights)
        if y_TD is None or weights.shared is None:
            return y_TD
        w1, w3, w2 = weights.shared
        frozen = super().shared(x_TD, weights._replace(shared=SharedWeights(w1, w3, w2.detach())))
        return y_TD if frozen is None else torch.cat([frozen[:1], y_TD[1:]])
