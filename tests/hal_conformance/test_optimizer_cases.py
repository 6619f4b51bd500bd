# SPDX-License-Identifier: Apache-2.0
"""Optimisers and gradients: no order of operations leaves the bounds, hostile outputs get verdicts (faults: test_faults)."""

import in_process
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from in_process import CPU

from hal.contract import Contract
from hal.errors import ShapeError
from hal.moe.optimizer_ops import CLIP_EPSILON, AdamHyper, SGDHyper
from hal.moe.torch_ops import TorchMoEOps
from hal.moe.torch_optimizer_ops import TorchOptimizerOps
from hal_conformance import arrays as codec
from hal_conformance import inputs as make
from hal_conformance.case import Malformed, Params
from hal_conformance.cases import gradients, optimizer, tensor_lists
from hal_conformance.faults import VARIATIONS
from hal_conformance.faults.benign_optimizer import (
    AdamInterpolates,
    AdamOfApex,
    DividesAtTheEnd,
    OptimizerOneByOne,
    WideAdam,
    WrittenAdam,
)
from hal_conformance.faults.optimizer import MomentsInBfloat16
from hal_conformance.faults.written import Adam
from hal_conformance.numerics.bounds import Bounded
from hal_conformance.oracle import adam as oracle_adam
from hal_conformance.oracle.accumulation import accumulate
from hal_conformance.oracle.clipping import clip_grad_norm
from hal_conformance.verdicts import Status

CASES = {case.name: case for case in (*optimizer.CASES, *gradients.CASES)}
ALL = tuple(CASES.values())


class Honest(TorchOptimizerOps):
    """The portable implementation; the experts are those of `hal.moe`."""

    experts = TorchMoEOps().experts


def judge(case, ops, dtype, seed=0, contract=None):
    return in_process.judge(case, ops, Params(case.presets()[0], dtype, "tiny", seed), contract)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_portable_implementation_is_green_in_every_case(seed):
    found = {(case.name, dtype): judge(case, Honest(), dtype, seed) for case in ALL for dtype in case.dtypes()}
    assert len(found) == sum(len(case.dtypes()) for case in ALL)
    assert {key: verdict for key, verdict in found.items() if verdict.status.colour != "green"} == {}


def test_a_step_that_is_a_thousandth_too_long_is_caught_and_the_parameter_is_named():
    class TooLong(Adam):
        def update(self, m, v, t, h):
            return super().update(m, v, t, h) * 1.001

    verdict = judge(CASES["optimizer.adamw"], TooLong(), "float32")
    assert verdict.status is Status.FAIL_NUMERIC
    assert "parameter of dense" in verdict.detail
    assert "moment" not in verdict.detail, "the moments are right, and judged on their own"


def test_an_error_of_the_moments_does_not_count_against_the_parameters():
    verdict = judge(CASES["optimizer.adamw"], MomentsInBfloat16(), "bfloat16")
    assert "moment of" in verdict.detail
    assert "parameter of" not in verdict.detail


def test_a_contract_that_saturates_promises_nothing_of_infinite_gradients():
    from hal_conformance.case import Unpromised

    for name in (
        "optimizer.nonfinite", "optimizer.adam_nonfinite", "optimizer.sgd_nonfinite", "gradients.clip_nan",
        "gradients.clip_infinite", "gradients.accumulate_nonfinite",
    ):  # fmt: skip
        with pytest.raises(Unpromised, match="infinities"):
            judge(CASES[name], Honest(), "float32", contract=Contract(nonfinite="saturate"))


@pytest.mark.parametrize("case", CASES.values(), ids=lambda case: case.name)
def test_hostile_outputs_get_a_red_verdict_and_never_raise(case):
    params = Params(case.presets()[0], case.dtypes()[0], "tiny", 0)
    inputs = case.inputs(params)
    good = case.run(Honest(), {name: codec.to_torch(array, CPU) for name, array in inputs.items()}, params)
    good = {name: codec.from_torch(tensor) for name, tensor in good.items()}
    for name, array in good.items():
        nan = np.full_like(array, np.nan if case.name != "gradients.clip_nan" else 1.0)
        for bad in (None, array[None], array.astype(np.complex64), nan):
            outputs = {k: v for k, v in good.items() if k != name} | ({} if bad is None else {name: bad})
            with np.errstate(all="ignore"):
                assert case.judge(inputs, outputs, params, Contract()).status.colour == "red", (name, bad)


@pytest.mark.parametrize("case", CASES.values(), ids=lambda case: case.name)
def test_inputs_are_a_pure_function_of_their_parameters_and_do_not_change_in_a_run(case):
    params = Params(case.presets()[0], case.dtypes()[-1], "tiny", 5)
    first, second = case.inputs(params), case.inputs(params)
    tensors = {name: codec.to_torch(array, CPU) for name, array in second.items()}
    case.run(Honest(), tensors, params)
    assert {k: v.tobytes() for k, v in first.items()} == {k: codec.from_torch(v).tobytes() for k, v in tensors.items()}
    other = case.inputs(Params(params.preset, params.dtype, "tiny", 6))
    if case.name != "gradients.clip_zero":
        assert any(first[k].tobytes() != other[k].tobytes() for k in first), "the seed does nothing"


def test_the_idle_expert_and_tiny_gradients_are_among_the_inputs():
    params = Params("ling-lite", "float32", "tiny", 0)
    arrays = optimizer.ADAMW.inputs(params)
    assert not arrays["g/expert2"].any()
    sizes = np.abs(arrays["g/dense"])
    assert ((sizes > 0) & (sizes < 1e-12)).any()
    assert (sizes == 0).any()
    assert np.abs(arrays["g/expert0"]).max() > 20 * sizes.max()


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    beta1=st.floats(0.5, 0.99),
    beta2=st.floats(0.8, 0.9999),
    power=st.integers(-40, 10),
    step=st.integers(1, 2000),
    decay=st.sampled_from([0.0, 0.01, 0.3]),
    single=st.booleans(),
    form=st.sampled_from([WrittenAdam, AdamInterpolates, AdamOfApex, WideAdam, OptimizerOneByOne]),
)
def test_no_form_of_adamw_leaves_its_bound(seed, beta1, beta2, power, step, decay, single, form):
    hyper = AdamHyper(2.0**-7, beta1, beta2, 1e-8, decay)
    arrays = [make.normal(seed, name, 64).astype(np.float32) for name in "pgmv"]
    p, g, m, v = arrays[0], arrays[1] * np.float32(2.0**power), arrays[2], arrays[3] ** 2
    tensors = [[torch.from_numpy(a)] for a in (p, g, m, v)]
    made = form().adamw_step(*tensors, step, hyper)
    got_p, got_m, got_v = (some[0].numpy().astype(np.float64) for some in made)
    was_p, was_m, was_v, effective = (Bounded.exact(a) for a in (p, m, v, g))
    margins = []
    for reading in oracle_adam.READINGS:
        first, second = reading.betas(hyper)
        parameter = oracle_adam.parameter(
            was_p, oracle_adam.unstored(got_m), oracle_adam.unstored(got_v), step, hyper, "float32",
            decoupled=True, single=reading.single_corrections,
        )  # fmt: skip
        bounds = (
            oracle_adam.first_moment(was_m, effective, first),
            oracle_adam.second_moment(was_v, effective, second),
            parameter,
        )
        margins.append(
            [
                float((np.abs(got - b.value) / b.bound).max())
                for got, b in zip((got_m, got_v, got_p), bounds, strict=True)
            ]
        )
    assert max(min(column) for column in zip(*margins, strict=True)) <= 1.0
    del single


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), parts=st.integers(1, 6), scale=st.integers(-30, 30), ratio=st.floats(0.01, 3))
def test_no_order_of_summation_leaves_the_bound_of_the_norm(seed, parts, scale, ratio):
    sizes = make.integers(seed, "sizes", 1, 200, parts)
    gradients = [(make.normal(seed, f"g{i}", int(n)) * 2.0**scale).astype(np.float32) for i, n in enumerate(sizes)]
    total = np.float32(0)
    flat = np.concatenate(gradients)
    for square in (flat * flat)[make.permutation(seed, "order", len(flat))]:
        total = np.float32(total + square)
    norm = np.float32(np.sqrt(total))
    limit = float(norm) * ratio + 1e-30
    factor = min(np.float32(1), np.float32(np.float32(limit) / np.float32(norm + np.float32(CLIP_EPSILON))))
    expected, clipped = clip_grad_norm([g.astype(np.float64) for g in gradients], limit, "float32")
    assert abs(float(norm) - expected.value) <= expected.bound
    for g, bounded in zip(gradients, clipped, strict=True):
        assert (np.abs((g * factor).astype(np.float64) - bounded.value) <= bounded.bound).all()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), tokens=st.lists(st.integers(0, 500), min_size=1, max_size=9).filter(sum))
def test_the_sum_over_micro_batches_is_the_whole_batch(seed, tokens):
    parts = [make.normal(seed, f"part{i}", 40).astype(np.float32) for i in range(len(tokens))]
    expected = accumulate([part.astype(np.float64) for part in parts], tokens).stored("float32")
    for ops in (Honest(), DividesAtTheEnd()):
        (got,) = ops.accumulate_gradients([[torch.from_numpy(part)] for part in parts], tokens)
        assert (np.abs(got.numpy() - expected.value) <= expected.bound).all()


def test_what_does_not_fit_together_is_refused():
    ops, one, two = TorchOptimizerOps(), [torch.zeros(3)], [torch.zeros(4)]
    with pytest.raises(ShapeError, match="step is 0"):
        ops.adamw_step(one, one, one, one, 0, AdamHyper(0.1))
    with pytest.raises(ShapeError, match="expected: the same"):
        ops.sgd_step(one, two, one, 1, SGDHyper(0.1))
    for parts, tokens in (([], []), ([one], []), ([one], [0])):
        with pytest.raises(ShapeError, match="token counts"):
            ops.accumulate_gradients(parts, tokens)


def test_the_portable_implementation_is_torchs_own_optimiser():
    p, g = torch.randn(7, generator=torch.Generator().manual_seed(0)), torch.ones(7)
    theirs = torch.nn.Parameter(p.clone())
    optimiser = torch.optim.AdamW([theirs], lr=0.1, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.2)
    ours, m, v = [p], [torch.zeros(7)], [torch.zeros(7)]
    for step in (1, 2, 3):
        theirs.grad = g * step
        optimiser.step()
        ours, m, v = TorchOptimizerOps().adamw_step(ours, [g * step], m, v, step, AdamHyper(0.1, 0.8, 0.9, 1e-6, 0.2))
    assert torch.equal(ours[0], theirs.detach())
    # SGD without momentum keeps what its momentum would have been, at every step.
    for step in (1, 2):
        made = TorchOptimizerOps().sgd_step([p], [g], [torch.zeros(7)], step, SGDHyper(0.5, weight_decay=2.0))
        assert torch.equal(made.momentum[0], g + 2.0 * p)


@pytest.mark.parametrize(
    ("fault", "case"),
    [
        ("norm_of_one_table", "gradients.clip_many"),
        ("steps_no_empty_tensors", "optimizer.adamw_many"),
        ("epsilon_is_raised", "optimizer.adamw_many"),
        ("epsilon_is_lowered", "optimizer.adamw_late"),
        ("epsilon_is_lowered", "optimizer.adam_nonfinite"),
        ("large_epsilon_inside_the_root", "optimizer.adamw_late"),
        ("takes_no_rate_for_the_default", "optimizer.adamw_schedule"),
        ("takes_no_rate_for_the_default", "optimizer.adam_schedule"),
        ("plain_takes_no_rate_for_the_default", "optimizer.sgd_schedule"),
        ("rate_is_limited", "optimizer.adamw_schedule"),
        ("takes_no_beta_for_the_default", "optimizer.adam_schedule"),
        ("takes_no_second_beta_for_the_default", "optimizer.adamw_schedule"),
        ("second_beta_is_raised", "optimizer.adamw_schedule"),
        ("plain_sgd_forgets_decay", "optimizer.sgd_schedule"),
        ("plain_sgd_dampens", "optimizer.sgd_schedule"),
        ("clips_to_infinity", "gradients.clip_unlimited"),
        ("counts_tokens_in15_bits", "gradients.accumulate_17"),
        ("counts_tokens_in16_bits", "gradients.accumulate_17"),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_fault_is_caught_by_the_case_that_is_meant_for_it(fault, case, dtype):
    ops = VARIATIONS[fault].make()
    if fault == "steps_no_empty_tensors":
        with pytest.raises(RuntimeError, match="no threads"):
            judge(CASES[case], ops, dtype)
    else:
        assert judge(CASES[case], ops, dtype).status is Status.FAIL_NUMERIC


@pytest.mark.parametrize(
    ("fault", "case", "status"),
    [
        ("gradients_of_the_parameters_dtype", "optimizer.adamw_mixed", Status.FAIL_NUMERIC),
        ("steps_in_the_first_dtype", "optimizer.adam_mixed", Status.FAIL_STRUCTURE),
        ("steps_in_the_first_precision", "optimizer.sgd_mixed", Status.FAIL_NUMERIC),
        ("steps_no_scalars", "optimizer.adamw_mixed", Status.FAIL_NUMERIC),
        ("clips_no_scalars", "gradients.clip_mixed", Status.FAIL_NUMERIC),
        ("clips_up_to_three_axes", "gradients.clip_mixed", Status.FAIL_NUMERIC),
        ("clips_in_the_first_dtype", "gradients.clip_mixed", Status.FAIL_STRUCTURE),
        ("accumulates_in_the_first_dtype", "gradients.accumulate_mixed", Status.FAIL_NUMERIC),
        ("clips_no_empty_list", "gradients.clip_mixed", None),
    ],
)
def test_a_fault_of_mixed_lists_is_caught_by_the_case_that_is_meant_for_it(fault, case, status):
    ops = VARIATIONS[fault].make()
    if status is None:
        with pytest.raises(IndexError):
            judge(CASES[case], ops, "bfloat16")
    else:
        assert judge(CASES[case], ops, "bfloat16").status is status


@pytest.mark.parametrize(
    ("operator", "returned"),
    [
        ("clip_grad_norm", ([], torch.ones(()))), ("clip_grad_norm", ([torch.zeros(1)], torch.zeros(()))),
        ("accumulate_gradients", [torch.zeros(0)]), ("sgd_step", ([], [torch.zeros(0)])),
    ],
)  # fmt: skip
def test_what_comes_back_of_no_tensors_is_no_tensor_and_a_norm_of_zero(operator, returned):
    with pytest.raises(Malformed, match="of no tensors"):
        tensor_lists.of_none(operator, lambda *_: returned)
    tensor_lists.of_none(operator, getattr(TorchOptimizerOps(), operator))
