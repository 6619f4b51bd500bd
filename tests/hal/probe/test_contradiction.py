# SPDX-License-Identifier: Apache-2.0
"""A contract that promises more than was measured is contradicted, sentence by sentence."""

from dataclasses import replace

import pytest

from hal.contract import Arithmetic, Contract
from hal.probe.contradiction import contradictions
from hal.probe.facts import UnitFacts

FACTS = UnitFacts(
    "bfloat16", "bfloat16", 64, "one product after another", accumulator_bits=14, sums="toward zero", input_bits=7,
    subnormal_inputs="flushed", subnormal_results="flushed", infinity="3.0e+38", nan="none",
)  # fmt: skip
HONEST = Contract(
    matmul={"bfloat16": Arithmetic(14, "truncate", 7)}, subnormals="flushed", nonfinite="saturate",
    topk_ties="unspecified",
)  # fmt: skip

TOO_MUCH = {
    "bfloat16: the contract promises sums of 24 bits, they keep 14":
        {"matmul": {"bfloat16": Arithmetic(24, "truncate", 7)}},
    "bfloat16: the contract promises sums rounded to nearest, they are rounded toward zero":
        {"matmul": {"bfloat16": Arithmetic(14, "nearest", 7)}},
    "bfloat16: the contract promises operands of 8 bits, 7 survive":
        {"matmul": {"bfloat16": Arithmetic(14, "truncate")}},
    "bfloat16: the contract promises subnormal numbers, operands and results lose them": {"subnormals": "preserved"},
}  # fmt: skip


@pytest.mark.parametrize("sentence", TOO_MUCH)
def test_what_is_promised_beyond_the_truth_is_one_sentence(sentence):
    contract = replace(HONEST, **TOO_MUCH[sentence])
    assert contradictions(contract, {"bfloat16": FACTS}, "neither") == (sentence,)


def test_promised_infinities_and_nans_are_looked_for():
    assert contradictions(replace(HONEST, nonfinite="ieee"), {"bfloat16": FACTS}, "neither") == (
        "bfloat16: the contract promises infinities, one becomes 3.0e+38",
        "bfloat16: the contract promises NaN, infinity times zero is none",
    )


@pytest.mark.parametrize("ties", ["higher index", "neither"])
def test_a_promised_order_of_equal_numbers_is_looked_for(ties):
    contract = replace(HONEST, topk_ties="lower_index")
    sentence = f"the contract promises the lower index of equal numbers, top-k takes {ties}"
    assert contradictions(contract, {"bfloat16": FACTS}, ties) == (sentence,)
    assert contradictions(contract, {"bfloat16": FACTS}, "lower index") == ()


def test_an_honest_contract_and_a_modest_one_are_not_contradicted():
    assert contradictions(HONEST, {"bfloat16": FACTS}, "neither") == ()
    modest = replace(HONEST, matmul={"bfloat16": Arithmetic(8, "truncate", 4)}, subnormals="unspecified")
    assert contradictions(modest, {"bfloat16": FACTS}, "neither") == ()


def test_only_the_half_that_is_lost_is_named():
    kept = replace(FACTS, subnormal_inputs="kept")
    (found,) = contradictions(replace(HONEST, subnormals="preserved"), {"bfloat16": kept}, "neither")
    assert found.endswith("subnormal numbers, results lose them")


def test_what_was_not_measured_contradicts_nothing():
    contract = Contract(subnormals="preserved")
    unknown = UnitFacts("bfloat16", "bfloat16", 64, "no tree: sums are exact")
    assert contradictions(contract, {"bfloat16": unknown}, "neither") == ()
    assert contradictions(contract, {}, "neither") == ()
    at_least = replace(unknown, accumulator_bits=20, accumulator_at_least=True)
    assert contradictions(contract, {"bfloat16": at_least}, "neither") == ()


def test_tf32_is_measured_against_no_promise_of_float32():
    facts = replace(FACTS, format="tf32", input_bits=11, subnormal_inputs="kept", subnormal_results="kept",
                    infinity="kept", nan="7fffffff")  # fmt: skip
    assert contradictions(Contract(), {"tf32": facts}, "neither") == ()


def test_a_unit_that_takes_small_float16_for_zero_must_say_so():
    facts = replace(FACTS, format="float16", input_bits=11, subnormal_results="kept", infinity="kept", nan="7fc00000")
    honest = Arithmetic(14, "truncate", flushes_below=2.0**-14)
    assert contradictions(Contract(matmul={"float16": honest}), {"float16": facts}, "neither") == ()
    silent = Contract(matmul={"float16": replace(honest, flushes_below=0.0)})
    (found,) = contradictions(silent, {"float16": facts}, "neither")
    assert found == "float16: the contract promises all operands, those below 6.10352e-05 count as zero"


@pytest.mark.parametrize("below", [-1.0, 2.0, "0", None, True, float("nan")])
def test_a_contract_that_flushes_anything_else_is_no_contract(below):
    data = Contract(matmul={"float16": Arithmetic(flushes_below=2.0**-14)}).as_json()
    assert Contract.from_json(data).matmul["float16"].flushes_below == 2.0**-14
    data["matmul"]["float16"]["flushes_below"] = below
    with pytest.raises(ValueError, match="flushes_below of float16"):
        Contract.from_json(data)
