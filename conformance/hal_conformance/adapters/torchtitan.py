# SPDX-License-Identifier: Apache-2.0
"""torchtitan's MoE on one device: `hal_conformance.adapters.torchtitan:moe`.

Router, dispatch, experts and combine are torchtitan's `TokenChoiceTopKRouter`, `LocalTokenDispatcher` and
`GroupedExperts`; the layer is its `MoE`, with the shared experts that a preset asks for.

The router computes its gate within autocast to float32, which torch's CPU autocast refuses: there the gate's product
has the dtypes that it is given. `moe` leaves it so; `moe.float32_gate` casts the activations as that autocast would, so
that the rest is judged in 16 bits, too.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hal.moe.model_spec import MoEModelSpec
from hal.moe.ops import Dispatch, ExpertWeights
from hal.moe.router_spec import RouterSpec
from hal_conformance.adapters import library, unsupported
from hal_conformance.adapters.abilities import Abilities, unlike
from hal_conformance.adapters.module import ModuleLayer, Place, Weights
from hal_conformance.adapters.watching import Watch

ABLE: Abilities = {
    "score": ("softmax", "sigmoid"), "group_score": ("top2_sum",), "masked_score": (-math.inf,),
    "gate_dtype": ("float32",), "weight_dtype": ("float32",),
}  # fmt: skip
"""Groups are scored by the sum of their two best, and an epsilon is always added: see `MoE._not`."""
EPSILON = 1e-20

_INNER = "routed_experts.inner_experts"
_NAMES: dict[str, Place] = {
    "router.gate.weight": "gate_ED", "expert_bias_E": "bias_E",
    f"{_INNER}.w1_EFD": "w1_EFD", f"{_INNER}.w3_EFD": "w3_EFD", f"{_INNER}.w2_EDF": "w2_EDF",
    "shared_experts.w1.weight": "shared_w1_SD", "shared_experts.w3.weight": "shared_w3_SD",
    "shared_experts.w2.weight": "shared_w2_DS", "shared_experts.gate.weight": "shared_gate_D",
}  # fmt: skip


def _read(output: Any, watch: Watch) -> tuple[Tensor, Tensor, Tensor]:
    weights, experts, _ = output
    if watch.logits_TE is None:
        raise LookupError("the router computed no scores")
    return watch.logits_TE, weights, experts


class MoE(ModuleLayer):
    """torchtitan's MoE and its parts."""

    def __init__(self, *, casts_gate: bool = False) -> None:
        self.casts_gate = casts_gate
        self._moe = library("torchtitan.models.common.moe", "torchtitan")
        self._linear = library("torchtitan.models.common.linear", "torchtitan").Linear
        self._feed_forward = library("torchtitan.models.common.feed_forward", "torchtitan")
        self._dispatcher = library("torchtitan.models.common.token_dispatcher", "torchtitan").LocalTokenDispatcher
        super().__init__(self._layer, _NAMES, router="router", read=_read, why_not=self._not)

    @property
    def float32_gate(self) -> MoE:
        """The same, with the gate's activations in float32."""
        return MoE(casts_gate=True)

    def _not(self, spec: RouterSpec, dtype: torch.dtype) -> str:
        if spec.normalize and spec.score == "sigmoid" and spec.normalize_epsilon != EPSILON:
            return f"the block adds {EPSILON}, the preset {spec.normalize_epsilon}"
        # Beside a softmax's K largest, whose sum is at least K / E, the epsilon is nothing in float32.
        return unlike(spec, ABLE, dtype)

    def _layer(self, spec: MoEModelSpec) -> nn.Module:
        router, width = spec.router, spec.hidden_size
        experts = self._moe.GroupedExperts.Config(
            dim=width, hidden_dim=spec.expert_hidden_size, num_experts=router.num_experts
        )
        dispatcher = self._dispatcher.Config(num_experts=router.num_experts, top_k=router.top_k)
        module: nn.Module = self._moe.MoE.Config(
            num_experts=router.num_experts,
            routed_experts=self._moe.RoutedExperts.Config(inner_experts=experts, token_dispatcher=dispatcher),
            router=self._router_config(router, width),
            load_balance_coeff=1e-3 if router.selection_bias else None,
            shared_experts=self._shared_config(spec) if spec.num_shared_experts else None,
        ).build()
        if self.casts_gate:
            module.get_submodule("router.gate").register_forward_pre_hook(_in_float32)
        return module

    def _router_config(self, spec: RouterSpec, width: int) -> Any:
        grouped = spec.num_groups > 1
        return self._moe.TokenChoiceTopKRouter.Config(
            num_experts=spec.num_experts,
            gate=self._linear.Config(in_features=width, out_features=spec.num_experts),
            num_expert_groups=spec.num_groups if grouped else None,
            num_limited_groups=spec.top_groups if grouped else None,
            top_k=spec.top_k,
            score_func=spec.score,
            route_norm=spec.normalize,
            route_scale=spec.scaling_factor,
        )

    def _shared_config(self, spec: MoEModelSpec) -> Any:
        width, hidden = spec.hidden_size, spec.shared_hidden_size
        parts = {
            name: self._linear.Config(in_features=a, out_features=b)
            for name, a, b in (("w1", width, hidden), ("w3", width, hidden), ("w2", hidden, width))
        }
        if not spec.shared_gate:
            return self._feed_forward.FeedForward.Config(**parts)
        gate = self._linear.Config(in_features=width, out_features=1)
        return self._feed_forward.SigmoidGatedFeedForward.Config(**parts, gate=gate)

    def call_router(self, router: nn.Module, x_TD: Tensor, weights: Weights) -> Any:
        """Run the router, which takes the bias as an argument."""
        return functional_call(router, {"gate.weight": weights["gate_ED"]}, (x_TD[None], weights.get("bias_E")))

    def dispatch(self, x_TD: Tensor, experts_TK: Tensor, num_experts: int, *, capacity: int | None = None) -> Dispatch:
        """Run `LocalTokenDispatcher.dispatch`; the slots ride along in place of the scores. See `MoEOps.dispatch`."""
        if capacity is not None:
            raise unsupported("the dispatcher drops nothing", x_TD)
        experts_TK = experts_TK.long()  # as its router's are
        chosen_TE = torch.zeros(len(x_TD), num_experts, dtype=torch.bool, device=x_TD.device)
        counts_E = chosen_TE.scatter_(-1, experts_TK, True).sum(dim=0)  # as MoE.forward counts
        slots_TK = torch.arange(experts_TK.numel(), device=x_TD.device).view(experts_TK.shape)
        dispatcher = self._built_dispatcher(num_experts, experts_TK.shape[1])
        x_RD, counts_E, kept = dispatcher.dispatch(x_TD, slots_TK, experts_TK, counts_E)
        return Dispatch(x_RD, kept.topk_scores_experts_sorted_N, counts_E)

    def _built_dispatcher(self, num_experts: int, top_k: int) -> Any:
        return self._dispatcher.Config(num_experts=num_experts, top_k=top_k).build()

    def experts(self, x_RD: Tensor, counts_E: Tensor, weights: ExpertWeights) -> Tensor:
        """Run `GroupedExperts`; see `MoEOps.experts`."""
        num_experts, hidden, width = weights.w1_EFD.shape
        with torch.device("meta"):
            module = self._moe.GroupedExperts.Config(dim=width, hidden_dim=hidden, num_experts=num_experts).build()
        y: Tensor = functional_call(module, weights._asdict(), (x_RD, counts_E))
        return y

    def combine(self, y_RD: Tensor, weights_TK: Tensor, slot_R: Tensor, num_tokens: int) -> Tensor:
        """Run `LocalTokenDispatcher.combine`; see `MoEOps.combine`."""
        top_k = weights_TK.shape[1]
        kept = library("torchtitan.models.common.token_dispatcher", "torchtitan").LocalDispatchMetadata(
            token_indices_experts_sorted_N=slot_R // top_k,
            topk_scores_experts_sorted_N=weights_TK.reshape(-1)[slot_R],
        )
        like_TD = y_RD.new_empty(num_tokens, y_RD.shape[1])
        out: Tensor = self._built_dispatcher(1, top_k).combine(y_RD, kept, like_TD)
        return out


def _in_float32(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(argument.float() for argument in arguments)


def __getattr__(name: str) -> MoE:
    if name != "moe":
        raise AttributeError(f"there is no adapter for {name}; there is moe")
    return MoE()
