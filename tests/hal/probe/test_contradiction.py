# SPDX-License-Identifier: Apache-2.0
"""A contract that promises more than was measured is contradicted, sentence by sentence."""

from dataclasses import replace

import pytest

from hal.contract import Arithmetic, Contract
from hal.matrix_unit import MATRIX_UNITS
from hal.probe import report, rules
from hal.probe.contradiction import contradictions, of_architecture
from hal.probe.facts import UnitFacts
from hal_sim.chips import CHIPS

FACTS = UnitFacts(
    "bfloat16", "bfloat16", 64, "one product after another", accumulator_bits=14, sums="toward zero", input_bits=7,
    subnormal_inputs="flushed", subnormal_results="flushed", infinity="largest", nan="+0",
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
    facts = replace(FACTS, overflow_stored="nan (2^128 as a sum)")
    assert contradictions(replace(HONEST, nonfinite="ieee"), {"bfloat16": facts}, "neither") == (
        "bfloat16: the contract promises infinities, one becomes the largest number",
        "bfloat16: the contract promises infinities, a sum beyond the largest number becomes NaN (2^128 as a sum)",
        "bfloat16: the contract promises NaN, what should be one becomes +0",
    )
    assert contradictions(HONEST, {"bfloat16": facts}, "neither") == ()


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
                    infinity="kept", nan="kept")  # fmt: skip
    assert contradictions(Contract(), {"tf32": facts}, "neither") == ()


def test_a_unit_that_takes_small_float16_for_zero_must_say_so():
    facts = replace(FACTS, format="float16", input_bits=11, subnormal_results="kept", infinity="kept", nan="kept")
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


# Declared architectures ----------------------------------------------------------------------------------------------

RECORDED = ("v100", "a100", "l40s", "h200", "b200", "mi250", "mi300x")


@pytest.fixture(scope="module")
def probed():
    return {chip: report.probe(f"sim:{chip}", 16) for chip in RECORDED}


@pytest.mark.parametrize("really", RECORDED)
def test_a_device_that_has_the_arithmetic_of_another_architecture_is_contradicted(probed, really):
    facts = probed[really]
    for declared in RECORDED:
        arch = CHIPS[declared].arch
        found = replace(facts, device={**facts.device, "arch": arch}).contradictions
        if declared == really:
            assert found == ()
        else:
            others = ", ".join(facts.likeness.archs)
            assert found[0] == f"the declared architecture is {arch}, but this is the known arithmetic of {others}"


def test_what_differs_is_said_format_by_format(probed):
    found = of_architecture("sm_80", probed["h200"].units, probed["h200"].likeness)[1:]
    assert found == tuple(
        f"{format}: the declared architecture, sm_80, is known to have another order of additions; "
        f"group {of}, not {2 * of}; alignment bits 24, not 25; products under sum 24, not 25; sum under product 24, not 25"
        for format, of in (("bfloat16", 8), ("float16", 8), ("tf32", 4))
    )  # fmt: skip


def test_one_rule_that_is_not_the_declared_architectures_is_enough(probed):
    facts = probed["mi300x"]
    units = {**facts.units, "float16": replace(facts.units["float16"], products_under_sum=26)}
    assert replace(facts, units=units).contradictions == (
        "float16: the declared architecture, gfx942, is known to have products under sum 31, not 26",
    )
    tree = {**facts.units, "float16": replace(facts.units["float16"], tree=facts.units["float32"].tree)}
    (found,) = replace(facts, units=tree).contradictions
    assert found.endswith("is known to have another order of additions")


def test_whole_products_that_are_not_the_declared_architectures_are_counted(probed):
    facts = probed["h200"]
    products = {**facts.products, "bfloat16": probed["a100"].products["bfloat16"]}
    (found,) = replace(facts, products=products).contradictions
    assert found.startswith("bfloat16: of ")
    assert found.endswith(" are not what the declared architecture, sm_90, is known to make of them")


def test_an_order_that_a_library_chooses_is_no_contradiction(probed):
    facts = probed["h200"]
    units = {
        **facts.units,
        "float32": replace(facts.units["float32"], tree="(0 1)", longer={"512": "no tree: it changes"}),
    }
    assert replace(facts, units=units).contradictions == ()
    units["float32"] = replace(facts.units["float32"], zero_signs="+0 (a sum of -2^-200)")
    assert replace(facts, units=units).contradictions == ()
    assert not replace(facts, units=units).likeness.exact
    assert report.probe("sim:h200/splitk=4", 16).contradictions == ()


@pytest.mark.parametrize("arch", [None, "x86_64", "sm_999", *sorted(rules.GUESSES)])
def test_an_architecture_of_which_nothing_is_known_cannot_be_contradicted(probed, arch):
    assert arch not in MATRIX_UNITS or arch in rules.GUESSES
    assert of_architecture(arch, probed["h200"].units, probed["h200"].likeness) == ()
