# SPDX-License-Identifier: Apache-2.0
"""Routing against the published equations, in one tie order, also where there is little to choose from.

Logits are fed in exactly: token t is row t of the identity and column t of the gate holds its logits.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hal.errors import ShapeError
from hal.moe import PRESETS, RouterSpec, Routing, preset
from hal.moe.torch_ops import torch_ops

Choice = tuple[list[int], list[float]]


def _route(
    logits: Sequence[Sequence[float]],
    spec: RouterSpec,
    bias: Sequence[float] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Routing:
    gate_ED = torch.tensor(logits, dtype=dtype).T
    return torch_ops.route(
        torch.eye(len(logits), dtype=dtype),
        gate_ED,
        spec,
        None if bias is None else torch.tensor(bias),
    )


# --- the equations of each model, in plain floats, written from its paper or code and not from RouterSpec ------


def _top(scores: Sequence[float], k: int) -> list[int]:
    return sorted(range(len(scores)), key=lambda e: (-scores[e], e))[:k]


def _softmax(logits: Sequence[float]) -> list[float]:
    powers = [math.exp(z) for z in logits]
    return [p / math.fsum(powers) for p in powers]


def _normalised_softmax(k: int) -> Callable[[Sequence[float], Sequence[float]], Choice]:
    def equations(logits: Sequence[float], bias: Sequence[float]) -> Choice:
        p = _softmax(logits)
        chosen = _top(p, k)
        return chosen, [p[e] / math.fsum(p[i] for i in chosen) for e in chosen]

    return equations


def _plain_softmax(k: int) -> Callable[[Sequence[float], Sequence[float]], Choice]:
    def equations(logits: Sequence[float], bias: Sequence[float]) -> Choice:
        p = _softmax(logits)
        chosen = _top(p, k)
        return chosen, [p[e] for e in chosen]

    return equations


def _deepseek_v2(logits: Sequence[float], bias: Sequence[float]) -> Choice:
    # arXiv:2405.04434, section 2.2.2: the 3 devices of 20 experts with the highest affinity, then 6 of theirs.
    p = _softmax(logits)
    devices = _top([max(p[20 * d : 20 * d + 20]) for d in range(8)], 3)
    chosen = _top([p[e] if e // 20 in devices else 0.0 for e in range(160)], 6)
    return chosen, [16.0 * p[e] for e in chosen]


def _glm_4_5(logits: Sequence[float], bias: Sequence[float]) -> Choice:
    # As DeepSeek-V3 without groups.
    s = [1.0 / (1.0 + math.exp(-z)) for z in logits]
    chosen = _top([a + b for a, b in zip(s, bias, strict=True)], 8)
    total = math.fsum(s[e] for e in chosen) + 1e-20
    return chosen, [2.5 * s[e] / total for e in chosen]


def _deepseek_v3(logits: Sequence[float], bias: Sequence[float]) -> Choice:
    # arXiv:2412.19437, eq. 12-16; nodes of 32 experts by the sum of their two highest biased affinities. Ling 2.0
    # has the same equations with the same numbers.
    s = [1.0 / (1.0 + math.exp(-z)) for z in logits]
    biased = [a + b for a, b in zip(s, bias, strict=True)]
    nodes = _top([math.fsum(sorted(biased[32 * n : 32 * n + 32])[-2:]) for n in range(8)], 4)
    chosen = _top([biased[e] if e // 32 in nodes else -math.inf for e in range(256)], 8)
    total = math.fsum(s[e] for e in chosen) + 1e-20
    return chosen, [2.5 * s[e] / total for e in chosen]


EQUATIONS: dict[str, Callable[[Sequence[float], Sequence[float]], Choice]] = {
    "ling-lite": _normalised_softmax(6),
    "ling-plus": _normalised_softmax(4),
    "ling-2.0-mini": _deepseek_v3,
    "deepseek-v2-lite": _plain_softmax(6),
    "deepseek-v2": _deepseek_v2,
    "deepseek-v3": _deepseek_v3,
    "mixtral-8x7b": _normalised_softmax(2),
    "qwen2-moe": _plain_softmax(4),
    "qwen3-moe": _normalised_softmax(8),
    "olmoe": _plain_softmax(8),
    "glm-4.5": _glm_4_5,
}


def _relative_bound(num_experts: int) -> float:
    """Relative error of a weight: |logit| <= 4 loses 4 u in the subtracted maximum's exponential and exp itself
    2 ulp (4 u), in numerator and in each term of the sum; E additions, K additions, two divisions, one factor."""
    u = 2.0**-24
    return (2 * (4 + 4) + num_experts + 8 + 3) * u


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", list(PRESETS))
def test_the_routing_of_a_preset_follows_the_equations_of_its_paper(name: str, dtype: torch.dtype) -> None:
    spec = preset(name).router
    rng = random.Random(name)
    num_experts = spec.num_experts
    # Eighths and sixteenths are exact in every dtype, and distinct ones lie far apart compared with rounding.
    logits = [[rng.randrange(-32, 33) / 8 for _ in range(num_experts)] for _ in range(16)]
    bias = [rng.randrange(-8, 9) / 64 for _ in range(num_experts)] if spec.selection_bias else None
    got = _route(logits, spec, bias, dtype)
    for t, row in enumerate(logits):
        chosen, weights = EQUATIONS[name](row, bias or [])
        assert got.experts_TK[t].tolist() == chosen
        stored = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-24}
        store = stored[str(got.weights_TK.dtype).removeprefix("torch.")]
        for value, want in zip(got.weights_TK[t].tolist(), weights, strict=True):
            # 2**-25: half the spacing of float16 below its normal range.
            assert abs(value - want) <= (_relative_bound(num_experts) + store) * want + 2.0**-25 * (store == 2.0**-11)


@pytest.mark.parametrize("name", list(PRESETS))
def test_dtypes_of_logits_scores_and_weights_are_the_declared_ones(name: str) -> None:
    spec = preset(name).router
    bias = [0.0] * spec.num_experts if spec.selection_bias else None
    got = _route([[0.0] * spec.num_experts], spec, bias, torch.bfloat16)
    casts_back = name in ("qwen2-moe", "qwen3-moe", "olmoe")
    model_gate = casts_back or name in ("ling-lite", "ling-plus", "mixtral-8x7b")
    assert got.logits_TE.dtype == (torch.bfloat16 if model_gate else torch.float32)
    assert got.weights_TK.dtype == (torch.bfloat16 if casts_back else torch.float32)
    assert (got.scores_TE.dtype, got.experts_TK.dtype) == (torch.float32, torch.int64)


# --- cases that a person can check -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "weight"),
    [
        ("ling-lite", 1 / 6),
        ("ling-plus", 1 / 4),
        ("mixtral-8x7b", 1 / 2),
        ("qwen3-moe", 1 / 8),
        ("deepseek-v2-lite", 1 / 64),
        ("olmoe", 1 / 64),
        ("qwen2-moe", 1 / 60),
        ("deepseek-v2", 16 / 160),
        ("deepseek-v3", 2.5 / 8),
        ("ling-2.0-mini", 2.5 / 8),
        ("glm-4.5", 2.5 / 8),
    ],
)
def test_equal_logits_go_to_the_first_experts_with_equal_weights(name: str, weight: float) -> None:
    spec = preset(name).router
    got = _route([[0.0] * spec.num_experts], spec, [0.0] * spec.num_experts if spec.selection_bias else None)
    assert got.experts_TK.tolist() == [list(range(spec.top_k))]
    assert got.weights_TK[0].tolist() == pytest.approx([weight] * spec.top_k, rel=_relative_bound(spec.num_experts))


def test_two_experts_three_to_one_get_three_quarters_and_one() -> None:
    logits = [-100.0] * 8
    logits[5], logits[2] = math.log(3), 0.0
    got = _route([logits], preset("mixtral-8x7b").router)
    assert got.experts_TK.tolist() == [[5, 2]]
    assert got.weights_TK[0].tolist() == pytest.approx([0.75, 0.25], rel=_relative_bound(8))


def test_the_bias_chooses_and_does_not_reach_the_weights() -> None:
    spec = preset("deepseek-v3").router
    bias = [0.0] * 256
    wanted = [200, 10, 11, 12, 13, 14, 15, 31]
    for e in wanted:
        bias[e] = 0.25
    bias[200] = 0.5
    got = _route([[0.0] * 256], spec, bias)
    assert got.experts_TK.tolist() == [wanted]
    assert got.weights_TK.tolist() == [[0.3125] * 8]  # 0.5 / (8 * 0.5) * 2.5, exact


def test_a_group_scores_the_sum_of_its_two_best_and_not_its_best() -> None:
    spec = RouterSpec(
        num_experts=8,
        top_k=2,
        score="sigmoid",
        num_groups=4,
        top_groups=1,
        group_score="top2_sum",
    )
    #            .5 + tiny        .73 + tiny       .62 + .62        .5 + .5
    logits = [0.0, -9.0, 1.0, -9.0, 0.5, 0.5, 0.0, 0.0]
    assert _route([logits], spec).experts_TK.tolist() == [[4, 5]]
    by_max = RouterSpec(num_experts=8, top_k=2, score="sigmoid", num_groups=4, top_groups=1)
    assert _route([logits], by_max).experts_TK.tolist() == [[2, 3]]


def test_with_a_mask_of_zero_an_expert_outside_the_groups_beats_one_that_scores_less() -> None:
    bias = [-2.0, -2.0, -3.0, -3.0]
    spec = {"num_experts": 4, "top_k": 2, "score": "sigmoid", "num_groups": 2, "selection_bias": True}
    by_inf = RouterSpec(**spec)  # type: ignore[arg-type]
    by_zero = RouterSpec(**spec, masked_score=0.0)  # type: ignore[arg-type]
    assert _route([[0.0] * 4], by_inf, bias).experts_TK.tolist() == [[0, 1]]
    assert _route([[0.0] * 4], by_zero, bias).experts_TK.tolist() == [[2, 3]]


# --- one tie order ---------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(data=st.data(), name=st.sampled_from(list(PRESETS)))
def test_ties_go_to_the_lower_index_for_every_preset(data: st.DataObject, name: str) -> None:
    spec = preset(name).router
    row = data.draw(
        st.lists(st.sampled_from([-1.0, 0.0, -0.0, 2.0]), min_size=spec.num_experts, max_size=spec.num_experts)
    )
    bias = [0.0] * spec.num_experts
    got = _route([row], spec, bias if spec.selection_bias else None)
    assert got.experts_TK[0].tolist() == EQUATIONS[name](row, bias)[0]


def test_negative_zero_ties_with_zero() -> None:
    from hal.moe.routing import largest

    assert largest(torch.tensor([[-0.0, 0.0, -0.0, 0.0]]), 4).tolist() == [[0, 1, 2, 3]]


def test_minus_infinities_are_chosen_last_and_by_index() -> None:
    spec = RouterSpec(num_experts=4, top_k=3, score="sigmoid", selection_bias=True)
    got = _route([[0.0] * 4], spec, [-math.inf, -math.inf, 0.0, -math.inf])
    assert got.experts_TK.tolist() == [[2, 0, 1]]


# --- bad and scarce input --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", list(PRESETS))
def test_a_token_that_is_not_finite_keeps_to_itself_and_to_distinct_experts(name: str, value: float) -> None:
    spec = preset(name).router
    torch.manual_seed(0)
    x_TD, gate_ED = torch.randn(3, 8), torch.randn(spec.num_experts, 8)
    bias_E = torch.zeros(spec.num_experts) if spec.selection_bias else None
    clean = torch_ops.route(x_TD, gate_ED, spec, bias_E)
    x_TD[1, 2] = value
    got = torch_ops.route(x_TD, gate_ED, spec, bias_E)
    chosen = got.experts_TK[1].tolist()
    assert len(set(chosen)) == spec.top_k
    assert set(chosen) <= set(range(spec.num_experts))
    if spec.score == "softmax" or math.isnan(value):
        assert got.weights_TK[1].isnan().all()
        assert chosen == list(range(spec.top_k))
    for before, after in zip(clean, got, strict=True):
        assert torch.equal(before[[0, 2]], after[[0, 2]])


@pytest.mark.parametrize("name", list(PRESETS))
def test_zero_tokens_are_routed_nowhere(name: str) -> None:
    spec = preset(name).router
    got = torch_ops.route(
        torch.zeros(0, 4),
        torch.zeros(spec.num_experts, 4),
        spec,
        torch.zeros(spec.num_experts) if spec.selection_bias else None,
    )
    assert got.experts_TK.shape == got.weights_TK.shape == (0, spec.top_k)


def test_autocast_leaves_a_float32_gate_in_float32() -> None:
    torch.manual_seed(0)
    x_TD, gate_ED = torch.randn(64, 32), torch.randn(64, 32)
    spec = preset("deepseek-v2-lite").router
    plain = torch_ops.route(x_TD, gate_ED, spec)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = torch_ops.route(x_TD, gate_ED, spec)
        assert torch_ops.route(x_TD, gate_ED, preset("olmoe").router).logits_TE.dtype == torch.bfloat16
    assert torch.equal(plain.logits_TE, cast.logits_TE)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31), name=st.sampled_from(list(PRESETS)))
def test_replaying_a_routing_gives_the_same_weights(seed: int, name: str) -> None:
    spec = preset(name).router
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(5, 8, generator=generator)
    gate_ED = torch.randn(spec.num_experts, 8, generator=generator)
    bias_E = torch.randn(spec.num_experts, generator=generator) if spec.selection_bias else None
    free = torch_ops.route(x_TD, gate_ED, spec, bias_E)
    replayed = torch_ops.route(x_TD, gate_ED, spec, experts_TK=free.experts_TK.int())
    assert all(torch.equal(a, b) for a, b in zip(free, replayed, strict=True))


def test_what_does_not_fit_is_refused() -> None:
    spec, biased = RouterSpec(num_experts=4, top_k=2), preset("deepseek-v3").router
    x_TD, gate_ED = torch.zeros(3, 5), torch.zeros(4, 5)
    for call in (
        lambda: torch_ops.route(x_TD[0], gate_ED, spec),
        lambda: torch_ops.route(x_TD, gate_ED[:3], spec),
        lambda: torch_ops.route(x_TD, torch.zeros(4, 6), spec),
        lambda: torch_ops.route(x_TD.long(), gate_ED, spec),
        lambda: torch_ops.route(x_TD, gate_ED, spec, torch.zeros(4)),
        lambda: torch_ops.route(x_TD, torch.zeros(256, 5), biased),
        lambda: torch_ops.route(x_TD, torch.zeros(256, 5), biased, torch.zeros(255)),
        lambda: torch_ops.route(x_TD, gate_ED, spec, experts_TK=torch.zeros(3, 3, dtype=torch.int64)),
        lambda: torch_ops.route(x_TD, gate_ED, spec, experts_TK=torch.zeros(3, 2)),
        lambda: torch_ops.route(x_TD, gate_ED, spec, experts_TK=torch.full((3, 2), 4)),
        lambda: torch_ops.route(x_TD, gate_ED, spec, experts_TK=torch.full((3, 2), -1)),
    ):
        with pytest.raises(ShapeError, match="route"):
            call()


@pytest.mark.parametrize("name", list(PRESETS))
def test_the_gradient_of_the_weights_is_right(name: str) -> None:
    spec = preset(name).router
    torch.manual_seed(1)
    x_TD = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    gate_ED = torch.randn(spec.num_experts, 4, dtype=torch.float64, requires_grad=True)
    bias_E = torch.zeros(spec.num_experts) if spec.selection_bias else None

    def weights(x_TD: torch.Tensor, gate_ED: torch.Tensor) -> torch.Tensor:
        return torch_ops.route(x_TD, gate_ED, spec, bias_E).weights_TK

    assert torch.autograd.gradcheck(weights, (x_TD, gate_ED))
