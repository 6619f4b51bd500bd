# SPDX-License-Identifier: Apache-2.0
"""A device that is wrong in one thing is not taken for the one that it says it is."""

import functools

import pytest
import torch

import hal
from hal.probe import rules, whole
from hal.probe.multiplier import multipliers
from hal.probe.unit import unit_facts
from hal_sim import native, twin
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
    wrong, elements = whole.differing(products, facts.format, unit, rules.pieces(facts, unit))
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
