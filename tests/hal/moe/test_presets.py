# SPDX-License-Identifier: Apache-2.0
"""Specs and presets: numbers that contradict each other are refused, and the published ones add up."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import pytest

from hal.errors import ConfigError
from hal.moe import PRESETS, RouterSpec, preset


@pytest.mark.parametrize(
    "wrong",
    [
        {"top_k": 0},
        {"top_k": -1},
        {"num_experts": 3},  # E < K
        {"num_experts": 0, "top_k": 0},
        {"top_k": 2.0},
        {"top_k": True},
        {"num_groups": 3},  # 8 experts in 3 groups
        {"num_groups": 2, "top_groups": 3},
        {"num_groups": 4, "top_groups": 1},  # 2 experts stay, 4 are wanted
        {"num_groups": 8, "top_groups": 8, "group_score": "top2_sum"},  # groups of one have no second
        {"group_score": "mean"},
        {"score": "relu"},
        {"gate_dtype": "bfloat16"},
        {"weight_dtype": "float64"},
        {"normalize_epsilon": -1e-20},
        {"normalize_epsilon": float("nan")},
        {"scaling_factor": float("inf")},
        {"masked_score": float("nan")},
        {"masked_score": float("inf")},
        {"score": ["softmax"]},
        {"scaling_factor": "x"},
        {"scaling_factor": None},
        {"scaling_factor": True},
        {"scaling_factor": 10**400},
        {"normalize_epsilon": None},
        {"normalize_epsilon": "0"},
        {"masked_score": "y"},
        {"masked_score": None},
        {"normalize": "no"},
        {"normalize": 1},
        {"selection_bias": 1},
        {"selection_bias": None},
    ],
)
def test_a_router_whose_numbers_contradict_each_other_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        RouterSpec(**{"num_experts": 8, "top_k": 4, **wrong})


def test_choosing_every_expert_is_allowed() -> None:
    assert RouterSpec(num_experts=4, top_k=4).group_size == 4


@pytest.mark.parametrize(
    "wrong",
    [
        {"hidden_size": 0},
        {"expert_hidden_size": -1},
        {"num_layers": 1.0},
        {"num_shared_experts": 0},
        {"shared_hidden_size": 0},
        {"num_dense_layers": 29},
        {"num_shared_experts": 0, "shared_hidden_size": 0, "shared_gate": True},
        {"shared_gate": 0},
        {"balance_coefficient": "0.1"},
        {"balance_coefficient": -0.1},
        {"z_coefficient": float("nan")},
    ],
)
def test_a_model_whose_sizes_contradict_each_other_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        dataclasses.replace(preset("ling-lite"), **wrong)


def test_an_unknown_preset_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(ConfigError, match=r"(?s)ling-3.*mixtral-8x7b"):
        preset("ling-3")


def test_the_presets_are_the_published_models_under_their_own_names() -> None:
    assert list(PRESETS) == [
        "ling-lite",
        "ling-plus",
        "ling-2.0-mini",
        "deepseek-v2-lite",
        "deepseek-v2",
        "deepseek-v3",
        "mixtral-8x7b",
        "qwen2-moe",
        "qwen3-moe",
        "olmoe",
        "glm-4.5",
    ]
    assert all(model.name == name and model.source for name, model in PRESETS.items())


def _attention(d: int, heads: int, kv: int, head_dim: int) -> int:
    return 2 * d * heads * head_dim + 2 * d * kv * head_dim


@pytest.mark.parametrize(
    ("name", "attention_per_layer", "dense_width", "vocabulary", "published"),
    [
        # Published totals, in billions to the digits that the sources give. Norms are below the last digit.
        ("ling-lite", _attention(2048, 16, 4, 128), 0, 126464, 16.80),  # arXiv:2503.05139
        ("ling-plus", _attention(5376, 56, 8, 96), 0, 126464, 290.6),  # arXiv:2503.05139: 290 billion
        ("mixtral-8x7b", _attention(4096, 32, 8, 128), 0, 32000, 46.7),  # arXiv:2401.04088
        ("qwen2-moe", _attention(2048, 16, 16, 128), 0, 151936, 14.3),  # Qwen1.5-MoE-A2.7B's card
        ("qwen3-moe", _attention(2048, 32, 4, 128), 0, 151936, 30.5),  # arXiv:2505.09388
        ("olmoe", _attention(2048, 16, 16, 128), 0, 50304, 6.92),  # arXiv:2409.02060
        ("ling-2.0-mini", _attention(2048, 16, 4, 128), 5120, 157184, 16.26),  # Ling-V2's README
        # Latent attention: query (low-rank where it is), compressed key/value, its expansion, output.
        (
            "deepseek-v2-lite",
            2048 * 16 * 192 + 2048 * (512 + 64) + 512 * 16 * 256 + 16 * 128 * 2048,
            10944,
            102400,
            15.7,
        ),
        (
            "deepseek-v2",
            5120 * 1536 + 1536 * 128 * 192 + 5120 * (512 + 64) + 512 * 128 * 256 + 128 * 128 * 5120,
            12288,
            102400,
            236.0,
        ),
        (
            "deepseek-v3",
            7168 * 1536 + 1536 * 128 * 192 + 7168 * (512 + 64) + 512 * 128 * 256 + 128 * 128 * 7168,
            18432,
            129280,
            671.0,
        ),
    ],
)
def test_the_numbers_of_a_preset_add_up_to_the_published_total(
    name: str,
    attention_per_layer: int,
    dense_width: int,
    vocabulary: int,
    published: float,
) -> None:
    model = preset(name)
    sparse = model.num_layers - model.num_dense_layers
    total = (
        sparse * model.layer_parameters
        + model.num_dense_layers * 3 * model.hidden_size * dense_width
        + model.num_layers * attention_per_layer
        + 2 * vocabulary * model.hidden_size
    ) / 1e9
    digits = len(str(published).split(".")[1]) if published < 100 else 0
    # One unit of the last published digit: sources round or cut, and norms and biases are left out above.
    assert abs(total - published) <= 10.0**-digits


def test_the_numbers_of_glm_4_5_add_up_as_its_report_counts_them() -> None:
    """355 billion with the layer that predicts one token more, without embeddings and head (arXiv:2508.06471)."""
    model = preset("glm-4.5")
    attention, width = _attention(5120, 96, 8, 128), model.hidden_size
    total = (
        (model.num_layers - model.num_dense_layers + 1) * model.layer_parameters
        + model.num_dense_layers * 3 * width * 12288
        + (model.num_layers + 1) * attention
        + 2 * width * width
    )
    assert round(total / 1e9) == 355


def test_scaling_a_model_keeps_its_router_and_the_ratio_of_its_shared_width() -> None:
    model = preset("qwen2-moe")
    small = model.scaled(hidden=32, expert_hidden=16)
    assert small.router == model.router
    assert (small.hidden_size, small.expert_hidden_size, small.shared_hidden_size) == (32, 16, 64)
    assert model.scaled(hidden=32, expert_hidden=16, shared_hidden=24).shared_hidden_size == 24
    assert preset("olmoe").scaled(hidden=32, expert_hidden=16, shared_hidden=24).shared_hidden_size == 0


def test_reading_the_presets_imports_no_torch() -> None:
    code = "import sys, hal.moe; assert hal.moe.PRESETS; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
