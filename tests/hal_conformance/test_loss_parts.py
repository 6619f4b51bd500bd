# SPDX-License-Identifier: Apache-2.0
"""The cases of losses and their parts: what the equations say of them, and what the cases make of wrong means."""

import numpy as np
import pytest
from in_process import CPU

from hal.contract import Contract
from hal.moe.presets import preset
from hal_conformance import arrays as codec
from hal_conformance.case import Params, Unpromised
from hal_conformance.cases import loss_parts
from hal_conformance.oracle.losses import aux_loss, z_loss
from hal_conformance.portable import portable

CASES = {case.name: case for case in loss_parts.CASES}


def observe(case, preset, seed=3):
    params = Params(preset, "float32", "tiny", seed)
    inputs = case.inputs(params)
    outputs = case.run(portable, {name: codec.to_torch(array, CPU) for name, array in inputs.items()}, params)
    return inputs, {name: codec.from_torch(tensor) for name, tensor in outputs.items()}, params


@pytest.mark.parametrize("name", loss_parts.LossParts("", "", (), "").presets())
def test_the_loss_of_all_pairs_of_parts_is_that_of_the_whole_and_that_of_micro_batches_is_not(name):
    params = Params(name, "float32", "tiny", 5)
    inputs = CASES["losses.aux_parts"].inputs(params)
    scores, experts, spec = inputs["scores_TE"], inputs["experts_TK"], preset(name).router
    whole = aux_loss(scores, experts, spec)[0].value
    parts = [(s, e) for s, e in zip(np.split(scores, 4), np.split(experts, 4), strict=True)]
    pairs = [aux_loss(s, e, spec)[0].value for s, _ in parts for _, e in parts]
    assert np.mean(pairs) == pytest.approx(whole, rel=1e-12)
    assert abs(np.mean([aux_loss(s, e, spec)[0].value for s, e in parts]) / whole - 1) > 1e-4
    logits = CASES["losses.z_parts"].inputs(params)["logits_TE"]
    halves = [z_loss(part)[0].value for part in np.split(logits, 2)]
    assert np.mean(halves) == pytest.approx(z_loss(logits)[0].value, rel=1e-12)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("name", ["ling-lite", "ling-2.0-mini"])
def test_every_output_is_judged_and_hostile_ones_are_red(case, name):
    inputs, good, params = observe(case, name)
    assert case.judge(inputs, good, params, Contract()).status.colour == "green"
    for output, array in good.items():
        for bad in (None, array[None], array * np.float32(1.001), np.full_like(array, np.nan)):
            changed = {k: v for k, v in good.items() if k != output} | ({} if bad is None else {output: bad})
            assert case.judge(inputs, changed, params, Contract()).status.colour == "red", output


def test_masks_of_infinity_are_not_asked_about_where_the_contract_replaces_them():
    case = CASES["losses.z_padding"]
    inputs, good, params = observe(case, "ling-lite")
    with pytest.raises(Unpromised, match="infinities"):
        case.judge(inputs, good, params, Contract(nonfinite="saturate"))
