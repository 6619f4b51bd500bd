# SPDX-License-Identifier: Apache-2.0
"""Any module as an implementation: a right block is green, a wrong one is red, what does not fit is not judged."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hal.contract import Contract
from hal.errors import UnsupportedOperation
from hal.moe import ExpertWeights, LayerWeights, preset
from hal.moe.torch_ops import torch_ops
from hal_conformance import arrays as codec
from hal_conformance.adapters.abilities import unlike
from hal_conformance.adapters.module import ModuleLayer
from hal_conformance.adapters.watching import Watch
from hal_conformance.case import Params
from hal_conformance.cases import by_name
from hal_conformance.execution.judging import judge_outputs
from hal_conformance.execution.plan import Task

CPU = torch.device("cpu")


class Gate(nn.Module):
    def __init__(self, spec, faulty=False):
        super().__init__()
        self.k, self.faulty = spec.router.top_k, faulty
        self.weight = nn.Parameter(torch.empty(spec.router.num_experts, spec.hidden_size))

    def forward(self, x):
        logits = F.linear(x.reshape(-1, x.shape[-1]), self.weight)
        scores = logits.softmax(-1, dtype=torch.float32)
        weights, experts = torch.topk(scores, self.k, dim=-1, sorted=False)
        return logits, weights if self.faulty else weights / weights.sum(-1, keepdim=True), experts


class Expert(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """A plain block of the shape of Mixtral's, with a list of experts."""

    def __init__(self, spec, faulty=False):
        super().__init__()
        self.router = Gate(spec, faulty)
        self.experts = nn.ModuleList(
            Expert(spec.hidden_size, spec.expert_hidden_size) for _ in range(spec.router.num_experts)
        )

    def forward(self, x):
        _, weights, experts = self.router(x)
        flat = x.reshape(-1, x.shape[-1])
        y = torch.zeros(flat.shape, dtype=torch.float32)
        for e, expert in enumerate(self.experts):
            token, choice = torch.where(experts == e)
            y = y.index_add(0, token, weights[token, choice, None] * expert(flat[token]).float())
        return (y.to(x.dtype).view(x.shape), "more that nobody looks at")


NAMES = {
    "router.weight": "gate_ED",
    "experts.{e}.gate.weight": "w1_EFD",
    "experts.{e}.up.weight": "w3_EFD",
    "experts.{e}.down.weight": "w2_EDF",
}
RIGHT = ModuleLayer(Block, NAMES, router="router")
CASES = (
    "layer.forward_replayed", "layer.forward_free", "layer.backward_replayed", "layer.backward_free",
    "determinism.repeated", "determinism.batch",
    "router.logits", "router.scores", "router.topk_set", "router.weights", "router.backward", "router.replayed",
)  # fmt: skip


def judged(case, ops, dtype, name="mixtral-8x7b"):
    task = Task(by_name(case), Params(name, dtype, "tiny"))
    inputs = task.case.inputs(task.params)
    returned = task.case.run(ops, {n: codec.to_torch(a, CPU) for n, a in inputs.items()}, task.params)
    outputs = {n: codec.from_torch(t) for n, t in returned.items()}
    return judge_outputs(task, outputs, codec.digests(inputs), Contract())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_a_right_module_is_green(case, dtype):
    verdict = judged(case, RIGHT, dtype)
    assert verdict.status.colour == "green", verdict


@pytest.mark.parametrize("case", ["layer.forward_free", "layer.backward_replayed", "router.weights"])
def test_a_module_that_does_not_normalise_is_red(case):
    wrong = ModuleLayer(lambda spec: Block(spec, faulty=True), NAMES, router="router")
    verdict = judged(case, wrong, "float32")
    assert verdict.status.value == "FAIL-NUMERIC"
    assert "weights" in verdict.detail


def test_weights_in_the_wrong_places_are_red():
    swapped = NAMES | {"experts.{e}.gate.weight": "w3_EFD", "experts.{e}.up.weight": "w1_EFD"}
    assert judged("layer.forward_free", ModuleLayer(Block, swapped, router="router"), "float32").status.colour == "red"


def test_a_weight_without_a_place_is_unsupported():
    with pytest.raises(UnsupportedOperation, match="no place for shared_w1_SD"):
        judged("layer.forward_free", RIGHT, "float32", "ling-lite")


def test_a_parameter_without_a_weight_is_unsupported():
    names = {name: place for name, place in NAMES.items() if "down" not in name}
    with pytest.raises(UnsupportedOperation, match=r"experts\.0\.down\.weight"):
        judged("layer.forward_free", ModuleLayer(Block, names, router="router"), "float32")


def test_what_the_user_rules_out_is_unsupported_with_the_reason():
    able = {"score": ("softmax",), "normalize": (True,)}
    block = ModuleLayer(Block, NAMES, router="router", why_not=lambda spec, dtype: unlike(spec, able, dtype))
    with pytest.raises(UnsupportedOperation) as refused:
        judged("router.weights", block, "float32", "deepseek-v3")
    assert refused.value.reason == "the block's router has score 'softmax', the preset's 'sigmoid'"


def test_a_block_without_a_capacity_says_so():
    with pytest.raises(UnsupportedOperation, match="no capacity"):
        judged("layer.capacity", RIGHT, "float32")


def test_a_place_may_join_weights_or_compute_them():
    class Fused(nn.Module):
        def __init__(self, spec):
            super().__init__()
            e, d, f = spec.router.num_experts, spec.hidden_size, spec.expert_hidden_size
            self.router = Gate(spec)
            self.up, self.down = nn.Parameter(torch.empty(e, 2 * f, d)), nn.Parameter(torch.empty(e, f, d))

        def forward(self, x):
            _, weights, experts = self.router(x)
            y = torch.zeros(x[0].shape, dtype=torch.float32)
            for e in range(len(self.up)):
                token, choice = torch.where(experts == e)
                gate, up = F.linear(x[0][token], self.up[e]).chunk(2, dim=-1)
                out = (F.silu(gate) * up) @ self.down[e]
                y = y.index_add(0, token, weights[token, choice, None] * out.float())
            return y.to(x.dtype)[None]

    names = {
        "router.weight": "gate_ED", "up": ("w1_EFD", "w3_EFD"), "down": lambda weights: weights["w2_EDF"].mT,
    }  # fmt: skip
    verdict = judged("layer.backward_free", ModuleLayer(Fused, names, router="router"), "float32")
    assert verdict.status.colour == "green", verdict


def test_the_watch_reads_scores_and_choice_and_leaves_other_calls_alone():
    x = torch.randn(5, 8)
    with Watch(8, 2) as watch:
        groups = x.view(5, 2, 4).topk(2, dim=-1).values
        scores = F.softmax(x, dim=-1)
        shared = torch.sigmoid(x[:, :1])
        _, experts = scores.topk(2, sorted=False)
    assert torch.equal(watch.scores_TE, scores)
    assert torch.equal(watch.logits_TE, x)
    assert torch.equal(watch.chosen_TK, experts)
    assert not watch.is_ordered
    assert groups.shape == (5, 2, 2)
    assert shared.shape == (5, 1)


def test_an_unsorted_choice_is_put_in_order_and_a_replayed_one_is_not():
    scores = torch.tensor([[0.1, 0.4, 0.4, 0.1]])
    with Watch(4, 3) as watch:
        torch.softmax(scores.log(), -1)
        torch.topk(scores, 3, sorted=False)
    found = watch.routing(scores.log(), torch.tensor([[0.1, 0.4, 0.5]]), torch.tensor([[3, 2, 1]]))
    assert found.experts_TK.tolist() == [[1, 2, 3]]
    assert found.weights_TK.tolist() == [[0.5, pytest.approx(0.4), pytest.approx(0.1)]]
    with Watch(4, 3, experts_TK=torch.tensor([[3, 0, 2]])) as watch:
        torch.softmax(scores.log(), -1)
        values, experts = torch.topk(scores, 3, sorted=False)
    assert experts.tolist() == [[3, 0, 2]]
    assert torch.equal(values, scores.gather(1, experts))
    assert watch.routing(scores, values, experts).experts_TK.tolist() == [[3, 0, 2]]


def test_a_router_without_scores_is_an_error_that_says_so():
    with Watch(4, 2) as watch:
        pass
    with pytest.raises(LookupError, match="no softmax or sigmoid over 4 experts"):
        watch.routing(torch.zeros(1, 4), torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.int64))


def test_in_float32_the_dtype_of_the_model_is_float32():
    spec = preset("mixtral-8x7b").router
    able = {"gate_dtype": ("float32",), "group_score": ("top2_sum",), "masked_score": (-math.inf,)}
    assert unlike(spec, able, torch.float32) == ""
    assert "gate_dtype 'float32'" in unlike(spec, able, torch.bfloat16)


def test_gradients_reach_the_given_weights():
    spec = preset("mixtral-8x7b").scaled(hidden=16, expert_hidden=8)
    torch.manual_seed(0)
    shapes = ((8, 16), (8, 8, 16), (8, 8, 16), (8, 16, 8))
    gate, *experts = (torch.randn(*shape, requires_grad=True) for shape in shapes)
    x = torch.randn(6, 16)
    weights = LayerWeights(gate, None, ExpertWeights(*experts))
    got = torch.autograd.grad(RIGHT.layer(x, weights, spec).y_TD.sum(), (gate, *experts))
    want = torch.autograd.grad(torch_ops.layer(x, weights, spec).y_TD.sum(), (gate, *experts))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
