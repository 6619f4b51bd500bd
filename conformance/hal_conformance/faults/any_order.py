# SPDX-License-Identifier: Apache-2.0
"""Single operators that add in another order each time, while the layer, which is fused, does not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hal.moe.ops import Dispatch, Routing
from hal.moe.router_spec import RouterSpec
from hal_conformance.faults.catalogue import fault
from hal_conformance.faults.parts import Alone, combined_in_any_order


@fault()
class CombinesInAnyOrder(Alone):
    """Combine, called alone, adds the choices in another order each time."""

    def combine(self, y_RD: Tensor, weights_TK: Tensor, slot_R: Tensor, num_tokens: int) -> Tensor:
        """See `MoEOps.combine`."""
        return combined_in_any_order(y_RD, weights_TK, slot_R, num_tokens)


@fault()
class WeightGradientInAnyOrder(Alone):
    """The gradient of a routing weight sums over the width in another order each time."""

    def combine(self, y_RD: Tensor, weights_TK: Tensor, slot_R: Tensor, num_tokens: int) -> Tensor:
        """See `MoEOps.combine`."""
        order = torch.randperm(y_RD.shape[1], device=y_RD.device)
        return super().combine(y_RD[:, order], weights_TK, slot_R, num_tokens)[:, order.argsort()]


class _Copies(torch.autograd.Function):
    """K copies of x; backward their gradients are added in float32, in any order."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, top_k: int) -> Tensor:
        return x_TD[None].repeat(top_k, 1, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        total = torch.zeros_like(gradient[0], dtype=torch.float32)
        for k in torch.randperm(len(gradient)).tolist():
            total = total + gradient[k].float()
        return total.to(gradient.dtype), None


@fault()
class DispatchGradientInAnyOrder(Alone):
    """The gradient of a dispatched token adds its rows in another order each time."""

    def dispatch(self, x_TD: Tensor, experts_TK: Tensor, num_experts: int, *, capacity: int | None = None) -> Dispatch:
        """See `MoEOps.dispatch`."""
        out, top_k = super().dispatch(x_TD, experts_TK, num_experts, capacity=capacity), experts_TK.shape[1]
        copies: Tensor = _Copies.apply(x_TD, top_k)  # type: ignore[no-untyped-call]
        return out._replace(x_RD=copies[out.slot_R % top_k, out.slot_R // top_k])


@fault()
class GateGradientInAnyOrder(Alone):
    """The gradient of the gate sums over tokens in another order each time."""

    def route(
        self, x_TD: Tensor, gate_ED: Tensor, spec: RouterSpec, bias_E: Tensor | None = None, *,
        experts_TK: Tensor | None = None,
    ) -> Routing:  # fmt: skip
        """See `MoEOps.route`."""
        order = torch.randperm(len(x_TD), device=x_TD.device)
        given = None if experts_TK is None else experts_TK[order]
        out, back = super().route(x_TD[order], gate_ED, spec, bias_E, experts_TK=given), order.argsort()
        return Routing(*(tensor[back] for tensor in out))
