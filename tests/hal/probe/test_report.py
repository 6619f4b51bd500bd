# SPDX-License-Identifier: Apache-2.0
"""Every simulated device is found to be what its rules say, and a contract that promises too much is contradicted."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from types import MappingProxyType

import pytest
import torch

import hal
from hal.contract import Arithmetic, Contract
from hal.matrix_unit import MATRIX_UNITS
from hal.probe import kernels, report
from hal.probe.contradiction import contradictions, measured
from hal.probe.multiplier import Multiplier
from hal_sim.chips import CHIPS


@pytest.fixture(scope="module")
def probed():
    return {name: report.probe(f"sim:{name}") for name in CHIPS}


@pytest.mark.parametrize("chip", CHIPS)
def test_a_simulated_device_is_found_to_be_its_own_architecture(chip, probed):
    found = probed[chip]
    arch = CHIPS[chip].arch
    alike = {other for other, rules in MATRIX_UNITS.items() if numbers(rules) == numbers(MATRIX_UNITS[arch])}
    assert found.likeness.exact, found.likeness
    assert set(found.likeness.archs) == alike
    assert found.contradictions == ()
    assert set(found.units) == set(MATRIX_UNITS[arch])
    assert all(each.deterministic and not each.differing_batches for each in found.kernels.values())


def numbers(rules):
    return {name: replace(unit, evidence="unverified") for name, unit in rules.items()}


def test_two_devices_share_a_fingerprint_exactly_if_their_rules_are_alike(probed):
    for one in CHIPS:
        for other in CHIPS:
            alike = numbers(MATRIX_UNITS[CHIPS[one].arch]) == numbers(MATRIX_UNITS[CHIPS[other].arch])
            assert (probed[one].fingerprint == probed[other].fingerprint) == alike, (one, other)


def test_h200_and_b200_differ_in_fp8_only(probed):
    one, other = probed["h200"].units, probed["b200"].units
    assert {name for name in one if one[name].arithmetic != other[name].arithmetic} == {"float8_e4m3fn", "float8_e5m2"}


def test_without_a_compiler_the_same_is_found(probed):
    program = "from hal.probe.report import probe; print(probe('sim:v100').fingerprint)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True,
                          env={**os.environ, "HAL_SIM_CORE": "torch"})  # fmt: skip
    assert done.stdout.strip() == probed["v100"].fingerprint


def test_split_k_changes_the_order_and_nothing_else(probed):
    found = report.probe("sim:a100/splitk=2/grain=16")
    for name, facts in found.units.items():
        one, other = dict(facts.arithmetic), dict(probed["a100"].units[name].arithmetic)
        if facts.inner == probed["a100"].units[name].inner:
            assert one.pop("tree") != other.pop("tree")
            # Two slices are too few moments for some questions.
            assert all(value in (None, other[key]) for key, value in one.items()), name
    assert not found.likeness.exact


def test_the_cpu_multiplies_in_float32_and_rounds_to_nearest():
    found = report.probe("cpu")
    assert found.contradictions == ()
    for name in ("float32", "bfloat16", "float16"):
        facts = found.units[name]
        if facts.tree is not None:
            assert (facts.accumulator_bits, facts.sums) == (24, "nearest, ties to even")
    assert found.as_json()["schema"] == "hal.probe/1"


# The contract -----------------------------------------------------------------------------------------------------------


GREEDY = Contract(
    matmul={"bfloat16": Arithmetic(accumulator_bits=25), "float16": Arithmetic(rounding="nearest")},
    subnormals="preserved", topk_ties="lower_index",
)  # fmt: skip


def test_each_promise_that_is_not_kept_is_one_sentence(probed):
    units = dict(probed["mi250"].units) | {"float16": probed["h200"].units["float16"]}
    units["float32"] = replace(units["float32"], input_bits=11, infinity="nan", nan="none")
    contract = replace(GREEDY, matmul={**GREEDY.matmul, "float32": Arithmetic()})
    found = "\n".join(contradictions(contract, units, "neither"))
    for sentence in (
        "bfloat16: the contract promises sums of 25 bits, they keep 24",
        "float16: the contract promises sums rounded to nearest, they are rounded toward zero",
        "float32: the contract promises operands of 24 bits, 11 survive",
        "bfloat16: the contract promises subnormal numbers, operands and results lose them",
        "float32: the contract promises infinities, one becomes nan",
        "float32: the contract promises NaN, infinity times zero is none",
        "the contract promises the lower index of equal numbers, top-k takes neither",
    ):
        assert sentence in found
    assert len(found.splitlines()) == 7


def test_what_was_measured_and_what_is_declared_give_the_weaker_of_both(probed):
    found = measured(probed["h200"].units, GREEDY)
    assert found.matmul["bfloat16"] == Arithmetic(accumulator_bits=24, rounding="truncate")
    assert found.matmul["float8_e4m3fn"] == Arithmetic(accumulator_bits=14, rounding="truncate")  # nobody declared it
    assert found.subnormals == "preserved"
    assert measured(probed["mi250"].units, GREEDY).subnormals == "flushed"
    weak = Contract(matmul=MappingProxyType({"bfloat16": Arithmetic(accumulator_bits=11, rounding="truncate")}))
    assert measured(probed["h200"].units, weak).matmul["bfloat16"].accumulator_bits == 11
    assert contradictions(found, probed["h200"].units, "lower index") == ()


# One arithmetic for all shapes --------------------------------------------------------------------------------------------


def multiplier(kernel):
    return Multiplier("float32", torch.device("cpu"), kernel, torch.float32, torch.float32)


def in_order(a, b, order=slice(None)):
    total = torch.zeros(a.shape[0], b.shape[1])
    for k in torch.arange(a.shape[1])[order].tolist():
        total = total + a[:, k : k + 1] * b[k]
    return total


def test_another_kernel_for_one_row_is_seen():
    other = torch.arange(255, -1, -1)
    found = kernels.kernels(multiplier(lambda a, b: in_order(a, b, other if len(a) == 1 else slice(None))))
    assert (found.deterministic, found.differing_batches) == (True, (1,))
    assert (found.single_row, found.single_column) == ("other", "same")


def test_another_kernel_for_few_rows_and_a_refusal_are_seen():
    other = torch.arange(255, -1, -1)

    def kernel(a, b):
        if b.shape[1] == 1:
            raise RuntimeError("N must be a multiple of 16\nat line 3")
        return in_order(a, b, other if len(a) <= 4 else slice(None))

    found = kernels.kernels(multiplier(kernel))
    assert found.differing_batches == (1, 2, 3, 4)
    assert found.single_column == "refused: N must be a multiple of 16"


def test_results_that_change_from_run_to_run_are_seen():
    found = kernels.kernels(multiplier(lambda a, b: in_order(a, b, torch.randperm(256))))
    assert not found.deterministic


@pytest.mark.parametrize(("order", "name"), [(1, "lower index"), (-1, "higher index"), (0, "neither")])
def test_ties_of_top_k(order, name, monkeypatch):
    def topk(self, k, dim):
        places = torch.arange(64) if order else torch.randperm(64)
        ranked = (self * 128 - places * (order or 1)).sort(dim, descending=True).indices[:, :k]
        return type("Found", (), {"indices": ranked})

    monkeypatch.setattr(torch.Tensor, "topk", topk)
    assert kernels.topk_ties(torch.device("cpu")) == name


def test_a_device_that_cannot_be_opened_is_an_error():
    with pytest.raises(hal.errors.HalError):
        report.probe("sim:nothing")
