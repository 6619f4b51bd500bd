# SPDX-License-Identifier: Apache-2.0
"""Honest implementations are green whatever their order of summation; wrong ones are caught, and by which case."""

import numpy as np
import pytest
import subjects_under_test as subjects
import torch

from hal.contract import Arithmetic, Contract
from hal_conformance import arrays as codec
from hal_conformance.case import Params
from hal_conformance.cases import ALL, by_name
from hal_conformance.judging import judge_outputs
from hal_conformance.plan import Task
from hal_conformance.verdicts import Status

# The first of all; one with groups, bias and sigmoid; one with two choices; one with a shared gate and weights in the
# model's dtype.
PRESETS = ("ling-lite", "ling-2.0-mini", "mixtral-8x7b", "qwen2-moe")


CPU = torch.device("cpu")


def run(case, ops, inputs, params):
    outputs = case.run(ops, {name: codec.to_torch(array, CPU) for name, array in inputs.items()}, params)
    return {name: codec.from_torch(tensor) for name, tensor in outputs.items()}


def judge(case, ops, preset, dtype, seed=0):
    params = Params(preset, dtype, "tiny", seed)
    inputs = case.inputs(params)
    return case.judge(inputs, run(case, ops, inputs, params), params, Contract())


def verdicts(ops, cases=ALL, presets=PRESETS, seed=0):
    return {
        (case.name, preset, dtype): judge(case, ops, preset, dtype, seed)
        for case in cases
        for preset in presets
        if preset in case.presets()
        for dtype in case.dtypes()
    }


@pytest.mark.parametrize("name", subjects.HONEST)
def test_an_honest_implementation_is_green_in_every_case(name):
    found = verdicts(subjects.HONEST[name], seed=1)
    assert len(found) > 150
    assert {key: v for key, v in found.items() if v.status.colour != "green"} == {}


CAUGHT_BY = {
    "drops_a_token": ("experts.integers", "FAIL-NUMERIC"),
    "swaps_two_rows": ("experts.one_hot", "FAIL-NUMERIC"),
    "leaks_bias": ("router.weights", "FAIL-NUMERIC"),
    "skips_renormalisation": ("router.weights", "FAIL-NUMERIC"),
    "combines_in_bfloat16": ("combine.random", "FAIL-NUMERIC"),
    "accumulates_in_bfloat16": ("experts.cancelling", "FAIL-NUMERIC"),
    "wrong_tie_order": ("router.tie_order", "FAIL-DISCRETE"),
    "truncates_stores": ("experts.random", "DEGRADED"),
    "truncates_the_gate": ("experts.one_hot", "FAIL-NUMERIC"),
    "flips_a_bit_of_w1": ("experts.one_hot", "FAIL-NUMERIC"),
    "flips_a_bit_of_w3": ("experts.one_hot", "FAIL-NUMERIC"),
    "flips_a_bit_of_w2": ("experts.one_hot", "FAIL-NUMERIC"),
    "bias_in_bfloat16": ("router.topk_set", "FAIL-DISCRETE"),
    "loses_tail_row": ("experts.integers", "FAIL-NUMERIC"),
    "reduced_inputs": ("experts.one_hot", "FAIL-NUMERIC"),
    "scales_one_expert": ("experts.random", "FAIL-NUMERIC"),
    "loses_a_gradient": ("experts.backward", "FAIL-NUMERIC"),
    "aux_without_k": ("losses.aux", "FAIL-NUMERIC"),
    "loses_a_row_of_one_gradient": ("experts.backward_integers", "FAIL-NUMERIC"),
    "layer_aux_of_top_k": ("layer.forward_replayed", "FAIL-NUMERIC"),
    "layer_z_of_means": ("layer.forward_replayed", "FAIL-NUMERIC"),
    "freezes_shared_gate": ("layer.backward_replayed", "FAIL-NUMERIC"),
    "freezes_shared_down": ("layer.backward_replayed", "FAIL-NUMERIC"),
    "unsorted_choices": ("router.topk_set", "FAIL-DISCRETE"),
    "masks_with_zero": ("router.negative_scores", "FAIL-DISCRETE"),
    "ignores_replay": ("router.replayed", "FAIL-DISCRETE"),
    "drops_epsilon": ("router.degenerate", "FAIL-NUMERIC"),
    "huge_tokens_everywhere": ("router.degenerate", "FAIL-DISCRETE"),
    "ignores_capacity": ("layer.capacity", "FAIL-NUMERIC"),
    "tail_of_tokens": ("combine.exact", "FAIL-NUMERIC"),
    "loses_rows_beyond_64": ("experts.integers", "FAIL-NUMERIC"),
    "silu_tails": ("experts.activation", "FAIL-NUMERIC"),
    "reads_storage": ("experts.strided", "FAIL-NUMERIC"),
    "spreads_nan": ("combine.nan_row", "FAIL-NUMERIC"),
    "low_z_loss": ("losses.z", "FAIL-NUMERIC"),
    "untrained_router": ("layer.backward_replayed", "FAIL-NUMERIC"),
}


@pytest.mark.parametrize("name", subjects.WRONG)
def test_a_wrong_implementation_is_caught_by_the_case_that_is_meant_for_it(name):
    case, status = CAUGHT_BY[name]
    found = verdicts(subjects.WRONG[name], [by_name(case)])
    assert status in {verdict.status.value for verdict in found.values()}, found


def test_a_dtype_of_which_the_contract_says_nothing_is_not_judged_and_not_green():
    silent = Contract(matmul={"float32": Arithmetic()})
    task = Task(by_name("experts.random"), Params("mixtral-8x7b", "float16", "tiny"))
    inputs = task.case.inputs(task.params)
    outputs = run(task.case, subjects.HONEST["honest"], inputs, task.params)
    verdict = judge_outputs(task, outputs, codec.digests(inputs), silent)
    assert verdict.status is Status.UNSUPPORTED
    assert "float16" in verdict.detail
    # What needs no arithmetic is judged all the same.
    moved = Task(by_name("dispatch.permutation"), task.params)
    inputs = moved.case.inputs(moved.params)
    outputs = run(moved.case, subjects.HONEST["honest"], inputs, moved.params)
    assert judge_outputs(moved, outputs, codec.digests(inputs), silent).status is Status.EXACT


def test_a_low_accumulator_in_combine_is_seen_bit_by_bit_too():
    verdict = judge(by_name("combine.exact"), subjects.WRONG["combines_in_bfloat16"], "ling-2.0-mini", "bfloat16")
    assert verdict.status is Status.FAIL_NUMERIC
    assert verdict.detectors["exact"] > 0


@pytest.mark.parametrize("seed", [2, 3])
@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_every_case_is_green_on_the_cpu_for_every_preset_and_dtype(case, seed):
    found = verdicts(subjects.HONEST["honest"], [case], case.presets(), seed)
    assert {key: v for key, v in found.items() if v.status.colour != "green"} == {}


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_hostile_outputs_get_a_red_verdict_and_never_raise(case):
    params = Params(case.presets()[0], case.dtypes()[0], "tiny", 0)
    inputs = case.inputs(params)
    good = run(case, subjects.HONEST["honest"], inputs, params)
    for name, array in good.items():
        poisoned = np.full_like(array, -7) if array.dtype == np.int64 else np.full_like(array, np.nan)
        for bad in (None, array[None], array.astype(np.complex64), poisoned):
            if bad is poisoned and array.size == 0:
                continue
            outputs = {k: v for k, v in good.items() if k != name} | ({} if bad is None else {name: bad})
            if bad is poisoned and name not in RELEVANT.get(case.name, good):
                continue
            verdict = case.judge(inputs, outputs, params, Contract())
            assert verdict.status.colour == "red", (name, bad if bad is None else bad.dtype, verdict)


RELEVANT = {
    "router.logits": ("logits_TE",),
    "router.scores": ("scores_TE",),
    "router.topk_set": ("experts_TK",),
    "router.weights": ("weights_TK", "experts_TK"),
    "router.tie_order": ("logits_TE", "experts_TK"),
    "router.negative_scores": ("experts_TK",),
    "router.degenerate": ("logits_TE", "scores_TE", "experts_TK", "weights_TK"),
    "router.backward": ("experts_TK", "weights_TK", "dx_TD", "dgate_ED"),
    "router.replayed": ("experts_TK", "weights_TK", "dx_TD", "dgate_ED"),
    "router.strided": ("logits_TE",),
    "experts.activation": ("y_RD", "dw1_EFD", "dw3_EFD"),
    "layer.nan_token": ("logits_TE", "scores_TE", "experts_TK", "weights_TK", "y_TD"),  # both losses are NaN
}


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_inputs_are_a_pure_function_of_their_parameters(case):
    params = Params(case.presets()[-1], case.dtypes()[-1], "tiny", 5)
    first, second = case.inputs(params), case.inputs(params)
    assert {k: v.tobytes() for k, v in first.items()} == {k: v.tobytes() for k, v in second.items()}
    other = case.inputs(Params(params.preset, params.dtype, "tiny", 6))
    if all(array.size for array in first.values()) and case.name != "dispatch.no_tokens":
        assert any(first[k].tobytes() != other[k].tobytes() for k in first), "the seed does nothing"
