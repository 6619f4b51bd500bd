# SPDX-License-Identifier: Apache-2.0
"""megatron-core's MoE as far as it runs on any device: `hal_conformance.adapters.megatron:core`.

`TopKRouter` routes; `MoEAllGatherTokenDispatcher` on one rank dispatches, after `apply_router_token_dropping` by
position where there is a capacity; `unpermute` combines; both losses are functions of `moe_utils`. Its experts need a
GPU.

Two things keep the router from running without a GPU, and the adapter takes both away: it moves its weights to
torch.cuda.current_device() whenever they lie on the CPU (here that function then answers "cpu"), and without
Transformer Engine `moe_utils` asks whether `te_general_gemm` is None before that name has a value (here it is None).

Legend: T tokens, D model dim, E routed experts, K choices per token, R routed rows.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.func import functional_call

from hal.moe.ops import Dispatch, Routing
from hal.moe.router_spec import RouterSpec
from hal_conformance.adapters import library, unsupported
from hal_conformance.adapters.abilities import Abilities, unlike
from hal_conformance.adapters.watching import Watch, descending

_MOE = "megatron.core.transformer.moe"
_SOFTMAX: Abilities = {
    "score": ("softmax",), "normalize_epsilon": (0.0,), "selection_bias": (False,), "group_score": ("top2_sum",),
    "masked_score": (-math.inf,),
}  # fmt: skip
_SIGMOID: Abilities = {
    "normalize": (True,), "normalize_epsilon": (1e-20,), "group_score": ("top2_sum",), "masked_score": (-math.inf,),
}  # fmt: skip


class Core:
    """Router, dispatch, combine and losses."""

    def __init__(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Transformer Engine and Apex, without which it runs here
            self._router_class = library(f"{_MOE}.router", "megatron-core").TopKRouter
            self._utils = library(f"{_MOE}.moe_utils", "megatron-core")
            if not hasattr(self._utils, "te_general_gemm"):
                self._utils.te_general_gemm = None
            self._dispatcher = library(f"{_MOE}.token_dispatcher", "megatron-core").MoEAllGatherTokenDispatcher
            self._config = library("megatron.core.transformer.transformer_config", "megatron-core").TransformerConfig

    def route(
        self,
        x_TD: Tensor,
        gate_ED: Tensor,
        spec: RouterSpec,
        bias_E: Tensor | None = None,
        *,
        experts_TK: Tensor | None = None,
    ) -> Routing:
        """Run `TopKRouter`; see `MoEOps.route`."""
        if reason := _not(spec, x_TD.dtype):
            raise unsupported(reason, x_TD)
        config = self._configured(
            x_TD.shape[1],
            spec,
            moe_router_score_function=spec.score,
            moe_router_pre_softmax=spec.score == "softmax" and not spec.normalize,
            moe_router_topk_scaling_factor=None if spec.scaling_factor == 1.0 else spec.scaling_factor,
            moe_router_num_groups=spec.num_groups if spec.num_groups > 1 else None,
            moe_router_group_topk=spec.top_groups if spec.num_groups > 1 else None,
            moe_router_enable_expert_bias=spec.selection_bias,
            moe_router_dtype="fp32" if spec.gate_dtype == "float32" else None,
        )
        logits: list[Tensor] = []
        with _current_device(x_TD.device), torch.compiler.set_stance("force_eager"):
            router = self._router_class(config, SimpleNamespace(tp=None, cp=None, tp_cp=None, tp_dp_cp=None))
            gating = router.gating

            def heard(x: Tensor) -> Tensor:
                logits.append(gating(x))
                return logits[0]

            router.gating = heard
            given = {"weight": gate_ED} | ({} if bias_E is None else {"expert_bias": bias_E})
            watch = Watch(spec.num_experts, spec.top_k, experts_TK=experts_TK)
            with watch:
                probs_TE, map_TE = functional_call(router, given, (x_TD[:, None],))
        logits_TE = logits[0].view(-1, spec.num_experts)
        if spec.score == "softmax" and spec.normalize:  # after the choice, over K; these are its scores for the losses
            _, scores_TE = self._utils.compute_routing_scores_for_aux_loss(logits_TE, spec.top_k, spec.score)
        else:
            assert watch.scores_TE is not None
            scores_TE = watch.scores_TE
        if experts_TK is None:
            # A map has no order: the experts come by index, and are put into that of what was chosen from.
            by_index_TK = map_TE.nonzero()[:, 1].view(-1, spec.top_k)
            assert watch.selection_TE is not None
            experts_TK = by_index_TK.gather(1, descending(watch.selection_TE, by_index_TK))
        experts_TK = experts_TK.long()
        return Routing(logits_TE, scores_TE, experts_TK, probs_TE.gather(1, experts_TK))

    def _configured(self, width: int, spec: RouterSpec, **more: Any) -> Any:
        return self._config(
            num_layers=1,
            hidden_size=width,
            num_attention_heads=1,
            num_moe_experts=spec.num_experts,
            moe_router_topk=spec.top_k,
            moe_router_load_balancing_type="none",
            add_bias_linear=False,
            use_cpu_initialization=True,
            perform_initialization=False,
            **more,
        )

    def dispatch(self, x_TD: Tensor, experts_TK: Tensor, num_experts: int, *, capacity: int | None = None) -> Dispatch:
        """Run the dispatcher; the slots ride along in place of the probabilities. See `MoEOps.dispatch`."""
        tokens, top_k = experts_TK.shape
        experts_TK = experts_TK.long()  # what the router gives it is a map
        slots_TK = torch.arange(tokens * top_k, device=x_TD.device).view(tokens, top_k)
        slots_TE = slots_TK.new_zeros(tokens, num_experts).scatter(1, experts_TK, slots_TK)
        map_TE = torch.zeros_like(slots_TE, dtype=torch.bool).scatter(1, experts_TK, True)
        if capacity is not None:
            map_TE = self._dropped(map_TE, top_k, capacity)
        config = self._configured(x_TD.shape[1], RouterSpec(num_experts, top_k))
        groups = SimpleNamespace(ep=None, expt_tp=None, tp_ep=None)
        dispatcher = self._dispatcher(num_experts, list(range(num_experts)), config, groups)
        sent = dispatcher.token_dispatch(*dispatcher.dispatch_preprocess(x_TD[:, None], map_TE, slots_TE))
        x_RD, counts_E, slot_R = dispatcher.dispatch_postprocess(*sent)
        return Dispatch(x_RD, slot_R, counts_E.to(x_TD.device))

    def _dropped(self, map_TE: Tensor, top_k: int, capacity: int) -> Tensor:
        tokens, num_experts = map_TE.shape
        load = tokens * top_k / num_experts
        factor = capacity / load if load else 1.0
        while self._utils.get_capacity(tokens * top_k, num_experts, factor) > capacity:
            factor = math.nextafter(factor, 0.0)  # it rounds up
        probs_TE = map_TE.float()
        _, kept_TE = self._utils.apply_router_token_dropping(probs_TE, map_TE, top_k, factor, drop_policy="position")
        kept: Tensor = kept_TE
        return kept

    def combine(self, y_RD: Tensor, weights_TK: Tensor, slot_R: Tensor, num_tokens: int) -> Tensor:
        """Run `unpermute` with the weights as its probabilities; see `MoEOps.combine`."""
        top_k = weights_TK.shape[1]
        slot_R = slot_R.long()  # as those of its own permute are
        token_R = slot_R // top_k
        # Rows come by expert, then by token. Which expert does not matter, only where the next one begins.
        expert_R = torch.ones_like(token_R)
        expert_R[1:] = (token_R[1:] <= token_R[:-1]).to(expert_R.dtype)
        expert_R = expert_R.cumsum(0) - 1
        some = int(expert_R[-1]) + 1 if len(expert_R) else 1
        places = (token_R, expert_R)
        map_TE = torch.zeros(num_tokens, some, dtype=torch.bool, device=y_RD.device).index_put(
            places, torch.ones_like(token_R, dtype=torch.bool)
        )
        probs_TE = weights_TK.new_zeros(num_tokens, some).index_put(places, weights_TK.reshape(-1)[slot_R])
        shape = torch.Size((num_tokens, y_RD.shape[1]))
        y: Tensor = self._utils.unpermute(y_RD, token_R, shape, probs=probs_TE, routing_map=map_TE)
        return y

    def aux_loss(self, scores_TE: Tensor, experts_TK: Tensor, spec: RouterSpec) -> Tensor:
        """Run `compute_routing_scores_for_aux_loss` from these scores, and the loss of their result.

        See `MoEOps.aux_loss`. The scores stand in for what the function's softmax or sigmoid returns.
        """
        with Watch(spec.num_experts, spec.top_k, experts_TK=experts_TK, scores_TE=scores_TE):
            map_TE, shares_TE = self._utils.compute_routing_scores_for_aux_loss(
                torch.zeros_like(scores_TE), spec.top_k, spec.score
            )
        counts_E, tokens = map_TE.sum(dim=0), len(scores_TE)
        loss: Tensor = self._utils.switch_load_balancing_loss_func(
            shares_TE, counts_E, tokens, spec.top_k, spec.num_experts, 1.0
        )
        return loss

    def z_loss(self, logits_TE: Tensor) -> Tensor:
        """Run `z_loss_func`; see `MoEOps.z_loss`."""
        loss: Tensor = self._utils.z_loss_func(logits_TE, 1.0)
        return loss


def _not(spec: RouterSpec, dtype: torch.dtype) -> str:
    if spec.gate_dtype != spec.weight_dtype and dtype != torch.float32:
        return "the router has one dtype for logits and weights"
    if spec.num_groups > spec.top_groups and spec.top_k // spec.top_groups != 2:
        return f"a group's score is the sum of its {spec.top_k // spec.top_groups} best, the preset's is another"
    return unlike(spec, _SOFTMAX if spec.score == "softmax" else _SIGMOID, dtype)


@contextmanager
def _current_device(device: torch.device) -> Iterator[None]:
    if torch.cuda.is_available():
        with torch.cuda.device(device):
            yield
    else:
        with patch.object(torch.cuda, "current_device", lambda: device):
            yield


def __getattr__(name: str) -> Core:
    if name != "core":
        raise AttributeError(f"there is no adapter for {name}; there is core")
    return Core()
