# SPDX-License-Identifier: Apache-2.0
"""Whole products are what the rules say, by two programs that share nothing; their numbers are a format's own."""

import numpy as np
import pytest
import torch
from probe_kernels import multiplier, one_after_another

from hal.matrix_unit import FORMATS, MATRIX_UNITS, PARTNERS, MatrixUnit
from hal.probe import whole
from hal.probe.evaluated import evaluated
from hal.probe.multiplier import STORED
from hal.probe.schedule import Pieces
from hal_sim import twin

UNITS = sorted({((format, partner), unit) for units in MATRIX_UNITS.values() for format, unit in units.items()
                for partner in (format, PARTNERS.get(format, format))}, key=str)  # fmt: skip
HALVES = Pieces(0, 72, (Pieces(0, 40), Pieces(40, 72)))


def by_twin(a, b, unit, formats):
    dtype = torch.float64 if unit.result == "float64" else torch.float32
    a, b = (torch.from_numpy(np.ascontiguousarray(x)).to(dtype)[None] for x in (a, b))
    least = tuple(FORMATS[format].min_exponent for format in formats)
    return twin.multiply(a, b, torch.zeros(1, a.shape[1], b.shape[2], dtype=dtype), unit, least)[0]


@pytest.mark.parametrize(("formats", "unit"), UNITS, ids=str)
@pytest.mark.parametrize("kind", whole.KINDS)
def test_two_programs_agree_on_every_rule(formats, unit, kind):
    a, b = whole.operands(formats, kind, 16, 72)  # of groups of 16 and 32, the last one is short
    want = by_twin(a, b, unit, formats)
    assert torch.equal(torch.from_numpy(evaluated(a, b, unit, formats, Pieces(0, 72))).to(want.dtype), want)
    parts = [by_twin(a[:, at], b[at], unit, formats) for at in (slice(0, 40), slice(40, 72))]
    assert torch.equal(torch.from_numpy(evaluated(a, b, unit, formats, HALVES)).to(want.dtype), parts[0] + parts[1])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kind", whole.KINDS)
def test_operands_are_numbers_of_their_format_and_no_result_is_beyond_it(format, kind):
    a, b = whole.operands((format, format), kind, 64, 65)
    assert (a.shape, b.shape) == ((64, 65), (65, 64))
    dtype = getattr(torch, STORED.get(format, format))
    for x in (a, b):
        assert torch.equal(torch.from_numpy(x).to(dtype).double(), torch.from_numpy(x))
        significands = np.frexp(x)[0] * 2.0 ** FORMATS[format].bits
        assert not np.any(significands % 1)
    products = a[:, :, None] * b[None]
    assert np.abs(products.sum(1)).max() < torch.finfo(torch.float16 if format == "float16" else torch.float32).max
    if kind in ("cancelling", "wide"):
        assert not (np.sort(products, 1) + np.sort(products, 1)[:, ::-1]).any()
    if kind == "subnormal":
        assert 0.2 < np.mean(np.abs(a) < 2.0 ** FORMATS[format].min_exponent) < 1
        if format != "float64":
            assert np.abs(products[products != 0]).min() > 2.0**-110


def test_a_rule_that_is_not_the_devices_is_found_out_element_by_element():
    multiply = multiplier(one_after_another(), "bfloat16", torch.float32, outer=16)
    found = whole.products(multiply, 64)
    alone = {64: Pieces(0, 64), 512: Pieces(0, 512)}
    assert whole.differing(found, MatrixUnit("fused"), alone, 16) == (0, 4 * 256 + 16)
    wrong, elements = whole.differing(found, MatrixUnit("truncated", 16, 25), alone, 16)
    assert elements == 4 * 256 + 16
    assert wrong > elements / 2
    assert whole.differing(found, MatrixUnit("fused"), {64: Pieces(0, 64), 512: None}, 16) == (0, 1024)


def test_the_digest_is_of_every_bit():
    def with_one(products):
        total = one_after_another()(products)
        total[3, 5] *= 1 + 2.0**-23
        return total

    found = [
        whole.products(multiplier(sum_, "bfloat16", torch.float32, outer=16), 16).digest
        for sum_ in (one_after_another(), one_after_another(), with_one)
    ]
    assert found[0] == found[1] != found[2]


def test_a_shape_that_is_refused_is_left_out():
    multiply = multiplier(one_after_another(), "bfloat16", outer=16)

    def kernel(a, b):
        if a.shape[1] > 64:
            raise RuntimeError("too long")
        return multiply.kernel(a, b)

    found = whole.products(type(multiply)("bfloat16", multiply.device, kernel, multiply.dtype, multiply.result, 16), 64)
    assert set(found.results) == {(64, kind) for kind in whole.KINDS}
