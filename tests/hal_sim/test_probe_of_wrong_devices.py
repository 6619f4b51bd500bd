# SPDX-License-Identifier: Apache-2.0
"""A device that is wrong in one thing is not taken for the one that it says it is."""

import functools
from dataclasses import replace

import pytest
import torch

import hal
from hal.probe import kernels, report, rules, whole
from hal.probe.multiplier import Multiplier, multipliers
from hal.probe.schedule import Pieces
from hal.probe.unit import unit_facts
from hal_sim import native, product, twin
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


def multiplier(unit, format, stored=lambda x, dtype: x.to(dtype), change=lambda x: x, order=None):
    """Return a product that a unit computes, with other operands, in another order, or stored in another way."""
    dtype = getattr(torch, format)
    result = torch.float32 if format.startswith("float8") else dtype

    def kernel(a, b):
        if order is not None:
            at = order(a.shape[1])
            a, b = a[:, at], b[at]
        return stored(product.multiply(change(a)[None], change(b)[None], unit, (format, format))[0], result)

    return Multiplier(format, CPU, kernel, dtype, result)


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
    "results are cut": ({}, {"stored": cut}, ("stored",)),
    "operands are flushed": ({}, {"change": flushed}, ("subnormal_inputs",)),
    "groups of 8": ({"group": 8}, {}, ("tree", "group")),
    "24 bits": ({"fraction_bits": 24}, {}, ("alignment_bits", "products_under_sum", "sum_under_product")),
    "even products first": ({}, {"order": odd_after_even}, ("tree", "longer")),
    "k descending": ({}, {"order": lambda K: list(range(K))[::-1]}, ("tree", "longer")),
    "infinities are the largest number": ({}, {"stored": saturated}, ("infinity",)),
    "infinities are NaN": (
        {},
        {"stored": lambda x, dtype: torch.where(x.isinf(), torch.nan, x).to(dtype)},
        ("infinity",),
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
        assert (wrong > 0) == (name != "nothing wrong" and facts not in (("infinity",), ("nan",)))


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
