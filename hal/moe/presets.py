# SPDX-License-Identifier: Apache-2.0
"""The published Mixture-of-Experts models, each with its source.

Where a paper and its released code disagree, the released code wins, since checkpoints were trained or are
run with it; the entry says so. Two implementations of one model still disagree in the mask value, the
epsilon, the gate's dtype and the cast of the weights: that is why these are fields of `RouterSpec`.

Two balance losses are in use that differ by the factor K. Where the published coefficient is that of Hugging Face's
`load_balancing_loss_func`, it stands here times K, for our `aux_loss`, which is smaller by that factor.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from hal.errors import ConfigError
from hal.moe.model_spec import MoEModelSpec
from hal.moe.router_spec import RouterSpec

# A table: what belongs together stands on one line.
# fmt: off
_LING_LITE = MoEModelSpec(
    name="ling-lite",
    router=RouterSpec(num_experts=64, top_k=6, gate_dtype="model"),
    num_layers=28, hidden_size=2048, expert_hidden_size=1408,
    num_shared_experts=2, shared_hidden_size=2 * 1408, shared_gate=False,
    balance_coefficient=0.015, z_coefficient=1e-4,
    source="arXiv:2503.05139 sections 2-3; github inclusionAI/Ling @5ccaeae, inference/mindie/lite and "
    "modeling_bailing_moe.py: gate product in the model's dtype, softmax in float32, no epsilon",
)

_LING_PLUS = MoEModelSpec(
    name="ling-plus",
    router=RouterSpec(num_experts=64, top_k=4, gate_dtype="model"),
    num_layers=88, hidden_size=5376, expert_hidden_size=3072,
    num_shared_experts=1, shared_hidden_size=3072, shared_gate=False,
    balance_coefficient=0.015, z_coefficient=1e-4,
    source="arXiv:2503.05139 sections 2-3; github inclusionAI/Ling @5ccaeae, inference/mindie/plus",
)

_LING_2_MINI = MoEModelSpec(
    name="ling-2.0-mini",
    router=RouterSpec(
        num_experts=256, top_k=8, score="sigmoid", normalize_epsilon=1e-20, num_groups=8, top_groups=4,
        group_score="top2_sum", selection_bias=True, scaling_factor=2.5,
    ),
    num_layers=20, hidden_size=2048, expert_hidden_size=512,
    num_shared_experts=1, shared_hidden_size=512, shared_gate=False, num_dense_layers=1,
    balance_coefficient=None, z_coefficient=3.5e-6,
    source="github inclusionAI/Ling-V2 @af8837e6, modeling_bailing_moe_v2.py and the training script, whose "
    "scaling factor 2.5 (the class's default is 1.0) and z-loss these are; balanced by a bias, not a loss",
)

_DEEPSEEK_V2_LITE = MoEModelSpec(
    name="deepseek-v2-lite",
    router=RouterSpec(num_experts=64, top_k=6, normalize=False),
    num_layers=27, hidden_size=2048, expert_hidden_size=1408,
    num_shared_experts=2, shared_hidden_size=2 * 1408, shared_gate=False, num_dense_layers=1,
    balance_coefficient=0.001, z_coefficient=None,
    source="arXiv:2405.04434 appendix B; transformers models/deepseek_v2: gate product in float32",
)

_DEEPSEEK_V2 = MoEModelSpec(
    name="deepseek-v2",
    router=RouterSpec(
        num_experts=160, top_k=6, normalize=False, num_groups=8, top_groups=3, masked_score=0.0,
        scaling_factor=16.0,
    ),
    num_layers=60, hidden_size=5120, expert_hidden_size=1536,
    num_shared_experts=2, shared_hidden_size=2 * 1536, shared_gate=False, num_dense_layers=1,
    balance_coefficient=0.003, z_coefficient=None,
    source="arXiv:2405.04434 sections 2.2 and 3.1 (the expert-level one of its three balance losses); "
    "transformers models/deepseek_v2, which masks with 0.0 where DeepSeek's own code masks with -inf",
)

_DEEPSEEK_V3 = MoEModelSpec(
    name="deepseek-v3",
    router=RouterSpec(
        num_experts=256, top_k=8, score="sigmoid", normalize_epsilon=1e-20, num_groups=8, top_groups=4,
        group_score="top2_sum", selection_bias=True, scaling_factor=2.5,
    ),
    num_layers=61, hidden_size=7168, expert_hidden_size=2048,
    num_shared_experts=1, shared_hidden_size=2048, shared_gate=False, num_dense_layers=3,
    balance_coefficient=1e-4, z_coefficient=None,
    source="arXiv:2412.19437 sections 2.1.2 and 4.2 (the coefficient is of a loss within each sequence); "
    "transformers models/deepseek_v3: gate product in float32, epsilon 1e-20 (DeepSeek's own code has none)",
)

_MIXTRAL_8X7B = MoEModelSpec(
    name="mixtral-8x7b",
    router=RouterSpec(num_experts=8, top_k=2, gate_dtype="model"),
    num_layers=32, hidden_size=4096, expert_hidden_size=14336,
    num_shared_experts=0, shared_hidden_size=0, shared_gate=False,
    balance_coefficient=0.02 * 2, z_coefficient=None,
    source="arXiv:2401.04088 section 2; transformers models/mixtral; config.json of Mixtral-8x7B-v0.1, whose "
    "router_aux_loss_coef 0.02 is of Hugging Face's loss: times K",
)

_QWEN2_MOE = MoEModelSpec(
    name="qwen2-moe",
    router=RouterSpec(num_experts=60, top_k=4, normalize=False, gate_dtype="model", weight_dtype="model"),
    num_layers=24, hidden_size=2048, expert_hidden_size=1408,
    num_shared_experts=1, shared_hidden_size=5632, shared_gate=True,
    balance_coefficient=0.001 * 4, z_coefficient=None,
    source="Qwen1.5-MoE-A2.7B; transformers models/qwen2_moe (its defaults): weights cast "
    "back to the model's dtype; router_aux_loss_coef 0.001 is of Hugging Face's loss: times K",
)

_QWEN3_MOE = MoEModelSpec(
    name="qwen3-moe",
    router=RouterSpec(num_experts=128, top_k=8, gate_dtype="model", weight_dtype="model"),
    num_layers=48, hidden_size=2048, expert_hidden_size=768,
    num_shared_experts=0, shared_hidden_size=0, shared_gate=False,
    balance_coefficient=0.001 * 8, z_coefficient=None,
    source="Qwen3-30B-A3B, arXiv:2505.09388; transformers models/qwen3_moe; its config.json normalises, the "
    "code's default does not; router_aux_loss_coef 0.001 is of Hugging Face's loss: times K",
)

_OLMOE = MoEModelSpec(
    name="olmoe",
    router=RouterSpec(num_experts=64, top_k=8, normalize=False, gate_dtype="model", weight_dtype="model"),
    num_layers=16, hidden_size=2048, expert_hidden_size=1024,
    num_shared_experts=0, shared_hidden_size=0, shared_gate=False,
    balance_coefficient=0.01, z_coefficient=0.001,
    source="OLMoE-1B-7B, arXiv:2409.02060 section 2; transformers models/olmoe; trained with megablocks' loss "
    "(allenai/OLMoE#40, and moe_loss_weight 0.01 in its configs), which is ours, as a mean over the layers; in "
    "Hugging Face's code the same 0.01 acts K times as strongly",
)

_GLM_4_5 = MoEModelSpec(
    name="glm-4.5",
    router=RouterSpec(
        num_experts=160, top_k=8, score="sigmoid", normalize_epsilon=1e-20, selection_bias=True, scaling_factor=2.5,
    ),
    num_layers=92, hidden_size=5120, expert_hidden_size=1536,
    num_shared_experts=1, shared_hidden_size=1536, shared_gate=False, num_dense_layers=3,
    balance_coefficient=1e-4, z_coefficient=None,
    source="arXiv:2508.06471 section 2 (the coefficient is of a loss within each sequence); config.json of "
    "zai-org/GLM-4.5; transformers models/glm4_moe, whose router is that of models/deepseek_v3 with one group",
)

# fmt: on
PRESETS: Mapping[str, MoEModelSpec] = MappingProxyType(
    {
        model.name: model
        for model in (
            _LING_LITE,
            _LING_PLUS,
            _LING_2_MINI,
            _DEEPSEEK_V2_LITE,
            _DEEPSEEK_V2,
            _DEEPSEEK_V3,
            _MIXTRAL_8X7B,
            _QWEN2_MOE,
            _QWEN3_MOE,
            _OLMOE,
            _GLM_4_5,
        )
    }
)
"""Every preset by name."""


def preset(name: str) -> MoEModelSpec:
    """Return the preset of that name.

    Raises:
        ConfigError: there is none; the message lists those there are.
    """
    try:
        return PRESETS[name]
    except (KeyError, TypeError):
        raise ConfigError(f"no preset is named {name!r}", expected=", ".join(PRESETS)) from None
