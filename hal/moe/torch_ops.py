# SPDX-License-Identifier: Apache-2.0
"""The portable implementation of `MoEOps`, from ordinary torch operators: readable first, fast second.

Legend: T tokens, D model dim, F expert hidden dim, E routed experts, K choices per token, R routed rows.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from hal.errors import ShapeError
from hal.moe import dispatching, losses, routing
from hal.moe.checks import check_same_device, check_same_dtype, check_shape
from hal.moe.experts import ExpertsPath, experts, experts_path, swiglu
from hal.moe.model_spec import MoEModelSpec
from hal.moe.ops import Dispatch, ExpertWeights, LayerOutput, LayerWeights, MoEOps, Routing
from hal.moe.precision import model_dtype, without_autocast
from hal.moe.router_spec import RouterSpec


@final
class TorchMoEOps(MoEOps):
    """`MoEOps` on every device that torch can address; stateless, so one instance serves all threads.

    Args:
        grouped: True or False forces the experts' path; None takes the grouped product where it works.
        check_indices: check index values, for which the host waits for the device once per operator. Switch
            it off where waiting is not allowed, such as in the capture of a graph; an index out of range then
            does what the device does with one.
    """

    def __init__(self, *, grouped: bool | None = None, check_indices: bool = True) -> None:
        self.grouped = grouped
        self.check_indices = check_indices

    def route(
        self,
        x_TD: Tensor,
        gate_ED: Tensor,
        spec: RouterSpec,
        bias_E: Tensor | None = None,
        *,
        experts_TK: Tensor | None = None,
    ) -> Routing:
        """See `hal.moe.routing.route`."""
        return routing.route(
            x_TD,
            gate_ED,
            spec,
            bias_E,
            experts_TK=experts_TK,
            check_indices=self.check_indices,
        )

    def dispatch(
        self,
        x_TD: Tensor,
        experts_TK: Tensor,
        num_experts: int,
        *,
        capacity: int | None = None,
    ) -> Dispatch:
        """See `hal.moe.dispatching.dispatch`."""
        return dispatching.dispatch(
            x_TD,
            experts_TK,
            num_experts,
            capacity=capacity,
            check_indices=self.check_indices,
        )

    def experts(self, x_RD: Tensor, counts_E: Tensor, weights: ExpertWeights) -> Tensor:
        """See `hal.moe.experts.experts`."""
        return experts(x_RD, counts_E, weights, grouped=self.grouped, check_indices=self.check_indices)

    def experts_path(self, x_RD: Tensor, weights: ExpertWeights) -> ExpertsPath:
        """Say which path `experts` takes for these arguments, and why."""
        return experts_path(x_RD, weights, grouped=self.grouped)

    def combine(self, y_RD: Tensor, weights_TK: Tensor, slot_R: Tensor, num_tokens: int) -> Tensor:
        """See `hal.moe.dispatching.combine`."""
        return dispatching.combine(y_RD, weights_TK, slot_R, num_tokens, check_indices=self.check_indices)

    def aux_loss(self, scores_TE: Tensor, experts_TK: Tensor, spec: RouterSpec) -> Tensor:
        """See `hal.moe.losses.aux_loss`."""
        return losses.aux_loss(scores_TE, experts_TK, spec, check_indices=self.check_indices)

    def z_loss(self, logits_TE: Tensor) -> Tensor:
        """See `hal.moe.losses.z_loss`."""
        return losses.z_loss(logits_TE)

    def layer(
        self,
        x_TD: Tensor,
        weights: LayerWeights,
        spec: MoEModelSpec,
        *,
        experts_TK: Tensor | None = None,
        capacity: int | None = None,
    ) -> LayerOutput:
        """Route, dispatch, run the experts, combine, and add the shared experts' output.

        The routed sum is rounded to the dtype of `x_TD` (autocast's, where it is on) before the shared output
        is added in that dtype, as the published models do. E and K come from `spec.router`, D, F and S from
        the weights. Zero tokens give [0, D] and losses of 0. A NaN stays with its token, but in the losses,
        which are means over all tokens. What another token can change is rounding, since an expert's product
        has other rows, and, with a capacity, who finds room: a token of NaN takes places at experts 0 to K - 1.

        Raises:
            ShapeError: shapes, dtypes or devices do not fit, or the shared weights and the spec contradict each other.
        """
        routed = self.route(x_TD, weights.gate_ED, spec.router, weights.bias_E, experts_TK=experts_TK)
        _check_shared(x_TD, weights, spec)
        # The indices are in range by now, so that nothing is checked, and waited for, again.
        sent = dispatching.dispatch(
            x_TD,
            routed.experts_TK,
            spec.router.num_experts,
            capacity=capacity,
            check_indices=False,
        )
        y_RD = experts(sent.x_RD, sent.counts_E, weights.experts, grouped=self.grouped, check_indices=False)
        y_TD = dispatching.combine(
            y_RD,
            routed.weights_TK,
            sent.slot_R,
            x_TD.shape[0],
            check_indices=False,
        )
        shared_TD = _shared(x_TD, weights)
        return LayerOutput(
            y_TD if shared_TD is None else y_TD + shared_TD,
            routed,
            losses.aux_loss(routed.scores_TE, routed.experts_TK, spec.router, check_indices=False),
            losses.z_loss(routed.logits_TE),
        )


def _check_shared(x_TD: Tensor, weights: LayerWeights, spec: MoEModelSpec) -> None:
    where = "layer"
    width = x_TD.shape[1]
    for name, present, wanted in (
        ("shared", weights.shared is not None, spec.num_shared_experts > 0),
        ("shared_gate_D", weights.shared_gate_D is not None, spec.shared_gate),
    ):
        if present != wanted:
            raise ShapeError(
                f"{where}: weights.{name} is {'given' if present else 'None'}",
                expected=f"{'weights' if wanted else 'None'}, for {spec.name}",
            )
    if weights.shared is not None:
        w1_SD, w3_SD, w2_DS = weights.shared
        check_shape(where, "shared w1_SD", w1_SD, ("S", width))
        check_shape(where, "shared w3_SD", w3_SD, tuple(w1_SD.shape))
        check_shape(where, "shared w2_DS", w2_DS, (width, w1_SD.shape[0]))
        for name, w in zip(("w1_SD", "w3_SD", "w2_DS"), weights.shared, strict=True):
            check_same_dtype(where, "x_TD", x_TD, f"shared {name}", w)
        check_same_device(where, x_TD=x_TD, w1_SD=w1_SD, w3_SD=w3_SD, w2_DS=w2_DS)
    if weights.shared_gate_D is not None:
        check_shape(where, "shared_gate_D", weights.shared_gate_D, (width,))
        check_same_dtype(where, "x_TD", x_TD, "shared_gate_D", weights.shared_gate_D)
        check_same_device(where, x_TD=x_TD, shared_gate_D=weights.shared_gate_D)


def _shared(x_TD: Tensor, weights: LayerWeights) -> Tensor | None:
    if weights.shared is None:
        return None
    dtype = model_dtype(x_TD)
    with without_autocast(x_TD):
        x_TD = x_TD.to(dtype)
        w1_SD, w3_SD, w2_DS = (w.to(dtype) for w in weights.shared)
        y_TD = swiglu(x_TD, w1_SD, w3_SD, w2_DS)
        if weights.shared_gate_D is None:
            return y_TD
        gate_T1 = torch.nn.functional.linear(x_TD, weights.shared_gate_D.to(dtype)[None])
        return gate_T1.sigmoid() * y_TD


torch_ops = TorchMoEOps()
"""The instance that everything uses unless told otherwise."""
