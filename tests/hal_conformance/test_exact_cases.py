# SPDX-License-Identifier: Apache-2.0
"""What the exact cases of experts and layers see, and what they leave to the device."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hal.contract import Contract
from hal_conformance import arrays as codec
from hal_conformance import inputs as make
from hal_conformance.case import Params, Unpromised
from hal_conformance.cases import by_name, designs
from hal_conformance.cases.designs import Size
from hal_conformance.cases.strided import Shifted, Sliced
from hal_conformance.faults import VARIATIONS
from hal_conformance.portable import portable
from hal_conformance.verdicts import Status

CPU = torch.device("cpu")
SATURATING = Contract(nonfinite="saturate")


def observe(name, preset, dtype, ops=portable):
    case, params = by_name(name), Params(preset, dtype, "tiny", 3)
    inputs = case.inputs(params)
    outputs = case.run(ops, {name: codec.to_torch(array, CPU) for name, array in inputs.items()}, params)
    outputs = {name: codec.from_torch(tensor) for name, tensor in outputs.items()}

    def judge(changed=None, contract=None):
        return case.judge(inputs, {**outputs, **(changed or {})}, params, contract or Contract())

    return inputs, outputs, judge


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_rows_that_must_be_infinite_are_and_may_be_nan_but_not_finite(dtype):
    inputs, outputs, judge = observe("experts.nonfinite_rows", "mixtral-8x7b", dtype)
    assert all(np.isfinite(w.astype(np.float64)).all() for name, w in inputs.items() if name.startswith("w"))
    y = outputs["y_RD"].astype(np.float64)
    infinite, nan = np.isinf(y).all(1), np.isnan(y).all(1)
    assert (infinite.sum(), nan.sum()) == (2, 1)
    assert np.isfinite(y[~infinite & ~nan]).all()
    assert np.isinf(inputs["x_RD"][infinite].astype(np.float64)).any(1).sum() == 1, "the other is finite and overflows"
    assert judge().status is Status.EXACT
    for value, status in ((np.nan, Status.EXACT), (0.0, Status.FAIL_NUMERIC), (60000.0, Status.FAIL_NUMERIC)):
        changed = outputs["y_RD"].copy()
        changed[infinite] = value
        assert judge({"y_RD": changed}).status is status
        assert judge({"y_RD": changed}, SATURATING).status is Status.EXACT
    changed = outputs["y_RD"].copy()
    changed[nan] = 0
    assert judge({"y_RD": changed}).status is Status.FAIL_NUMERIC


def test_a_nan_reaches_the_gradients_of_two_experts_and_no_other():
    _, outputs, judge = observe("experts.nan_backward", "ling-lite", "bfloat16")
    nan = np.isnan(outputs["dw2_EDF"].astype(np.float64))
    assert nan.any((1, 2)).sum() == 2
    assert nan.all((1, 2)).sum() == 1
    assert nan.any((0, 2)).sum() == nan.shape[1], "all of the one, and one row of the other"
    assert sorted(nan.all(2).sum(1))[-2:] == [1, nan.shape[1]]
    assert np.isnan(outputs["dx_RD"].astype(np.float64)).all(1).sum() == 2
    hidden = {"dw1_EFD": np.nan_to_num(outputs["dw1_EFD"].astype(np.float32)).astype(outputs["dw1_EFD"].dtype)}
    assert judge(hidden).status is Status.FAIL_NUMERIC
    assert judge(hidden, SATURATING).status is Status.EXACT


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("seed", range(5))
def test_what_the_cancelling_gradients_store_inside_is_exact_and_no_sum_needs_more_than_float32(seed, dtype):
    counts = np.array([0, 129, 1, 2, 3, 65])
    given = {n: a.astype(np.float64) for n, a in designs.backward_cancelling(Size(counts, 45, 21, dtype, seed)).items()}
    for e, end in enumerate(np.cumsum(counts)):
        rows = slice(end - counts[e], end)
        x, dy, w3, w2 = given["x_RD"][rows], given["dy_RD"][rows], given["w3_EFD"][e], given["w2_EDF"][e]
        u, dh = x @ w3.T, dy @ w2
        for stored in (u, 64 * u, dh, 64 * dh, dh * u):
            assert np.array_equal(make.store(stored, dtype).astype(np.float64), stored)
        units = np.abs((dh * u).T) @ np.abs(x) / designs.LEAST, np.abs(dh) @ np.abs(w3) / designs.LEAST
        assert max(a.max(initial=0) for a in units) < 2**24
        if counts[e] >= 3:
            assert np.array_equal(u[0], u[-1])
            assert np.array_equal(dh[0], -dh[-1])


def test_a_gradient_whose_parts_are_stored_is_seen():
    for dtype, status in (
        ("float32", Status.EXACT),
        ("bfloat16", Status.FAIL_NUMERIC),
        ("float16", Status.FAIL_NUMERIC),
    ):
        for fault in ("splits_rows_through_gate", "splits_rows_through_up", "splits_downs_gradient"):
            _, _, judge = observe("experts.backward_cancelling", "mixtral-8x7b", dtype, VARIATIONS[fault].make())
            assert judge().status is status, (fault, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("preset", ["deepseek-v2-lite", "olmoe"])
def test_a_layer_of_integers_is_compared_bit_by_bit(preset, dtype):
    _, outputs, judge = observe("layer.integers", preset, dtype)
    assert judge().status is Status.PASS
    for name in ("y_TD", "dx_TD", "dw1_EFD", "dw3_EFD", "dw2_EDF", *(n for n in outputs if n.startswith("dshared"))):
        changed = outputs[name].copy()
        at = np.unravel_index(np.abs(changed.astype(np.float64)).argmax(), changed.shape)
        changed[at] = np.nextafter(changed[at], changed.dtype.type(60000))
        assert judge({name: changed}).status is Status.FAIL_NUMERIC, name


def test_a_layer_whose_weights_are_an_ulp_off_is_judged_by_its_bounds():
    class Ulp:
        def layer(self, x_TD, weights, spec, **named):
            out = portable.layer(x_TD, weights, spec, **named)
            near = torch.nextafter(out.routing.weights_TK, out.routing.weights_TK + 1)
            return out._replace(routing=out.routing._replace(weights_TK=near))

    _, outputs, judge = observe("layer.integers", "deepseek-v2-lite", "float32", Ulp())
    y = np.nextafter(outputs["y_TD"], np.float32(60000))
    assert judge({"y_TD": y}).status is Status.PASS


def test_the_infinite_token_of_a_layer_may_have_logits_of_nan():
    class Parts:
        def layer(self, x_TD, *given, **named):
            return portable.layer(torch.where(x_TD.isinf().any(1, keepdim=True), torch.nan, x_TD), *given, **named)

    for preset in ("ling-lite", "ling-2.0-mini"):
        _, _, judge = observe("layer.degenerate", preset, "float32", Parts())
        assert judge().status.colour == "green"
        with pytest.raises(Unpromised, match="finite values"):
            judge(contract=SATURATING)


def test_a_gradient_that_was_not_asked_for_is_seen():
    _, outputs, judge = observe("experts.frozen", "ling-lite", "float32")
    verdict = judge({"unasked/w1_EFD": outputs["dw1_EFD"]})
    assert verdict.status is Status.FAIL_STRUCTURE
    assert "w1_EFD" in verdict.detail
    assert judge({"dw1_EFD": outputs["dw1_EFD"] * 2}).status is Status.FAIL_NUMERIC, "the second pass counts"


def test_a_sliced_tensor_is_the_same_and_lies_amid_nan():
    tensor = torch.arange(24.0).view(2, 3, 4)
    part = Sliced("x", by_name("experts.random")).view(tensor)
    assert torch.equal(part, tensor)
    assert not part.is_contiguous()
    assert part.storage_offset() > 0
    assert part.stride(2) == 1
    around = torch.empty(0).set_(part.untyped_storage())
    assert around.isnan().sum() == around.numel() - tensor.numel()


def test_every_count_from_0_to_257_occurs_at_every_seed_and_scale():
    for scale, seed in (("tiny", 0), ("small", 1), ("full", 2**32 - 1)):
        for name in ("experts.sweep", "experts.backward_sweep"):
            case = by_name(name)
            found = set()
            for preset in case.presets():
                inputs = case.inputs(Params(preset, "bfloat16", scale, seed))
                assert inputs["counts_E"].sum() == len(inputs["x_RD"])
                found |= set(inputs["counts_E"].tolist())
            assert found >= {*range(258), 511, 512, 513}


@pytest.mark.parametrize("count", [0, 1, 66, 96, 127, 128, 255, 256, 257, 513])
def test_a_lost_row_of_one_count_is_seen(count):
    for preset in by_name("experts.sweep").presets():
        for name, output in (("experts.sweep", "y_RD"), ("experts.backward_sweep", "dx_RD")):
            inputs, outputs, judge = observe(name, preset, "float32")
            assert judge().status is Status.EXACT
            for expert in np.flatnonzero(inputs["counts_E"] == count)[: count > 0]:
                changed = outputs[output].copy()
                changed[inputs["counts_E"][: expert + 1].sum() - 1] = 0
                assert judge({output: changed}).status is Status.FAIL_NUMERIC


@pytest.mark.parametrize("shape", [(5,), (3, 8), (2, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_a_shifted_tensor_is_dense_and_no_vector_load_of_it_is_aligned(shape, dtype):
    tensor = torch.arange(math.prod(shape)).view(shape).to(dtype)
    shifted = Shifted("x", by_name("experts.random")).view(tensor)
    assert torch.equal(shifted, tensor)
    assert shifted.is_contiguous()
    assert shifted.storage_offset() == 1
    assert shifted.data_ptr() % (2 * tensor.element_size())
