# SPDX-License-Identifier: Apache-2.0
"""The adapters of other libraries. What needs a library is skipped where it is not installed (`pip install moe-hal[peers]`)."""

import importlib.util
import json
import subprocess
import sys

import pytest
import torch

from hal.errors import ConfigError
from hal.moe import ExpertWeights, LayerWeights, preset
from hal.moe.torch_ops import torch_ops
from hal_conformance.execution.subject import load_attribute


def needs(library):
    return pytest.mark.skipif(importlib.util.find_spec(library) is None, reason=f"{library} is not installed")


def test_no_library_is_imported_before_one_of_its_adapters_is_asked_for():
    code = (
        "import sys, hal_conformance.adapters.transformers, hal_conformance.adapters.torchtitan, "
        "hal_conformance.adapters.megatron, hal_conformance.adapters.ling\n"
        "assert not {'transformers', 'torchtitan', 'megatron'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("library", "reference"),
    [("transformers", "transformers:mixtral"), ("torchtitan", "torchtitan:moe"), ("megatron", "megatron:core")],
)
def test_an_absent_library_is_a_clear_error(library, reference):
    if importlib.util.find_spec(library) is not None:
        pytest.skip(f"{library} is installed")
    with pytest.raises(ConfigError, match=f"no module {library}") as refused:
        load_attribute(f"hal_conformance.adapters.{reference}")
    assert "pip install" in refused.value.hint


@pytest.mark.parametrize("module", ["transformers", "torchtitan", "megatron", "ling"])
def test_an_unknown_block_names_those_there_are(module):
    with pytest.raises(AttributeError, match="there"):
        load_attribute(f"hal_conformance.adapters.{module}:unheard_of")


def test_lings_file_has_to_be_named(monkeypatch):
    monkeypatch.delenv("HAL_LING_FILE", raising=False)
    with pytest.raises(ConfigError, match="HAL_LING_FILE"):
        load_attribute("hal_conformance.adapters.ling:lite")


LING_LIKE = """
import no_such_module
from .configuration import BailingMoeConfig

class BailingMoeMLP(nn.Module):
    def __init__(self, config: BailingMoeConfig, intermediate_size: int):
        super().__init__()
        make = lambda a, b: nn.Linear(a, b, bias=False)
        self.gate_proj, self.up_proj = (make(config.hidden_size, intermediate_size) for _ in range(2))
        self.down_proj = make(intermediate_size, config.hidden_size)
        self.act = ACT2FN[config.hidden_act]
    def forward(self, x):
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))

class BailingMoeGate(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.k = config.num_experts_per_tok
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
    def forward(self, x):
        logits = F.linear(x.flatten(0, 1), self.weight)
        weights, experts = logits.softmax(-1, dtype=torch.float32).topk(self.k, dim=-1, sorted=False)
        return experts, weights / weights.sum(-1, keepdim=True), logits

class BailingMoeSparseMoeBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        sizes = [config.moe_intermediate_size] * config.num_experts
        self.gate, self.experts = BailingMoeGate(config), nn.ModuleList(BailingMoeMLP(config, f) for f in sizes)
        self.shared_experts = BailingMoeMLP(config, config.moe_intermediate_size * config.num_shared_experts)
    def forward(self, x):
        experts, weights, logits = self.gate(x)
        flat, y = x.flatten(0, 1), 0
        for e, expert in enumerate(self.experts):
            y = y + (weights * (experts == e)).sum(1, keepdim=True) * expert(flat)
        return y.to(x.dtype).view(x.shape) + self.shared_experts(x), (logits, experts)
"""


def test_a_file_of_lings_shape_runs_without_what_the_rest_of_it_imports(tmp_path, monkeypatch):
    file = tmp_path / "modeling.py"
    file.write_text(LING_LIKE)
    monkeypatch.setenv("HAL_LING_FILE", str(file))
    block = load_attribute("hal_conformance.adapters.ling:lite")
    assert_agrees(block, "ling-lite")
    assert block.inference.is_training is False


def assert_agrees(block, name):
    """The layer of a block and of `hal.moe`, with gradients, up to rounding."""
    spec = preset(name).scaled(hidden=32, expert_hidden=16)
    e, d, f, s = spec.router.num_experts, spec.hidden_size, spec.expert_hidden_size, spec.shared_hidden_size
    torch.manual_seed(0)

    def made(*shape):
        return (torch.randn(*shape) / shape[-1] ** 0.5).requires_grad_()

    weights = LayerWeights(
        made(e, d),
        torch.zeros(e) if spec.router.selection_bias else None,
        ExpertWeights(made(e, f, d), made(e, f, d), made(e, d, f)),
        (made(s, d), made(s, d), made(d, s)) if s else None,
        made(d) if spec.shared_gate else None,
    )
    x = made(9, d)
    leaves = [x, weights.gate_ED, *weights.experts, *(weights.shared or ())]
    found, want = (ops.layer(x, weights, spec) for ops in (block, torch_ops))
    torch.testing.assert_close(found.y_TD, want.y_TD)
    assert torch.equal(found.routing.experts_TK, want.routing.experts_TK)
    torch.testing.assert_close(found.routing.weights_TK, want.routing.weights_TK)
    for a, b in zip(*(torch.autograd.grad(out.y_TD.sum(), leaves) for out in (found, want)), strict=True):
        torch.testing.assert_close(a, b)


@needs("transformers")
@pytest.mark.parametrize("ending", ["", ".grouped_mm", ".batched_mm"])
@pytest.mark.parametrize(
    ("block", "name"),
    [
        ("mixtral", "mixtral-8x7b"), ("qwen2_moe", "qwen2-moe"), ("qwen3_moe", "qwen3-moe"), ("olmoe", "olmoe"),
        ("deepseek_v2", "deepseek-v2"), ("deepseek_v3", "deepseek-v3"), ("bailing_hybrid", "ling-2.0-mini"),
    ],
)  # fmt: skip
def test_a_transformers_block_agrees_in_float32(block, name, ending):
    assert_agrees(load_attribute(f"hal_conformance.adapters.transformers:{block}{ending}"), name)


@needs("transformers")
def test_a_transformers_block_goes_through_the_door(tmp_path):
    report = tmp_path / "report.json"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "hal.cli.main",
            "conformance",
            "run",
            "--device",
            "cpu",
            "--scale",
            "tiny",
            "--dtype",
            "float32",
            "--impl",
            "hal_conformance.adapters.transformers:mixtral.grouped_mm",
            "--case",
            "layer",
            "--case",
            "router.weights",
            "--json",
            str(report),
        ],
        check=True,
        capture_output=True,
    )
    rows = json.loads(report.read_text())["results"]
    by_preset = {row["case"]: row["status"] for row in rows}
    assert by_preset["layer.backward_replayed[mixtral-8x7b]"] == "PASS"
    assert by_preset["router.weights[deepseek-v3]"] == "UNSUPPORTED"
