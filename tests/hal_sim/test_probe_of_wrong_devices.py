# SPDX-License-Identifier: Apache-2.0
"""A device that is wrong in one thing is not taken for the one that it says it is."""

import functools
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner

import hal
from hal.cli.main import main
from hal.contract import Contract
from hal.probe import kernels, report, rules, whole
from hal.probe.contradiction import contradictions
from hal.probe.facts import fingerprint
from hal.probe.multiplier import Multiplier, multipliers
from hal.probe.schedule import Pieces
from hal.probe.unit import unit_facts
from hal_sim import native, product, simulation, twin
from hal_sim.chips import CHIPS

INNER = 64


def normalised(of_terms):
    """Return what prepares terms from products whose exponents are their own."""

    def prepared(terms, unit):
        own = torch.where(terms.products == 0, twin._NONE, terms.products.frexp().exponent - 1)
        return of_terms(twin._Terms(terms.products, torch.maximum(terms.exponents, own)), unit)

    return prepared


def floored_at(bits, how=torch.floor):
    """Return the step of CDNA3 with products that keep other bits below c."""

    def step(total, of_products, c, unit):
        of_c = twin._exponent(c, -126).clamp(min=-126)
        both = torch.maximum(of_products, of_c)
        kept = how(twin._shifted(total, of_products - both + bits - unit.fraction_bits))
        addend = (c * twin._power(24 - both)).floor()
        return twin._shifted(twin._shifted(kept, torch.tensor(31 - bits)) + addend * 128, both - 31).float()

    return step


def chain(prepared, step, limit=2.0**128):
    return twin._aligning(prepared, step, limit)


WRONG = {
    "h200, normalised products": ("h200", "truncated", chain(normalised(twin._of_truncated), twin._truncated, torch.inf), "exponents"),
    "a100, normalised products": ("a100", "truncated", chain(normalised(twin._of_truncated), twin._truncated, torch.inf), "exponents"),
    "mi300x, normalised products": ("mi300x", "floored", chain(normalised(twin._of_floored), twin._floored), "exponents"),
    "mi300x, 26 bits": ("mi300x", "floored", chain(twin._of_floored, floored_at(26)), "products_under_sum"),
    "mi300x, 28 bits": ("mi300x", "floored", chain(twin._of_floored, floored_at(28)), "products_under_sum"),
    "mi300x, 32 bits": ("mi300x", "floored", chain(twin._of_floored, floored_at(32)), "products_under_sum"),
    "mi300x, cut": ("mi300x", "floored", chain(twin._of_floored, floored_at(31, torch.trunc)), "rest_under_sum"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    """Such small products are faster in one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def without_a_compiler(monkeypatch):
    monkeypatch.setattr(native, "library", lambda: None)


def probed(chip, format):
    with hal.open_device(f"sim:{chip}") as device:
        multiply = multipliers(device)[0][format]
        facts = unit_facts(multiply, INNER)
        return facts, whole.products(multiply, facts.inner)


def differences(chip, found):
    facts, products = found
    unit = rules.MATRIX_UNITS[CHIPS[chip].arch][facts.format]
    wrong, elements = whole.differing(products, unit, rules.pieces(facts, unit))
    assert elements == 4 * 1024 + 64
    return rules.differences({facts.format: facts}, {facts.format: unit})[facts.format], wrong > 0


@functools.cache
def right(chip, format):
    return probed(chip, format)


@pytest.mark.parametrize("name", WRONG)
def test_one_rule_that_is_broken_is_named(name, monkeypatch, without_a_compiler):
    chip, kind, wrong, fact = WRONG[name]
    assert differences(chip, right(chip, "bfloat16")) == ((), False)
    monkeypatch.setitem(twin._CHAINS, kind, wrong)
    assert differences(chip, probed(chip, "bfloat16")) == ((fact,), True)


# Kernels around a right unit -----------------------------------------------------------------------------------------

CPU = torch.device("cpu")


def stored_as_it_is(x, dtype):
    return x.to(dtype)


def multiplier(unit, format, stored=stored_as_it_is, change=lambda x: x, order=None, change_b=None, partner=None):
    """Return a product that a unit computes, with other operands, in another order, or stored in another way."""
    dtype = getattr(torch, format)
    result = torch.float32 if format.startswith("float8") else dtype
    change_b = change_b or change

    def kernel(a, b):
        if order is not None:
            at = order(a.shape[1])
            a, b = a[:, at], b[at]
        formats = (format, partner or format)
        return stored(product.multiply(change(a)[None], change_b(b)[None], unit, formats)[0], result)

    return Multiplier(format, CPU, kernel, dtype, result, partner=partner)


def cut(x, dtype):
    return (x.view(torch.int32) & -(1 << 16)).view(torch.float32).to(dtype)


def flushed(x):
    return torch.where(x.abs() < torch.finfo(x.dtype).smallest_normal, 0.0, x)


def saturated(x, dtype):
    most = torch.finfo(dtype).max
    return x.clamp(-most, most).to(dtype)


def odd_after_even(K):
    return [*range(0, K, 2), *range(1, K, 2)]


def one_bit_off(x, dtype):
    """Return one element in a thousand otherwise, and none that a question is about."""
    unlikely = (x.view(torch.int32) & 0x3FF) == 0x155
    return torch.where(unlikely, x * (1 + 2.0**-6), x).to(dtype)


AROUND = {
    "nothing wrong": ({}, {}, ()),
    "results are cut": ({}, {"stored": cut}, ("stored", "overflow_stored")),
    "operands are flushed": ({}, {"change": flushed}, ("subnormal_inputs",)),
    "groups of 8": ({"group": 8}, {}, ("tree", "group")),
    "24 bits": ({"fraction_bits": 24}, {}, ("alignment_bits", "products_under_sum", "sum_under_product")),
    "even products first": ({}, {"order": odd_after_even}, ("tree", "longer")),
    "k descending": ({}, {"order": lambda K: list(range(K))[::-1]}, ("tree", "longer")),
    "infinities are the largest number": ({}, {"stored": saturated}, ("overflow_stored", "infinity")),
    "infinities are NaN": (
        {},
        {"stored": lambda x, dtype: torch.where(x.isinf(), torch.nan, x).to(dtype)},
        ("overflow_stored", "infinity"),
    ),
    "NaN is zero": ({}, {"stored": lambda x, dtype: torch.where(x.isnan(), 0.0, x).to(dtype)}, ("nan",)),
    "some bits are off": ({}, {"stored": one_bit_off}, ()),
}


@pytest.mark.parametrize("name", AROUND)
def test_what_is_wrong_around_a_unit_is_named_or_counted(name):
    changes, around, facts = AROUND[name]
    unit = rules.MATRIX_UNITS["sm_90"]["bfloat16"]
    multiply = multiplier(replace(unit, **changes), "bfloat16", **around)
    found = unit_facts(multiply, INNER)
    assert rules.differences({"bfloat16": found}, {"bfloat16": unit}) == {"bfloat16": facts}
    if "tree" not in facts:
        wrong, _ = whole.differing(whole.products(multiply, INNER), unit, rules.pieces(found, unit))
        # Random numbers have neither infinities nor NaN among them.
        assert (wrong > 0) == (name != "nothing wrong" and facts not in (("overflow_stored", "infinity"), ("nan",)))


# Ends of the range ---------------------------------------------------------------------------------------------------


def finite_saturates(x, dtype):
    """Return a finite sum as the largest number at most, and an infinite one as it is."""
    most = torch.finfo(dtype).max
    return torch.where(x.isfinite(), x.clamp(-most, most), x).to(dtype)


def nan_for_infinity(x, dtype):
    """Return NaN for a finite sum that is stored as infinity."""
    stored = x.to(dtype)
    return torch.where(stored.isinf() & x.isfinite(), torch.nan, stored)


def replaced(where, by):
    """Return a change of operands."""

    def change(x):
        wide = x.float()
        return torch.where(where(wide), torch.as_tensor(by(x.dtype), dtype=torch.float32), wide).to(x.dtype)

    return change


def same(x):
    return x


def most(dtype):
    return torch.finfo(dtype).max


def least(dtype):
    return torch.finfo(dtype).min


def nothing(dtype):
    return 0.0


def positive_nan(x):
    return x.isnan() & ~x.signbit()


def negative_nan(x):
    return x.isnan() & x.signbit()


BEYOND = {
    "float16 saturates": ("float16", {"stored": finite_saturates}, {"overflow_stored": "largest"}),
    "bfloat16 saturates finite sums": ("bfloat16", {"stored": finite_saturates},
        {"overflow_stored": "largest (2^128 - 2^118, -2^128 + 2^118)"}),
    "float16 overflows to NaN": ("float16", {"stored": nan_for_infinity}, {"overflow_stored": "nan"}),
    "bfloat16 overflows to NaN": ("bfloat16", {"stored": nan_for_infinity},
        {"overflow_stored": "nan (2^128 - 2^118, -2^128 + 2^118)"}),
    "only positive float16 saturates": ("float16", {"stored": lambda x, dtype: x.clamp(max=65504.0).to(dtype)},
        {"overflow_stored": "largest (2^16 as a product, 2^16 as a sum, 2^16 - 2^3)",
         "infinity": "largest (infinity in a, infinity in b)"}),
    "float32 saturates": ("float32", {"stored": saturated},
        {"overflow_stored": "largest", "infinity": "largest"}),
    "-infinity in a is the lowest": ("bfloat16",
        {"change": replaced(lambda x: x == -torch.inf, least), "change_b": same},
        {"infinity": "largest (-infinity in a)",
         "nan": "infinity (infinity - infinity, -infinity + infinity)"}),
    "infinity in b is the largest": ("float16",
        {"change_b": replaced(lambda x: x == torch.inf, most)},
        {"infinity": "largest (infinity in b)", "nan": "+0 (0 * infinity)"}),
    "infinity in b is zero": ("float16", {"change_b": replaced(torch.isinf, nothing)},
        {"infinity": "+0 (infinity in b, -infinity in b)", "nan": "+0 (0 * infinity)"}),
    "NaN in b is zero": ("bfloat16", {"change_b": replaced(torch.isnan, nothing)},
        {"nan": "+0 (NaN in b, -NaN in b)"}),
    "NaN in a is zero": ("float16", {"change": replaced(torch.isnan, nothing), "change_b": same},
        {"nan": "+0 (NaN in a, -NaN in a)"}),
    "NaN in a is the largest": ("bfloat16", {"change": replaced(torch.isnan, most), "change_b": same},
        {"nan": "largest (NaN in a, -NaN in a)"}),
    "positive NaN of bfloat16 is zero": ("bfloat16", {"change": replaced(positive_nan, nothing), "change_b": same},
        {"nan": "+0 (NaN in a)"}),
    "negative NaN of float32 is zero": ("float32", {"change_b": replaced(negative_nan, nothing)},
        {"nan": "+0 (-NaN in b)"}),
    "negative NaN of e4m3 in b is zero": ("float8_e4m3fn", {"change_b": replaced(negative_nan, nothing)},
        {"nan": "+0 (-NaN in b)"}),
    "NaN of e4m3 beside e5m2 is zero": ("float8_e5m2",
        {"change_b": replaced(torch.isnan, nothing), "partner": "float8_e4m3fn"},
        {"nan": "+0 (NaN in b, -NaN in b)"}),
    "-infinity of e5m2 beside e4m3 is the lowest": ("float8_e5m2",
        {"change": replaced(lambda x: x == -torch.inf, least), "change_b": same, "partner": "float8_e4m3fn"},
        {"infinity": "-57344.0 (-infinity in a)", "nan": "infinity (infinity - infinity, -infinity + infinity)"}),
    "-0 of float16 is +0": ("float16", {"stored": lambda x, dtype: x.to(dtype) + 0.0}, {"zero_signs": "+0 (-2^-27)"}),
    "-0 of bfloat16 is +0": ("bfloat16", {"stored": lambda x, dtype: x.to(dtype) + 0.0},
        {"zero_signs": "+0 (-2^-136)"}),
    "-0 of float32 is +0": ("float32", {"stored": lambda x, dtype: x + 0.0}, {"zero_signs": "+0 (a sum of -2^-200)"}),
    "-0 of float64 is +0": ("float64", {"stored": lambda x, dtype: x + 0.0}, {"zero_signs": "+0 (a sum of -2^-2000)"}),
    "+0 of e4m3 is -0": ("float8_e4m3fn", {"stored": lambda x, dtype: torch.where(x == 0, -0.0, x)},
        {"zero_signs": "-0"}),
}  # fmt: skip


@functools.cache
def right_facts(format, partner):
    return unit_facts(multiplier(rules.MATRIX_UNITS["sm_90"][format], format, partner=partner), 16, {})


@pytest.mark.parametrize("name", BEYOND)
def test_what_becomes_of_numbers_at_the_ends_of_the_range_is_in_the_facts(name):
    format, around, wrong = BEYOND[name]
    unit = rules.MATRIX_UNITS["sm_90"][format]
    right = right_facts(format, around.get("partner"))
    assert rules.differences({format: right}, {format: unit}) == {format: ()}
    found = unit_facts(multiplier(unit, format, **around), 16, {})
    assert found.as_json() | {"nan_bits": None} == right.as_json() | wrong | {"nan_bits": None}
    assert set(rules.differences({format: found}, {format: unit})[format]) == set(wrong)
    assert fingerprint({format: found}) != fingerprint({format: right})
    sentences = contradictions(Contract(matmul={}), {format: found}, "neither")
    assert len(sentences) == len(wrong) - ("zero_signs" in wrong)


def test_infinity_less_infinity_is_a_nan_of_its_own():
    """A kernel that counts infinities by their sign, and takes the more frequent one."""
    unit = rules.MATRIX_UNITS["sm_90"]["bfloat16"]
    right = multiplier(unit, "bfloat16")

    def kernel(a, b):
        c = right.kernel(a, b)
        from_nan = a.isnan().any(1)[:, None] | b.isnan().any(0)[None]
        times_zero = (a.isinf().float() @ (b == 0).float() + (a == 0).float() @ b.isinf().float()) > 0
        return torch.where(c.isnan() & ~from_nan & ~times_zero, torch.inf, c)

    found = unit_facts(replace(right, kernel=kernel), 16, {})
    assert found.nan == "infinity (infinity - infinity, -infinity + infinity)"
    assert rules.differences({"bfloat16": found}, {"bfloat16": unit}) == {"bfloat16": ("nan",)}


@pytest.mark.parametrize("format", ["float16", "float8_e4m3fn"])
def test_products_of_a_unit_that_cuts_one_bit_too_many_are_counted_in_every_format(format):
    unit = rules.MATRIX_UNITS["sm_90"][format]
    pieces = {INNER: Pieces(0, INNER), whole.LONG: Pieces(0, whole.LONG)}
    found = whole.products(multiplier(replace(unit, fraction_bits=unit.fraction_bits - 1), format), INNER)
    assert whole.differing(found, unit, pieces)[0] > 100


def test_a_single_row_with_a_kernel_of_its_own_is_part_of_the_fingerprint():
    unit = rules.MATRIX_UNITS["sm_90"]["bfloat16"]
    right, other = multiplier(unit, "bfloat16"), multiplier(unit, "bfloat16", order=odd_after_even)
    mixed = replace(right, kernel=lambda a, b: (other if len(a) == 1 else right).kernel(a, b))
    assert unit_facts(mixed, INNER) == unit_facts(right, INNER)
    found = [kernels.kernels(each) for each in (right, mixed)]
    assert [each.single_row for each in found] == ["same", "other"]
    facts = report.probe("sim:v100", 16)
    prints = {replace(facts, kernels={**facts.kernels, "float16": each}).fingerprint for each in found}
    assert len(prints) == 2


def test_a_whole_device_that_is_wrong_is_not_exact_and_contradicts_its_architecture(monkeypatch, without_a_compiler):
    """As a user meets it, but for the formats that take most of the time."""
    monkeypatch.setitem(twin._CHAINS, "truncated", WRONG["h200, normalised products"][2])
    monkeypatch.setattr(report, "unit_facts", lambda multiply, inner: unit_facts(multiply, inner, {}))
    monkeypatch.setattr(report, "multipliers", lambda device: ({"bfloat16": multipliers(device)[0]["bfloat16"]}, {}))
    found = report.probe("sim:h200", INNER)
    assert not found.likeness.exact
    assert any(
        sentence.startswith(
            "bfloat16: the declared architecture, sm_90, is known to have exponents summed, not normalised"
        )
        for sentence in found.contradictions
    )


@pytest.fixture(scope="module")
def h200():
    return report.probe("sim:h200", 16)


def with_operands(change_a=same, change_b=same):
    return lambda a, b: (change_a(a), change_b(b))


ENDS = {
    "float16 saturates": ("float16", with_operands(),
        lambda c: torch.where(c.isfinite(), c.clamp(-65504.0, 65504.0), c), "sums to the largest number"),
    "infinity in b is lost": ("bfloat16", with_operands(change_b=replaced(torch.isinf, nothing)), same,
        "infinity to +0 (infinity in b, -infinity in b)"),
    "NaN in b of 8 bits is lost": ("float8_e4m3fn", with_operands(change_b=replaced(torch.isnan, nothing)), same,
        "NaN to +0 (NaN in b, -NaN in b)"),
    "float32 has no -0": ("float32", with_operands(), lambda c: c + 0.0, "zeros +0 (a sum of -2^-200)"),
}  # fmt: skip


@pytest.mark.parametrize("name", ENDS)
def test_a_whole_device_that_is_wrong_at_the_ends_is_not_exact_and_its_table_says_so(name, h200, monkeypatch):
    """As a user meets it."""
    format, operands, result, words = ENDS[name]
    multiply = simulation.multiply

    def wrong(a, b, unit, formats, schedule):
        if formats[0] != format:
            return multiply(a, b, unit, formats, schedule)
        return result(multiply(*operands(a, b), unit, formats, schedule))

    monkeypatch.setattr(simulation, "multiply", wrong)
    found = report.probe("sim:h200", 16)
    assert h200.likeness.exact
    assert not found.likeness.exact
    assert set(found.likeness.differences) == {format}
    assert found.fingerprint != h200.fingerprint
    # Zeros in float32 are a library's.
    assert bool(found.contradictions) == (format != "float32")
    monkeypatch.setattr(report, "probe", lambda *_: found)
    (row,) = [line for line in CliRunner().invoke(main, ["probe", "sim:h200"]).stdout.splitlines()
              if line.startswith(f"{format} ") and "bits" in line]  # fmt: skip
    assert words in row
