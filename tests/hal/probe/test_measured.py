# SPDX-License-Identifier: Apache-2.0
"""The contract that a measurement supports."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import hal
from hal.contract import Arithmetic, Contract
from hal.probe.contradiction import contradictions
from hal.probe.facts import UnitFacts
from hal.probe.measured import measured, measured_contract

FACTS = UnitFacts(
    "bfloat16", "bfloat16", 64, "one product after another", accumulator_bits=14, sums="toward zero", input_bits=7,
    subnormal_inputs="flushed", subnormal_results="flushed", infinity="largest", nan="+0",
)  # fmt: skip


@pytest.mark.parametrize("declared", [Arithmetic(), Arithmetic(10, "nearest", 6), Arithmetic(14, "truncate", 7)])
def test_of_a_format_that_is_declared_the_weaker_holds(declared):
    found = measured({"bfloat16": FACTS}, Contract(matmul={"bfloat16": declared}))
    assert found.matmul["bfloat16"] == Arithmetic(
        min(14, declared.accumulator_bits), "truncate", min(7, declared.input_bits or 8)
    )
    assert contradictions(replace(found, nonfinite="saturate"), {"bfloat16": FACTS}, "neither") == ()


def test_a_better_measurement_raises_no_promise():
    good = replace(FACTS, accumulator_bits=31, sums="nearest, ties to even", input_bits=8)
    declared = Contract(matmul={"bfloat16": Arithmetic(24, "truncate")})
    assert measured({"bfloat16": good}, declared).matmul == declared.matmul


def test_a_format_that_nobody_declared_is_promised_as_it_was_measured():
    found = measured({"bfloat16": FACTS}, Contract(matmul={}))
    assert found.matmul == {"bfloat16": Arithmetic(14, "truncate", 7)}
    assert found.subnormals == "flushed"


def test_subnormals_are_flushed_only_if_seen():
    kept = replace(FACTS, subnormal_inputs="kept", subnormal_results=None)
    assert measured({"bfloat16": kept}, Contract()).subnormals == "unspecified"
    assert measured({"bfloat16": kept}, Contract(subnormals="preserved")).subnormals == "preserved"


def test_tf32_says_nothing_of_float32_and_operands_of_float32_that_lose_bits_are_not_excused():
    facts = replace(FACTS, input_bits=11, subnormal_inputs="kept", subnormal_results="kept")
    assert measured({"tf32": replace(facts, format="tf32")}, Contract()).matmul == Contract().matmul
    found = measured({"float32": replace(facts, format="float32")}, Contract()).matmul["float32"]
    assert found == Arithmetic(14, "truncate")


def test_small_float16_that_counts_as_zero_is_in_the_contract():
    facts = replace(FACTS, format="float16", input_bits=11)
    honest = Arithmetic(14, "truncate", flushes_below=2.0**-14)
    silent = Contract(matmul={"float16": replace(honest, flushes_below=0.0)})
    assert measured({"float16": facts}, silent).matmul["float16"] == honest
    kept = replace(facts, subnormal_inputs="kept")
    assert measured({"float16": kept}, Contract(matmul={"float16": honest})).matmul["float16"] == honest


def test_of_a_device_that_is_a_guess_the_measurement_becomes_the_contract():
    """Hopper's FP8 sums have 14 bits; whoever guesses 24 of a chip of whose FP8 nothing is known learns it here."""
    guess = Arithmetic(rounding="truncate")
    formats = ("bfloat16", "float8_e4m3fn", "float8_e5m2")
    with hal.open_device("sim:h200") as device:
        known = device.contract
        chip = SimpleNamespace(
            torch_device=torch.device("cpu"), support=device.support,
            contract=Contract(matmul=dict.fromkeys(formats, guess), evidence="a guess", basis="assumed"),
        )  # fmt: skip
        found = measured_contract(chip)
    assert found.basis == "measured"
    assert {name: found.matmul[name] for name in formats} == {name: known.matmul[name] for name in formats}
    assert found.matmul["float16"] == known.matmul["float16"]  # nobody had declared it
    assert found.evidence.startswith("measured here, fingerprint ")
    assert found.evidence.endswith(
        "; float8_e4m3fn: the contract promises sums of 24 bits, they keep 14; "
        "float8_e5m2: the contract promises sums of 24 bits, they keep 14; a guess"
    )
