# SPDX-License-Identifier: Apache-2.0
"""Ling's own MoE blocks, from the modelling files that inclusionAI publishes with its models.

    HAL_LING_FILE=modeling_bailing_moe.py hal conformance run --impl hal_conformance.adapters.ling:lite
    HAL_LING_V2_FILE=modeling_bailing_moe_v2.py hal conformance run --impl hal_conformance.adapters.ling:mini

The files are written for versions of transformers long gone, so their MoE classes alone are taken, unchanged, and run.
`lite.inference` is the block in evaluation mode, which computes its experts in other code, without gradients.
"""

from __future__ import annotations

import ast
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hal.errors import ConfigError
from hal.moe.model_spec import MoEModelSpec
from hal.moe.router_spec import RouterSpec
from hal_conformance.adapters.abilities import Abilities, unlike
from hal_conformance.adapters.module import ModuleLayer, Place
from hal_conformance.adapters.watching import Watch


@dataclass(frozen=True)
class Generation:
    """One generation of Ling.

    Attributes:
        variable: the environment variable that names its file.
        prefix: of its classes.
        able: the routers that it has.
    """

    variable: str
    prefix: str
    able: Abilities


LITE = Generation(
    "HAL_LING_FILE", "BailingMoe",
    {
        "score": ("softmax",), "normalize_epsilon": (0.0,), "num_groups": (1,), "selection_bias": (False,),
        "scaling_factor": (1.0,), "gate_dtype": ("model",), "weight_dtype": ("float32",),
    },
)  # fmt: skip
MINI = Generation(
    "HAL_LING_V2_FILE", "BailingMoeV2",
    {
        "score": ("sigmoid",), "normalize": (True,), "normalize_epsilon": (1e-20,), "selection_bias": (True,),
        "group_score": ("top2_sum",), "masked_score": (-math.inf,), "gate_dtype": ("float32",),
        "weight_dtype": ("float32",),
    },
)  # fmt: skip

_NAMES: Mapping[str, Place] = {
    "gate.weight": "gate_ED", "gate.expert_bias": "bias_E",
    "experts.{e}.gate_proj.weight": "w1_EFD", "experts.{e}.up_proj.weight": "w3_EFD",
    "experts.{e}.down_proj.weight": "w2_EDF", "shared_experts.gate_proj.weight": "shared_w1_SD",
    "shared_experts.up_proj.weight": "shared_w3_SD", "shared_experts.down_proj.weight": "shared_w2_DS",
}  # fmt: skip


class Block(ModuleLayer):
    """The block of one generation, in training or in evaluation mode."""

    def __init__(self, generation: Generation, *, is_training: bool = True) -> None:
        self.generation = generation
        self.is_training = is_training
        self._block = _classes(generation)[f"{generation.prefix}SparseMoeBlock"]
        super().__init__(self._built_block, _NAMES, read=_read, why_not=self._not)

    @property
    def inference(self) -> Block:
        """The same in evaluation mode."""
        return Block(self.generation, is_training=False)

    def _not(self, spec: RouterSpec, dtype: torch.dtype) -> str:
        return unlike(spec, self.generation.able, dtype)

    def _built_block(self, spec: MoEModelSpec) -> nn.Module:
        router = spec.router
        config = SimpleNamespace(
            hidden_size=spec.hidden_size,
            moe_intermediate_size=spec.expert_hidden_size,
            num_experts=router.num_experts,
            num_experts_per_tok=router.top_k,
            num_shared_experts=spec.shared_hidden_size // spec.expert_hidden_size or None,
            norm_topk_prob=router.normalize,
            n_group=router.num_groups,
            topk_group=router.top_groups,
            routed_scaling_factor=router.scaling_factor,
            hidden_act="silu",
        )
        with torch.device("meta"):  # every weight is put in
            module: nn.Module = self._block(config)
        return module.train(self.is_training)


def _read(output: Any, watch: Watch) -> tuple[Tensor, Tensor, Tensor]:
    experts, weights, logits = output
    return logits, weights, experts


def _classes(generation: Generation) -> dict[str, Any]:
    """Run the MoE classes of the file, as they stand there."""
    name = os.environ.get(generation.variable, "")
    path = Path(name)
    if not name or not path.is_file():
        raise ConfigError(
            f"{generation.variable} is {name!r}", expected="the path of the modelling file that is published with Ling"
        )
    wanted = {f"{generation.prefix}{part}" for part in ("MLP", "Gate", "SparseMoeBlock")}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    # Annotations name configurations that are not needed; as text they are harmless.
    future = ast.parse("from __future__ import annotations").body
    tree.body = [*future, *(node for node in tree.body if getattr(node, "name", "") in wanted)]
    found: dict[str, Any] = {
        "torch": torch, "nn": nn, "F": F, "math": math, "ACT2FN": {"silu": nn.SiLU()}, "__name__": path.stem,
    }  # fmt: skip
    exec(compile(tree, str(path), "exec"), found)
    if missing := wanted - found.keys():
        raise ConfigError(f"{path.name} has no {', '.join(sorted(missing))}")
    return found


def __getattr__(name: str) -> Block:
    generations = {"lite": LITE, "mini": MINI}
    if name not in generations:
        raise AttributeError(f"there is no adapter for {name}; there are {', '.join(generations)}")
    return Block(generations[name])
