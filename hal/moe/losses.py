# SPDX-License-Identifier: Apache-2.0
"""The two losses of a router: balance and z-loss. Coefficients are the caller's.

Legend: T tokens, E routed experts, K choices per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hal.errors import ShapeError
from hal.moe.checks import as_index, check_floating, check_range, check_same_device, check_shape
from hal.moe.dispatching import count
from hal.moe.precision import wide_dtype, without_autocast
from hal.moe.router_spec import RouterSpec

# Keeps 0/0 away where every sigmoid underflows. Megatron-LM, moe_utils.compute_routing_scores_for_aux_loss.
_SCORE_EPSILON = 1e-20


def aux_loss(
    scores_TE: Tensor,
    experts_TK: Tensor,
    spec: RouterSpec,
    *,
    check_indices: bool = True,
) -> Tensor:
    """Return the balance loss E / (K T) * sum_e count_e * mean_t p_te; see `MoEOps.aux_loss`.

    p is the softmax scores as they are, or the sigmoid scores divided by (their sum over all E + 1e-20). 1
    for even routing, E / K if every token chooses the same K experts and their p add up to 1. Zero tokens
    give 0.

    Of one layer, Hugging Face's `load_balancing_loss_func` is K times this, megablocks' is this, and DeepSeek-V3's
    sequence-wise loss is this on one sequence at a time. Over several layers Hugging Face pools all their tokens,
    which is this for the layers' scores and experts put together; megablocks takes the mean, DeepSeek the sum.

    Source: Fedus et al. 2021, eq. 4-6 (arXiv:2101.03961), with the K of Megatron-LM's
    `switch_load_balancing_loss_func`; for sigmoid scores DeepSeek-V3, eq. 17-20 (arXiv:2412.19437).

    Raises:
        ShapeError: shapes, dtypes or devices do not fit, or an expert is out of range (one wait for the device).
    """
    where = "aux_loss"
    check_shape(where, "scores_TE", scores_TE, ("T", spec.num_experts))
    check_floating(where, "scores_TE", scores_TE)
    num_tokens = scores_TE.shape[0]
    check_shape(where, "experts_TK", experts_TK, (num_tokens, spec.top_k))
    experts_TK = as_index(where, "experts_TK", experts_TK)
    check_same_device(where, scores_TE=scores_TE, experts_TK=experts_TK)
    wide_TE = scores_TE.to(wide_dtype(scores_TE.dtype))
    if num_tokens == 0:
        return wide_TE.sum()  # 0, and still part of the graph
    if check_indices:
        check_range(where, "experts_TK", experts_TK, spec.num_experts)
    if spec.score == "sigmoid":
        wide_TE = wide_TE / (wide_TE.sum(dim=-1, keepdim=True) + _SCORE_EPSILON)
    counts_E = count(torch.sort(experts_TK.reshape(-1)).values, spec.num_experts)
    share_E = counts_E.to(wide_TE.dtype) * (spec.num_experts / (spec.top_k * num_tokens))
    return (share_E * wide_TE.mean(dim=0)).sum()


def z_loss(logits_TE: Tensor) -> Tensor:
    """Return mean_t logsumexp_e(logits_te)^2 in float32; zero tokens give 0.

    Source: Zoph et al. 2022, eq. 5 (arXiv:2202.08906).

    Raises:
        ShapeError: the logits are not a matrix, have no expert, or are of no dtype to compute in.
    """
    check_shape("z_loss", "logits_TE", logits_TE, ("T", "E"))
    check_floating("z_loss", "logits_TE", logits_TE)
    if logits_TE.shape[1] == 0:
        raise ShapeError("z_loss: logits_TE has no expert", expected="E of at least 1")
    with without_autocast(logits_TE):
        wide_TE = logits_TE.to(wide_dtype(logits_TE.dtype))
        if wide_TE.shape[0] == 0:
            return wide_TE.sum()
        return wide_TE.logsumexp(dim=-1).square().mean()
