# SPDX-License-Identifier: Apache-2.0
"""Routing: from activations to K experts and K weights per token, in one defined tie order.

Legend: T tokens, D model dim, E routed experts, K choices per token, G groups of experts.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from hal.errors import ShapeError
from hal.moe.checks import as_index, check_floating, check_range, check_same_device, check_shape
from hal.moe.ops import Routing
from hal.moe.precision import model_dtype, wide_dtype, without_autocast
from hal.moe.router_spec import RouterSpec


def route(
    x_TD: Tensor,
    gate_ED: Tensor,
    spec: RouterSpec,
    bias_E: Tensor | None = None,
    *,
    experts_TK: Tensor | None = None,
    check_indices: bool = True,
) -> Routing:
    """Choose K experts for each token, and their weights; see `MoEOps.route`.

    Tie order: equal selection scores go to the lower expert index (groups: to the lower group), on every
    device, and -0.0 equals 0.0. Where fewer than K experts score above -inf, those at -inf follow by index.

    A NaN score ranks with +inf, above every number, ties again to the lower index. So a token with a NaN or
    infinite activation, whose softmax scores are all NaN, goes to experts 0..K-1 (of the first groups) with
    NaN weights: its experts are distinct and in range, nothing is raised, and no other token is affected.
    The sigmoid scores of an infinite activation are 1 and 0, and rank as such.

    Raises:
        ShapeError: shapes, dtypes or devices do not fit; the bias is missing, or there is one that the spec does not
            use; a replayed expert is out of range (that check makes the host wait for the device once).
    """
    where = "route"
    check_shape(where, "x_TD", x_TD, ("T", "D"))
    check_floating(where, "x_TD", x_TD)
    check_shape(where, "gate_ED", gate_ED, (spec.num_experts, x_TD.shape[1]))
    check_floating(where, "gate_ED", gate_ED)
    _check_bias(spec, bias_E, replayed=experts_TK is not None)
    check_same_device(where, x_TD=x_TD, gate_ED=gate_ED, bias_E=bias_E)
    logits_TE = _logits(x_TD, gate_ED, spec)
    wide_TE = logits_TE.to(wide_dtype(logits_TE.dtype))
    scores_TE = wide_TE.softmax(dim=-1) if spec.score == "softmax" else wide_TE.sigmoid()
    if experts_TK is None:
        experts_TK = _choose(scores_TE.detach(), bias_E, spec)
    else:
        check_shape(where, "experts_TK", experts_TK, (x_TD.shape[0], spec.top_k))
        experts_TK = as_index(where, "experts_TK", experts_TK)
        check_same_device(where, x_TD=x_TD, experts_TK=experts_TK)
        if check_indices:
            check_range(where, "experts_TK", experts_TK, spec.num_experts)
    weights_TK = scores_TE.gather(1, experts_TK)
    if spec.normalize:
        total_T1 = weights_TK.sum(dim=-1, keepdim=True)
        if spec.normalize_epsilon:
            total_T1 = total_T1 + spec.normalize_epsilon
        weights_TK = weights_TK / total_T1
    if spec.scaling_factor != 1.0:
        weights_TK = weights_TK * spec.scaling_factor
    if spec.weight_dtype == "model":
        weights_TK = weights_TK.to(model_dtype(x_TD))
    return Routing(logits_TE, scores_TE, experts_TK, weights_TK)


def _check_bias(spec: RouterSpec, bias_E: Tensor | None, *, replayed: bool) -> None:
    if bias_E is not None:
        if not spec.selection_bias:
            raise ShapeError("route: bias_E was given", expected="None: this router has no selection bias")
        check_shape("route", "bias_E", bias_E, (spec.num_experts,))
        check_floating("route", "bias_E", bias_E)
    elif spec.selection_bias and not replayed:
        raise ShapeError(
            "route: bias_E is None",
            expected=f"the selection bias, [{spec.num_experts}]",
            hint="zeros, which is where training starts",
        )


def _logits(x_TD: Tensor, gate_ED: Tensor, spec: RouterSpec) -> Tensor:
    dtype = wide_dtype(x_TD.dtype) if spec.gate_dtype == "float32" else model_dtype(x_TD)
    with without_autocast(x_TD):
        return F.linear(x_TD.to(dtype), gate_ED.to(dtype))


def _choose(scores_TE: Tensor, bias_E: Tensor | None, spec: RouterSpec) -> Tensor:
    if bias_E is not None:
        scores_TE = scores_TE + bias_E.detach().to(scores_TE.dtype)
    if spec.top_groups < spec.num_groups:
        scores_TE = scores_TE.masked_fill(~_allowed(scores_TE, spec), spec.masked_score)
    return largest(scores_TE, spec.top_k)


def _allowed(scores_TE: Tensor, spec: RouterSpec) -> Tensor:
    """Return which experts lie in the chosen groups, bool [T, E]."""
    num_tokens = scores_TE.shape[0]
    grouped_TGe = _nan_as_inf(scores_TE).view(num_tokens, spec.num_groups, spec.group_size)
    if spec.group_score == "max":
        groups_TG = grouped_TGe.amax(dim=-1)
    else:
        groups_TG = grouped_TGe.topk(2, dim=-1).values.sum(dim=-1)  # values alone: no tie can show
    allowed_TG = torch.zeros_like(groups_TG, dtype=torch.bool)
    allowed_TG.scatter_(1, largest(groups_TG, spec.top_groups), True)
    return allowed_TG.repeat_interleave(spec.group_size, dim=1)


def largest(scores: Tensor, k: int) -> Tensor:
    """Return the indices of the k largest of each row, descending, ties to the lower index; NaN ranks with
    +inf.

    A stable sort, because the tie order of `topk` differs between devices and even between sizes.
    """
    # Adding 0.0 turns -0.0 into 0.0, which a sort on the bits would otherwise keep apart.
    return torch.sort(_nan_as_inf(scores) + 0.0, dim=-1, descending=True, stable=True).indices[..., :k]


def _nan_as_inf(scores: Tensor) -> Tensor:
    return scores.masked_fill(scores.isnan(), math.inf)
