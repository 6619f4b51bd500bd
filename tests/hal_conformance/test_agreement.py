# SPDX-License-Identifier: Apache-2.0
"""Who differs from whom, in which direction, and what it does: counted from outputs whose differences are known."""

import dataclasses
import io

import ml_dtypes
import numpy as np
import pytest
import recordings
from rich.console import Console

from hal.contract import Arithmetic, Contract
from hal.moe.presets import preset
from hal_conformance.case import Params
from hal_conformance.cases import by_name
from hal_conformance.cases.router import certain_choice, expected_logits, router_arrays
from hal_conformance.execution.judging import result
from hal_conformance.execution.plan import Task
from hal_conformance.numerics.budget import level
from hal_conformance.numerics.margins import certify
from hal_conformance.oracle.routing import scores_of
from hal_conformance.recordings.agreement import Agreement, Chooses, Held
from hal_conformance.recordings.compare import compare
from hal_conformance.recordings.packed import pack
from hal_conformance.report import agreement_table
from hal_conformance.verdicts import Judgement, Status

CONTRACT = Contract(matmul={"float32": Arithmetic(), "bfloat16": Arithmetic()})
P = Params("mixtral-8x7b", "bfloat16", "tiny")
ROUTE, PRODUCT, CURVE = (
    Task(by_name(name), P) for name in ("router.topk_set", "experts.random", "trajectory.band_ling")
)
PASS = result(PRODUCT, Judgement(Status.PASS, 0.5), "cpu", "torch", 0.0)
BF16 = np.dtype(ml_dtypes.bfloat16)


def pairs(task, *outputs, row=PASS, contracts=None):
    collected = Agreement()
    for number, returned in enumerate(outputs):
        at = collected.subject(f"d{number}", (contracts or [CONTRACT] * len(outputs))[number])
        collected.add(at, task, returned, row)
    return collected.pairs()


def shown(found):
    out = io.StringIO()
    agreement_table.show(found, Console(file=out, width=100))
    return out.getvalue()


def test_elements_are_counted_by_dtype_and_direction():
    one = {"y": np.array([1, 2, -3, 0, np.nan, 5, 0, 7], np.float32), "g": np.ones(4, BF16)}
    other = {"y": np.array([1, 1.5, -2, 0, np.nan, 6, -0.0, -7], np.float32), "g": np.ones(4, BF16)}
    (pair,) = pairs(PRODUCT, one, other)
    of = pair.elements["float32"]
    assert (of.compared, of.differing, of.smaller, of.larger) == (6, 4, 2, 1)  # a zero is no other for its sign
    assert of.bias == pytest.approx(-1 / 3)
    assert (pair.elements["bfloat16"].compared, pair.elements["bfloat16"].differing) == (4, 0)
    assert pair.elements["bfloat16"].bias is None
    assert pair.all_elements.compared == 10


def test_nan_of_other_bits_is_the_same_and_nan_against_a_number_is_not():
    quiet, other = (np.array([bits], np.uint32).view(np.float32) for bits in (0x7FC00000, 0x7FFFFFFF))
    (pair,) = pairs(PRODUCT, {"y": np.concatenate([quiet, quiet])}, {"y": np.concatenate([other, [np.float32(1)]])})
    assert pair.elements["float32"].differing == 1


def test_what_is_exact_by_design_and_what_has_another_shape_say_nothing():
    exact = dataclasses.replace(PASS, margin=None)
    assert pairs(PRODUCT, {"y": np.ones(3)}, {"y": np.zeros(3)}, row=exact)[0].elements == {}
    assert pairs(PRODUCT, {"y": np.ones(3, BF16)}, {"y": np.ones(4, BF16)})[0].elements == {}
    assert pairs(PRODUCT, {"y": np.ones(3, BF16)}, {"z": np.ones(3, BF16)})[0].elements == {}


def test_a_recording_holds_the_same_elements():
    array = np.random.default_rng(0).normal(size=(300, 40)).astype(np.float32)
    whole, packed = Held.of("y_TD", array, 3), Held.of_packed(pack("y_TD", array, 3, np.array([17])))
    assert np.array_equal(whole.values, packed.values)
    assert (whole.tag, whole.shape) == (packed.tag, packed.shape)
    assert len(whole.values) < array.size


def routed(p=P, move=0):
    """Return the oracle's choice, in which `move` tokens have another last expert, the least likely ones first."""
    inputs, spec = router_arrays(p, "router"), preset(p.preset).router
    logits = np.asarray(inputs["x_TD"], np.float64) @ np.asarray(inputs["gate_ED"], np.float64).T
    order = np.argsort(-logits, 1)
    experts = order[:, : spec.top_k].copy()
    experts[:move, -1] = order[:move, -1]
    return {"experts_TK": experts}


def test_tokens_whose_choice_is_certain_convict_a_device():
    assert isinstance(ROUTE.case, Chooses)
    (pair,) = pairs(ROUTE, routed(), routed(move=9))
    known = certain_choice(router_arrays(P, "router"), P, preset(P.preset).router, CONTRACT)
    certain = int((known.must == known.may).all(1)[:9].sum())
    assert certain > 5
    assert (pair.tokens.compared, pair.tokens.rerouted, pair.tokens.certain) == (len(known.must), 9, certain)
    assert f"{certain} certain: one device is WRONG" in shown([pair])


def test_tokens_whose_choice_is_open_by_one_of_the_contracts_convict_nobody():
    coarse = Contract(matmul={"bfloat16": Arithmetic(accumulator_bits=3, rounding="truncate")})
    (pair,) = pairs(ROUTE, routed(), routed(move=3), contracts=[CONTRACT, coarse])
    assert (pair.tokens.rerouted, pair.tokens.certain) == (3, 0)
    assert "3 open by the bounds" in shown([pair])


def test_the_order_of_the_experts_is_no_other_set():
    one = routed()
    (pair,) = pairs(ROUTE, one, {"experts_TK": one["experts_TK"][:, ::-1]})
    assert pair.tokens.rerouted == 0


def test_what_is_certain_before_a_device_has_run_holds_for_every_device_within_its_bound():
    """Logits anywhere in their bounds give no token other experts than it must have, for every kind of router."""
    rng = np.random.default_rng(0)
    for name in ("mixtral-8x7b", "ling-lite", "deepseek-v3", "ling-2.0-mini"):
        p = Params(name, "bfloat16", "small")
        spec, inputs = preset(name).router, router_arrays(p, "router")

        certain = certain_choice(inputs, p, spec, CONTRACT)
        logits = expected_logits(inputs, p, spec, CONTRACT)
        assert (certain.must == certain.may).all(1).mean() > 0.2
        for _ in range(20):
            moved = logits.value + logits.bound * rng.choice([-1.0, 1.0], logits.value.shape)
            bias = np.asarray(inputs["bias_E"], np.float64) if spec.selection_bias else None
            own = certify(scores_of(moved, spec, level(moved.size)), bias, spec)
            assert not (certain.must & ~own.may).any()
            assert not (own.must & ~certain.may).any()


def curve(*losses):
    return {"entropy": np.array(losses, np.float32), "norm": np.ones(len(losses), np.float32)}


def test_training_runs_part_at_a_step_and_by_so_much():
    same, parted, endless = pairs(CURVE, curve(3, 2, 1), curve(3, 2, 1), curve(3, 2.5, 1))[:2] + pairs(
        CURVE, curve(3, 2, 1), curve(np.inf, 2, 1)
    )
    assert (same.partings[0].first, same.partings[0].largest) == (None, 0.0)
    assert (parted.partings[0].first, parted.partings[0].largest, parted.partings[0].steps) == (2, 0.5, 3)
    assert (endless.partings[0].first, endless.partings[0].largest) == (1, None)
    assert "the same losses in all 3 steps" in shown([same])
    assert "losses differ from step 2 of 3, apart by at most 0.5" in shown([parted])
    assert not parted.elements


def test_the_table_fits_and_has_every_device():
    outputs = [{"y": np.full(8, i, np.float32)} for i in range(1, 14)]
    text = shown(pairs(PRODUCT, *outputs))
    assert max(map(len, text.splitlines())) <= 100
    assert all(f"{i + 1} d{i}" in text for i in range(13))
    assert text.count("against d0") == 12
    many = shown(pairs(PRODUCT, *outputs, *outputs[:6]))
    assert "19 devices are too many for a matrix" in many
    assert many.count("against d0") == 18
    assert shown([]) == ""


def test_where_nothing_was_compared_nothing_is_said_and_where_one_failed_it_counts():
    (pair,) = pairs(PRODUCT, {"y": np.ones(4, BF16)}, {"z": np.ones(4, BF16)})
    assert pair.all_elements.share is None
    assert shown([pair]) == ""
    failed = dataclasses.replace(PASS, status=Status.FAIL_NONFINITE, margin=None)
    collected = Agreement(["a", "b"], [CONTRACT] * 2)
    collected.add(0, PRODUCT, {"y": np.ones(4, BF16)}, PASS)
    collected.add(1, PRODUCT, {"y": np.full(4, np.nan, BF16)}, failed)
    assert collected.pairs()[0].all_elements.share == 1.0


def test_without_a_promise_no_token_is_certain():
    (pair,) = pairs(ROUTE, routed(), routed(move=9), contracts=[CONTRACT, Contract(matmul={})])
    assert (pair.tokens.rerouted, pair.tokens.certain) == (9, 0)


def test_the_cpu_is_what_others_are_compared_with():
    collected = Agreement(["x", "cpu", "y"], [CONTRACT] * 3)
    for number in range(3):
        collected.add(number, PRODUCT, {"y": np.full(4, number, BF16)}, PASS)
    text = shown(collected.pairs())
    assert (text.count("cpu against x"), text.count("y against cpu"), text.count(" against ")) == (1, 1, 2)


def test_it_is_plain_json():
    import json

    found = pairs(CURVE, curve(1, 2), curve(1, np.nan)) + pairs(
        PRODUCT, {"y": np.ones(2, BF16)}, {"y": np.zeros(2, BF16)}
    )
    text = json.dumps([pair.as_json() for pair in found], allow_nan=False)
    assert json.loads(text)[1]["elements"]["bfloat16"] == {
        "compared": 2, "differing": 2, "smaller": 2, "larger": 0, "bias": -1.0,
    }  # fmt: skip


def test_recordings_of_devices_are_shown_with_the_agreement_of_each_pair():
    one, other = (recordings.parse(recordings.make(), name) for name in ("a", "b"))
    found = compare([one, other])
    (pair,) = found.report.agreement
    assert (pair.a, pair.b) == tuple(entry["label"] for entry in found.recordings)
    assert pair.all_elements.differing == 0
    assert len(found.as_json()["agreement"]) == 1
    assert compare([one]).report.agreement == []
    assert compare([one] * 15).report.agreement == []  # too many to be shown together


@pytest.mark.parametrize("status", [Status.FAIL_STRUCTURE, Status.INVALID])
def test_outputs_that_are_not_what_a_case_asks_for_are_not_compared(status):
    row = dataclasses.replace(PASS, status=status)
    (pair,) = pairs(ROUTE, routed(), {"experts_TK": np.zeros((3, 1), np.int64)}, row=row)
    assert pair.tokens.compared == 0
