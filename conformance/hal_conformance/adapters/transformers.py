# SPDX-License-Identifier: Apache-2.0
"""The MoE blocks of Hugging Face transformers 5, such as `hal_conformance.adapters.transformers:mixtral`.

A dotted ending picks how transformers runs the experts: `mixtral.eager` (as `mixtral`: expert by expert),
`mixtral.grouped_mm`, `mixtral.batched_mm`. `mixtral.losses` is the same block, whose layer returns the library's
balance loss instead of `hal.moe`'s, computed from the router's logits as the model does. See `BLOCKS` for the others.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hal.moe.losses import z_loss
from hal.moe.model_spec import MoEModelSpec
from hal.moe.ops import ExpertWeights, LayerOutput, Routing
from hal.moe.router_spec import RouterSpec
from hal_conformance.adapters import library, unsupported
from hal_conformance.adapters.abilities import Abilities, unlike
from hal_conformance.adapters.module import ModuleLayer, Place, joined
from hal_conformance.adapters.watching import Watch

_SOFTMAX: Abilities = {
    "score": ("softmax",), "normalize_epsilon": (0.0,), "num_groups": (1,), "selection_bias": (False,),
    "scaling_factor": (1.0,), "gate_dtype": ("model",),
}  # fmt: skip
_MIXTRAL: Abilities = {**_SOFTMAX, "normalize": (True,), "weight_dtype": ("float32",)}
_QWEN: Abilities = {**_SOFTMAX, "weight_dtype": ("model",)}
_DEEPSEEK_V2: Abilities = {
    "score": ("softmax",), "normalize": (False,), "selection_bias": (False,), "group_score": ("max",),
    "masked_score": (0.0,), "gate_dtype": ("float32",), "weight_dtype": ("float32",),
}  # fmt: skip
_DEEPSEEK_V3: Abilities = {
    "score": ("sigmoid",), "normalize_epsilon": (1e-20,), "selection_bias": (True,), "group_score": ("top2_sum",),
    "masked_score": (-math.inf,), "gate_dtype": ("float32",), "weight_dtype": ("float32",),
}  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """One block of the library.

    Attributes:
        folder: its folder below `transformers.models`.
        prefix: of its classes.
        block: its class, without the prefix.
        able: the routers that it has.
        shared: the attribute that is the shared expert, or "".
        hidden: the field of the configuration that is F.
        has_loss: whether the file has a `load_balancing_loss_func`.
    """

    folder: str
    prefix: str
    block: str
    able: Abilities
    shared: str = ""
    hidden: str = "moe_intermediate_size"
    has_loss: bool = True


# A table: what belongs together stands on one line.
# fmt: off
BLOCKS: Mapping[str, Kind] = {
    "mixtral": Kind("mixtral", "Mixtral", "SparseMoeBlock", _MIXTRAL, hidden="intermediate_size"),
    "minimax": Kind("minimax", "MiniMax", "SparseMoeBlock", _MIXTRAL, hidden="intermediate_size"),
    "qwen2_moe": Kind("qwen2_moe", "Qwen2Moe", "SparseMoeBlock", _QWEN, "shared_expert"),
    "qwen3_moe": Kind("qwen3_moe", "Qwen3Moe", "SparseMoeBlock", _QWEN),
    "qwen3_next": Kind("qwen3_next", "Qwen3Next", "SparseMoeBlock", _QWEN, "shared_expert"),
    "olmoe": Kind("olmoe", "Olmoe", "SparseMoeBlock", _QWEN, hidden="intermediate_size"),
    "flex_olmo": Kind("flex_olmo", "FlexOlmo", "SparseMoeBlock", _QWEN, hidden="intermediate_size"),
    "deepseek_v2": Kind("deepseek_v2", "DeepseekV2", "Moe", _DEEPSEEK_V2, "shared_experts", has_loss=False),
    "deepseek_v3": Kind("deepseek_v3", "DeepseekV3", "MoE", _DEEPSEEK_V3, "shared_experts", has_loss=False),
    "glm4_moe": Kind("glm4_moe", "Glm4Moe", "MoE", _DEEPSEEK_V3, "shared_experts", has_loss=False),
    "dots1": Kind("dots1", "Dots1", "MoE", _DEEPSEEK_V3, "shared_experts", has_loss=False),
    "solar_open": Kind("solar_open", "SolarOpen", "MoE", _DEEPSEEK_V3, "shared_experts", has_loss=False),
    "bailing_hybrid": Kind("bailing_hybrid", "BailingHybrid", "MoE", _DEEPSEEK_V3, "shared_experts", has_loss=False),
}
# fmt: on
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
"""How the library runs experts on any device."""

_EXPERTS = {"gate_up_proj": ("w1_EFD", "w3_EFD"), "down_proj": ("w2_EDF",)}


def _names(kind: Kind) -> dict[str, Place]:
    names: dict[str, Place] = {"gate.weight": "gate_ED", "gate.e_score_correction_bias": "bias_E"}
    names |= {f"experts.{name}": place for name, place in _EXPERTS.items()}
    if kind.shared:
        projections = {"gate_proj": "shared_w1_SD", "up_proj": "shared_w3_SD", "down_proj": "shared_w2_DS"}
        names |= {f"{kind.shared}.{name}.weight": place for name, place in projections.items()}
        names["shared_expert_gate.weight"] = "shared_gate_D"
    return names


class Block(ModuleLayer):
    """One block: `layer`, its router as `route`, its experts as `experts`, and the balance loss of its file."""

    def __init__(self, kind: Kind, implementation: str = "eager", *, own_losses: bool = False) -> None:
        self.kind = kind
        self.implementation = implementation
        self.own_losses = own_losses
        self._file = library(f"transformers.models.{kind.folder}.modeling_{kind.folder}", "transformers")
        self._configuration = library(f"transformers.models.{kind.folder}.configuration_{kind.folder}", "transformers")
        if kind.has_loss:
            self.aux_loss = self._aux_loss
        super().__init__(self._block, _names(kind), why_not=self._not, replays=self._replays)

    def __getattr__(self, name: str) -> Block:
        if name in IMPLEMENTATIONS:
            return Block(self.kind, name, own_losses=self.own_losses)
        if name == "losses" and self.kind.has_loss:
            return Block(self.kind, self.implementation, own_losses=True)
        raise AttributeError(f"{self.kind.folder} has no {name}; there are {', '.join((*IMPLEMENTATIONS, 'losses'))}")

    def _not(self, spec: RouterSpec, dtype: torch.dtype) -> str:
        return unlike(spec, self.kind.able, dtype)

    def _replays(self, spec: RouterSpec) -> str:
        if spec.num_groups > spec.top_groups and spec.masked_score == 0.0:
            return "the router reads its weights from masked scores: they are 0 for experts outside its own groups"
        return ""

    def _block(self, spec: MoEModelSpec) -> nn.Module:
        with torch.device("meta"), warnings.catch_warnings():  # on meta, since every weight is put in
            warnings.simplefilter("ignore")  # shared experts of no width, where the router alone is asked for
            module: nn.Module = self._class(self.kind.block)(self._config(spec))
        return module

    def _class(self, name: str) -> Any:
        return getattr(self._file, self.kind.prefix + name)

    def _config(self, spec: MoEModelSpec) -> Any:
        config, router = getattr(self._configuration, f"{self.kind.prefix}Config")(), spec.router
        fields = {
            "hidden_size": spec.hidden_size, self.kind.hidden: spec.expert_hidden_size,
            "num_experts": router.num_experts, "num_local_experts": router.num_experts,
            "num_experts_per_tok": router.top_k, "norm_topk_prob": router.normalize,
            "n_group": router.num_groups, "topk_group": router.top_groups,
            "topk_method": "group_limited_greedy" if router.num_groups > 1 else "greedy",
            "routed_scaling_factor": router.scaling_factor,
            # One MLP of this many experts' width; the cases of the router have none.
            "n_shared_experts": spec.shared_hidden_size // spec.expert_hidden_size,
            "shared_expert_intermediate_size": spec.shared_hidden_size,
            "_experts_implementation": self.implementation,
        }  # fmt: skip
        for name, value in fields.items():
            setattr(config, name, value)
        return config

    def experts(self, x_RD: Tensor, counts_E: Tensor, weights: ExpertWeights) -> Tensor:
        """Run the experts module, every row as a token with one choice of weight 1; see `MoEOps.experts`."""
        num_experts, hidden, width = weights.w1_EFD.shape
        spec = MoEModelSpec(
            "experts", RouterSpec(num_experts, 1), 1, width, hidden, 0, 0, False, None, None, "a case of the experts"
        )
        with torch.device("meta"):
            module = self._class("Experts")(self._config(spec))
        given = dict(zip(("w1_EFD", "w3_EFD", "w2_EDF"), weights, strict=True))
        expert_R1 = torch.arange(num_experts, device=x_RD.device).repeat_interleave(counts_E.long())[:, None]
        parameters = {name: joined([given[n] for n in made_of]) for name, made_of in _EXPERTS.items()}
        y: Tensor = functional_call(module, parameters, (x_RD, expert_R1, torch.ones_like(x_RD[:, :1])))
        return y

    def _aux_loss(self, scores_TE: Tensor, experts_TK: Tensor, spec: RouterSpec) -> Tensor:
        """Return the library's balance loss over K, from scores instead of the logits that it takes.

        The function runs as it is, on logits that do not matter: the scores stand in for what its softmax returns, the
        experts for what its topk does.
        """
        if reason := self._not(spec, torch.float32):
            raise unsupported(reason, scores_TE)
        with Watch(spec.num_experts, spec.top_k, experts_TK=experts_TK, scores_TE=scores_TE):
            return self._balance(torch.zeros_like(scores_TE), spec)

    def output(
        self, y_TD: Tensor, routing: Routing, spec: MoEModelSpec, experts_TK: Tensor | None = None
    ) -> LayerOutput:
        """See `ModuleLayer.output`; with `own_losses`, the balance loss is the library's, from the logits."""
        if not self.own_losses:
            return super().output(y_TD, routing, spec, experts_TK)
        with Watch(spec.router.num_experts, spec.router.top_k, experts_TK=experts_TK):
            aux = self._balance(routing.logits_TE, spec.router)
        return LayerOutput(y_TD, routing, aux, z_loss(routing.logits_TE))

    def _balance(self, logits_TE: Tensor, spec: RouterSpec) -> Tensor:
        loss: Tensor = self._file.load_balancing_loss_func((logits_TE,), spec.num_experts, spec.top_k)
        return loss / spec.top_k


def __getattr__(name: str) -> Block:
    if name not in BLOCKS:
        raise AttributeError(f"there is no adapter for {name}; there are {', '.join(BLOCKS)}")
    return Block(BLOCKS[name])
