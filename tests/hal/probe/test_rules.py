# SPDX-License-Identifier: Apache-2.0
"""Every simulated chip is found to be exactly its own architecture; one that differs in anything is none."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from probe_kernels import along, chain, multiplier, one_after_another

from hal.contract import Contract
from hal.matrix_unit import MATRIX_UNITS, MatrixUnit
from hal.probe import kernels, report, rules
from hal.probe.schedule import additions
from hal_sim.chips import CHIPS

INNER = 16


@pytest.fixture(scope="module")
def probed():
    return {name: report.probe(f"sim:{name}", INNER) for name in CHIPS}


def like(arch):
    """Return the architectures that nothing tells from this one."""
    return tuple(other for other in MATRIX_UNITS if dict(MATRIX_UNITS[other]) == dict(MATRIX_UNITS[arch]))


@pytest.mark.parametrize("chip", [name for name, chip in CHIPS.items() if chip.arch not in rules.GUESSES])
def test_a_simulated_chip_is_exactly_its_own_architecture_and_no_other(probed, chip):
    found = probed[chip]
    assert found.likeness == rules.Likeness(like(CHIPS[chip].arch), {})
    assert found.likeness.exact
    assert found.contradictions == ()
    assert set(found.units) == set(CHIPS[chip].units)
    assert all(each.deterministic and not each.differing_batches for each in found.kernels.values())


def test_fingerprints_are_equal_exactly_where_the_rules_are(probed):
    for one, other in combinations(CHIPS, 2):
        same_rules = dict(CHIPS[one].units) == dict(CHIPS[other].units)
        assert (probed[one].fingerprint == probed[other].fingerprint) == same_rules, (one, other)


def test_the_usual_inner_length_gives_the_same_answer():
    found = report.probe("sim:v100")
    assert found.likeness == rules.Likeness(("sm_70",), {})
    assert found.units["float16"].inner == report.INNER


@pytest.mark.parametrize("inner", [8, 9, 17, 24])
def test_products_of_8_bits_are_asked_at_the_next_inner_length_that_a_card_takes(inner):
    """Scaled products take multiples of 16 only, whatever was asked for."""
    found = report.probe("sim:l40s", inner)
    assert found.likeness.exact
    for name, unit in found.units.items():
        assert unit.inner % (16 if name.startswith("float8") else inner) == 0
    assert found.units["float8_e4m3fn"].inner == 64
    assert found.as_json()["units"]["float32"]["inner"] == inner


@pytest.mark.parametrize(("device", "seen"), [("sim:v100", 1), ("cpu", 2)])
def test_a_simulated_device_is_probed_in_one_thread_and_a_cpu_in_those_of_the_process(device, seen, monkeypatch):
    found = []

    def stop(device):
        found.append(torch.get_num_threads())
        raise RuntimeError("seen")

    monkeypatch.setattr(report, "multipliers", stop)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(RuntimeError, match="seen"):
            report.probe(device, INNER)
        assert (found, torch.get_num_threads()) == ([seen], 2)
    finally:
        torch.set_num_threads(before)


WITHOUT_A_COMPILER = """
import json, hal, torch
from hal.probe import multiplier, report
torch.set_num_threads(1)  # such small products are faster in one
found = {}
for chip in ("a100", "mi250", "mi300x"):
    with hal.open_device(f"sim:{chip}") as device:
        multiply = multiplier.multipliers(device)[0]["bfloat16"]
        found[chip] = report.unit_facts(multiply, 16, {}).as_json()
print(json.dumps(found))
"""


def test_without_a_compiler_a_chip_is_the_same(probed):
    # One format: products in float32 and float64 take the most time there.
    done = subprocess.run([sys.executable, "-c", WITHOUT_A_COMPILER], env={**os.environ, "HAL_SIM_CORE": "torch"},
                          capture_output=True, text=True, check=False, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found == {chip: replace(probed[chip].units["bfloat16"], longer={}).as_json() for chip in found}


SCHEDULES = {
    "splitk=2": "K in 2 slices", "splitk=3": "K in 3 slices", "splitk=4": "K in 4 slices", "promote=64": "K in pieces of 64",
    "promote=128": "K in pieces of 128", "splitk=2/promote=128": "K in 2 slices, each in pieces of 128",
    "splitk=2/grain=16": "K in 2 slices", "promote=16": "K in pieces of 16", "promote=32": "K in pieces of 32", "promote=8": "K in pieces of 8",
}  # fmt: skip


def test_how_k_is_shared_out_is_told_beside_the_unit_that_sums_each_piece(probed):
    found = {options: report.probe(f"sim:v100/{options}", 64) for options in SCHEDULES}
    for options, facts in found.items():
        assert facts.likeness == rules.Likeness(("sm_70",), {}, dict.fromkeys(facts.units, SCHEDULES[options])), options
    assert len({probed["v100"].fingerprint, *(facts.fingerprint for facts in found.values())}) == len(found) + 1


@pytest.mark.parametrize("options", ["h200/splitk=4", "mi300x/splitk=2", "h200/promote=32"])
def test_a_longer_k_is_asked_for_in_every_format(probed, options):
    chip, _, schedule = options.partition("/")
    found = report.probe(f"sim:{options}", INNER)
    assert found.likeness == replace(probed[chip].likeness, schedules=dict.fromkeys(found.units, SCHEDULES[schedule]))
    assert found.fingerprint != probed[chip].fingerprint


@pytest.mark.parametrize(
    ("fact", "value"),
    [("accumulator_bits", 23), ("alignment_bits", 24), ("sums", "nearest, ties to even"), ("products", "rounded"),
     ("aligned", "nearest"), ("tree", "(0 1)"), ("input_bits", 10), ("subnormal_inputs", "flushed"),
     ("infinity", "largest"), ("nan", "+0"), ("overflow_stored", "largest (2^16 as a sum)"), ("zero_signs", "-0")],
)  # fmt: skip
def test_one_fact_that_differs_is_named_and_changes_the_fingerprint(probed, fact, value):
    units = dict(probed["h200"].units)
    units["float16"] = replace(units["float16"], **{fact: value})
    found = rules.nearest(units)
    assert not found.exact
    assert found.archs == ("sm_90",)
    assert found.differences == {"float16": (fact,)}
    assert replace(probed["h200"], units=units).fingerprint != probed["h200"].fingerprint


def test_whole_products_and_other_kernels_are_part_of_the_fingerprint(probed):
    facts = probed["v100"]
    products = {**facts.products, "float16": replace(facts.products["float16"], digest="another")}
    seen = {**facts.kernels, "float16": replace(facts.kernels["float16"], single_row="other")}
    orders = {"float16": {"single row": "k descending"}}
    found = [replace(facts, **{name: value}) for name, value in
             (("products", products), ("kernels", seen), ("orders", orders))]  # fmt: skip
    assert len({facts.fingerprint, *(other.fingerprint for other in found)}) == 4
    refused = [replace(facts, kernels={"float16": replace(facts.kernels["float16"], vector=f"refused: {why}")})
               for why in ("in these words", "in others")]  # fmt: skip
    assert refused[0].fingerprint == refused[1].fingerprint != facts.fingerprint


@pytest.mark.parametrize(("fact", "value"), [("order", "x"), ("nan_bits", "7fc00001"), ("result", "float32")])
def test_names_and_the_code_of_nan_are_no_part_of_the_fingerprint(probed, fact, value):
    units = dict(probed["h200"].units)
    units["float16"] = replace(units["float16"], **{fact: value})
    assert replace(probed["h200"], units=units).fingerprint == probed["h200"].fingerprint


def test_a_format_too_many_or_too_few_is_a_difference(probed):
    units = dict(probed["a100"].units)
    more = units | {"float8_e5m2": probed["h200"].units["float8_e5m2"]}
    assert rules.nearest(more).differences["float8_e5m2"] == ("has no such unit",)
    without = {name: facts for name, facts in units.items() if name != "bfloat16"}
    assert rules.differences(without, MATRIX_UNITS["sm_80"])["bfloat16"] == ("was not measured",)
    without = {name: facts for name, facts in units.items() if name != "tf32"}
    assert rules.nearest(without).exact


def test_the_tree_of_a_rule():
    assert additions(MatrixUnit("truncated", 4), range(6)).text == "((0 1 2 3) 4 5)"
    assert additions(MatrixUnit("pairwise", 4), range(8)).text == "(((0 1) (2 3)) ((4 5) (6 7)))"
    assert additions(MatrixUnit("pairwise", 4), range(7)).text == "(((0 1) (2 3)) ((4 5) 6))"
    assert additions(MatrixUnit("fused"), range(3)).text == "((0 1) 2)"


def test_a_probe_as_json_is_plain(probed):
    data = json.loads(json.dumps(probed["a100"].as_json()))
    assert data["schema"] == "hal.probe/1"
    assert data["nearest"] == {
        "archs": ["sm_80", "sm_86"],
        "exact": True,
        "differences": {},
        "schedules": {},
        "elements": 16960,
        "differing": {},
    }
    assert data["fingerprint"] == probed["a100"].fingerprint
    assert Contract.from_json(data["contract"]) == probed["a100"].contract


def test_what_has_no_tree_is_told_with_all_that_is_known():
    facts = report.unit_facts(multiplier(lambda products: products.sum(0), "float8_e4m3fn"), INNER, {})
    assert facts.order.startswith("no tree: no product is lost")
    assert facts.tree is facts.accumulator_bits is facts.sums is None
    assert (facts.input_bits, facts.subnormal_inputs) == (4, "kept")


def test_a_longer_product_is_taken_until_a_sum_grows_often_enough():
    tree = additions(MatrixUnit("truncated", 16), range(64))

    def sum_(products):
        return along(additions(MatrixUnit("truncated", 16), range(len(products))))(products)

    facts = report.unit_facts(multiplier(sum_), INNER, {})
    assert facts.inner == 64
    assert facts.tree == tree.text


# Kernels of one device -----------------------------------------------------------------------------------------------


def floats(sum_, format="float32"):
    return multiplier(sum_, format)


def test_one_arithmetic_for_all_shapes_is_told():
    found = kernels.kernels(floats(one_after_another()))
    assert found.deterministic
    assert found.differing_batches == ()
    assert (found.single_row, found.single_column) == ("same", "same")


def test_another_order_for_a_single_row_or_column_is_told_and_found():
    up, down = one_after_another(), one_after_another(order=lambda K: range(K)[::-1])
    by_row = floats(lambda products: (down if products.shape[1] == 1 else up)(products))
    by_column = floats(lambda products: (down if products.shape[2] == 1 else up)(products))
    rows, columns = kernels.kernels(by_row), kernels.kernels(by_column)
    assert (rows.single_row, rows.single_column, rows.differing_batches) == ("other", "same", (1,))
    assert (columns.single_row, columns.single_column, columns.differing_batches) == ("same", "other", ())
    assert report._other_orders(by_row, rows, 8) == {"single row": "one product after another, k descending"}
    assert report._other_orders(by_column, columns, 8) == {"single column": "one product after another, k descending"}


def test_a_row_that_depends_on_its_batch_is_told():
    up, down = one_after_another(), one_after_another(order=lambda K: range(K)[::-1])
    found = kernels.kernels(floats(lambda products: (down if products.shape[1] < 16 else up)(products)))
    assert found.differing_batches == (1, 2, 3, 4, 8)


def test_an_order_that_changes_from_run_to_run_is_told():
    found = kernels.kernels(floats(one_after_another(order=np.random.default_rng(0).permutation)))
    assert not found.deterministic


def test_a_shape_that_is_refused_is_no_difference():
    multiply = floats(one_after_another())
    kernel = multiply.kernel

    def picky(a, b):
        if len(a) < 16:
            raise RuntimeError("rows must be\nmultiples of 16")
        return kernel(a, b)

    found = kernels.kernels(replace(multiply, kernel=picky))
    assert found.differing_batches == ()
    assert found.single_row == "refused: rows must be"


def test_a_vector_that_takes_another_kernel_is_told(monkeypatch):
    multiply = floats(one_after_another())
    monkeypatch.setattr(torch, "mv", lambda a, x: multiply.kernel(a.flip(1), x.flip(0)[:, None])[:, 0])
    assert kernels.kernels(multiply).vector == "other"
    monkeypatch.setattr(torch, "mv", lambda a, x: multiply.kernel(a, x[:, None])[:, 0])
    assert kernels.kernels(multiply).vector == "same"


def test_the_exact_product_of_the_operands_is_zero():
    a, b = kernels.operands(floats(one_after_another(), "bfloat16"))
    assert (a.shape, b.shape) == ((64, 256), (256, 64))
    by_halves = a.double()[:, :, None] * b.double()[None]
    assert not by_halves.sort(1).values.flip(1).add(by_halves.sort(1).values).count_nonzero()


class Found:
    def __init__(self, indices):
        self.indices = indices


@pytest.mark.parametrize("which", ["lower index", "higher index"])
def test_which_of_equal_numbers_is_taken_is_told(monkeypatch, which):
    def topk(x, k, dim):
        if which == "lower index":
            return Found(x.sort(dim=dim, descending=True, stable=True).indices[:, :k])
        return Found(x.shape[1] - 1 - x.flip(1).sort(dim=dim, descending=True, stable=True).indices[:, :k])

    monkeypatch.setattr(torch.Tensor, "topk", topk)
    assert kernels.topk_ties(torch.device("cpu")) == which


def test_no_rule_for_equal_numbers_is_told(monkeypatch):
    places = torch.randperm(64, generator=torch.Generator().manual_seed(0))

    def topk(x, k, dim):
        return Found(places[x[:, places].sort(dim=dim, descending=True, stable=True).indices[:, :k]])

    monkeypatch.setattr(torch.Tensor, "topk", topk)
    assert kernels.topk_ties(torch.device("cpu")) == "neither"


def test_a_kernel_of_one_order_has_the_tree_of_a_chain():
    assert report.unit_facts(multiplier(one_after_another()), INNER, {}).tree == chain(range(INNER)).text


def test_h200_and_b200_differ_in_fp8_only(probed):
    one, other = probed["h200"].units, probed["b200"].units
    assert {name for name in one if one[name].arithmetic != other[name].arithmetic} == {"float8_e4m3fn", "float8_e5m2"}


def test_a_format_that_is_not_multiplied_with_itself_is_asked_with_its_partner(probed):
    assert probed["h200"].units["float8_e5m2"].name == "float8_e5m2 by float8_e4m3fn"
    assert probed["h200"].products["float8_e5m2"].formats == ("float8_e5m2", "float8_e4m3fn")
    assert probed["mi300x"].units["float8_e5m2fnuz"].name == "float8_e5m2fnuz"  # ROCm multiplies two of it
    assert probed["h200"].likeness.exact


def test_the_cpu_keeps_the_promise_of_its_backend():
    found = report.probe("cpu", 16)
    assert found.contradictions == ()
    for name in ("float32", "bfloat16", "float16"):
        facts = found.units.get(name)
        if facts is not None and facts.sums is not None:
            assert (facts.accumulator_bits, facts.sums) == (24, "nearest, ties to even")


def test_no_device_is_shown_to_be_like_a_guess(probed):
    found = probed["ascend910b"]
    assert not set(found.likeness.archs) & rules.GUESSES
    assert not found.likeness.exact
    assert not found.contradictions
    assert found.units["tf32"].input_bits == 12
    assert "float64" in found.refused
