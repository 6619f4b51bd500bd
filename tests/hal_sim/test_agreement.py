# SPDX-License-Identifier: Apache-2.0
"""The compiled library, its plainest code and torch's own operators agree bit for bit, whatever they are given."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sim_operands import DTYPES, KINDS, RULES, addends, both, differing, operands

from hal.matrix_unit import FORMATS, MATRIX_UNITS

sizes = st.integers(1, 35)
seeds = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize(("unit", "format"), RULES)
@given(kind=st.sampled_from(KINDS), m=sizes, n=sizes, k=st.integers(1, 90), seed=seeds)
def test_compiled_and_torch_agree(unit, format, kind, m, n, k, seed):
    if unit.result == "float64" and kind in ("any bits", "finite bits", "ends"):  # in fractions, one by one
        m, n = m % 6 + 1, n % 6 + 1
    a, b = operands(kind, (2, m, k), format, seed), operands(kind, (2, k, n), format, seed + 1)
    c = addends(unit, (2, m, n), seed + 2)
    found, expected = both(unit, format, a, b, c)
    assert not len(differing(found, expected))


@pytest.mark.parametrize(("unit", "format"), [rule for rule in RULES if rule[0].result != "float64"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_plainest_code_agrees(unit, format, kind):
    a, b = operands(kind, (1, 9, 50), format, 5), operands(kind, (1, 50, 21), format, 6)
    found, expected = both(unit, format, a, b, addends(unit, (1, 9, 21), 7), reference=True)
    assert not len(differing(found, expected))


@pytest.mark.parametrize(("unit", "format"), [rule for rule in RULES if rule[0].kind == "truncated"])
def test_results_in_float16_agree(unit, format):
    unit = dataclasses.replace(unit, result="float16", exponent_floor=-20)
    for kind in KINDS:
        a, b = operands(kind, (1, 7, 40), format, 1), operands(kind, (1, 40, 9), format, 2)
        found, expected = both(unit, format, a, b, addends(unit, (1, 7, 9), 3))
        assert not len(differing(found, expected)), kind


@pytest.mark.parametrize(("unit", "format"), RULES)
def test_rows_and_columns_may_lie_anywhere(unit, format):
    a, b = operands("normal", (3, 40, 17), format, 1), operands("normal", (3, 33, 40), format, 2)
    c = addends(unit, (3, 33, 17), 3)
    transposed = both(unit, format, a.transpose(1, 2), b.transpose(1, 2), c.transpose(1, 2))
    straight = both(unit, format, a.transpose(1, 2).contiguous(), b.transpose(1, 2).contiguous(),
                    c.transpose(1, 2).contiguous())  # fmt: skip
    every_second = operands("normal", (3, 17, 80), format, 1)[:, :, ::2]
    assert torch.equal(transposed[0], straight[0])
    assert torch.equal(transposed[1], straight[1])
    of_every_second = both(unit, format, every_second, b.transpose(1, 2), c.transpose(1, 2))
    assert not len(differing(*of_every_second))


@pytest.mark.parametrize(("unit", "format"), RULES)
def test_the_number_of_threads_changes_nothing(unit, format):
    a, b = operands("normal", (2, 90, 64), format, 1), operands("normal", (2, 64, 70), format, 2)
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(both(unit, format, a, b, addends(unit, (2, 90, 70), 3))[0])
    torch.set_num_threads(1)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize(("unit", "format"), [rule for rule in RULES if rule[0].result != "float64"])
def test_subnormals_do_not_depend_on_what_the_caller_has_set(unit, format):
    # The least numbers of each format, and of float32 among the addends.
    a = (operands("normal", (1, 8, 32), "float32", 1) * 2.0 ** (FORMATS[format].min_exponent - 2)).to(DTYPES[format])
    b, c = operands("normal", (1, 32, 8), format, 2), addends(unit, (1, 8, 8), 3) * 2.0**-60
    before = both(unit, format, a, b, c)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush")
    try:
        flushing = both(unit, format, a, b, c)
        assert torch.tensor([2.0**-140]).mul(1.0).eq(0.0).all()  # as the caller has set it
    finally:
        torch.set_flush_denormal(False)
    for one, other in zip(before, flushing, strict=True):
        assert torch.equal(one.view(torch.int32), other.view(torch.int32))


@pytest.mark.parametrize(("unit", "format"), RULES)
def test_a_unit_has_one_nan_whatever_it_comes_of(unit, format):
    dtype, bits = (torch.float64, torch.int64) if unit.result == "float64" else (torch.float32, torch.int32)
    nan = {"float64": 0x7FF8000000000000, "float16": 0x7FFFE000}.get(
        unit.result, 0x7FFFFFFF if unit.kind == "truncated" else 0x7FC00000
    )
    with_payload = torch.tensor([-1, 0x7FF8000000100000 if dtype == torch.float64 else 0x7FC12345], dtype=bits).view(
        dtype
    )
    a = torch.tensor([[torch.inf, -torch.inf, 1, 1], [1, 0, 0, 1], [torch.inf, 0, 1, 1], [1, 1, 1, 1]], dtype=dtype)[
        None
    ]
    a[0, 1, 1:3] = with_payload
    b = torch.tensor([1, 1, 1, 1], dtype=dtype).view(1, 4, 1).repeat(1, 1, 37)
    b[0, 1, 3] = torch.inf
    c = torch.zeros(1, 4, 37, dtype=dtype)
    c[0, 3, :2] = with_payload
    for reference in (False, True):
        for found in both(unit, format, a, b, c, reference=reference):
            codes = found.view(bits)[0]
            assert (codes[:2] == nan).all()
            assert codes[2, 3] == nan
            assert (codes[3, :2] == nan).all()
            assert not found[0, 3, 2:].isnan().any()


def test_a_float64_product_that_is_rounded_to_zero_keeps_its_sign():
    tiny = torch.full((1, 1, 3), 2.0**-1000, dtype=torch.float64)
    for sign in (1.0, -1.0):
        found = both(MATRIX_UNITS["sm_90"]["float64"], "float64", sign * tiny, tiny.mT, torch.zeros(1, 1, 1).double())
        assert [torch.copysign(torch.ones(()), x).item() for x in found] == [sign, sign]
        assert not any(x.item() for x in found)


# Known answers, by hand ----------------------------------------------------------------------------------------------


def answer(unit, a, b, c=0.0, format="bfloat16"):
    """Return one dot product, of both implementations."""
    a, b = torch.tensor([[a]], dtype=torch.float32), torch.tensor([[[x] for x in b]], dtype=torch.float32)
    found, expected = both(unit, format, a, b, torch.tensor([[[c]]], dtype=torch.float32))
    assert not len(differing(found, expected))
    return found.item()


def unit_of(architecture, format="bfloat16"):
    return MATRIX_UNITS[architecture][format]


def test_a_bit_below_the_alignment_is_cut_and_one_above_is_kept():
    hopper, ampere = unit_of("sm_90"), unit_of("sm_80")
    for unit, bits in ((hopper, 25), (ampere, 24)):
        assert answer(unit, [1.0, 2.0**-bits, -1.0], [1.0, 1.0, 1.0]) == 2.0**-bits
        assert answer(unit, [1.0, 2.0 ** -(bits + 1), -1.0], [1.0, 1.0, 1.0]) == 0.0


def test_zero_times_a_large_number_does_not_raise_the_exponent():
    assert answer(unit_of("sm_90"), [0.0, 2.0**-12], [2.0**127, 2.0**-12 * (1 + 2.0**-7)]) == 2.0**-24 * (1 + 2.0**-7)


def test_products_beyond_float32_cancel_on_nvidia_and_are_nan_on_amd():
    a, b = [2.0**127, -(2.0**127)], [2.0, 2.0]
    assert answer(unit_of("sm_90"), a, b) == 0.0
    assert np.isnan(answer(unit_of("gfx942"), a, b))
    assert answer(unit_of("gfx942"), a[:1], b[:1]) == np.inf


def test_only_cdna3_rounds_a_tiny_negative_addend_down():
    for sign, expected in ((-1, 1 - 2.0**-24), (1, 1.0)):
        assert answer(unit_of("gfx942"), [1.0], [1.0], sign * 2.0**-30) == expected
    for other in ("sm_80", "sm_90", "gfx90a"):
        assert answer(unit_of(other), [1.0], [1.0], -(2.0**-30)) == 1.0


def test_cdna2_flushes_subnormals_and_the_others_keep_them():
    for other in ("sm_80", "sm_90", "gfx942"):
        assert answer(unit_of(other), [2.0**-130], [2.0**7]) == 2.0**-123
    assert answer(unit_of("gfx90a"), [2.0**-130], [2.0**7]) == 0.0
    assert answer(unit_of("gfx90a", "float16"), [2.0**-15], [1.0], format="float16") == 0.0


def test_nan_and_infinities_come_out_as_nvidia_writes_them():
    hopper = unit_of("sm_90")
    assert answer(hopper, [np.inf, 1.0], [1.0, 1.0]) == np.inf
    assert answer(hopper, [1.0], [1.0], -np.inf) == -np.inf
    for a, b in (([np.inf], [0.0]), ([np.inf, -np.inf], [1.0, 1.0]), ([np.nan], [0.0])):
        found = torch.tensor(answer(hopper, a, b))
        assert found.isnan()
    a = torch.tensor([[[np.nan]]])
    found, _ = both(hopper, "bfloat16", a, a, torch.zeros(1, 1, 1))
    assert found.view(torch.int32).item() == 0x7FFFFFFF


def test_nothing_but_zeros_is_plus_zero():
    for architecture in ("sm_80", "sm_90", "gfx942"):
        assert np.signbit(answer(unit_of(architecture), [-0.0, 0.0], [1.0, -1.0], -0.0)) == np.False_


def test_hoppers_fp8_keeps_13_bits_of_the_sum():
    unit = unit_of("sm_90", "float8_e4m3fn")
    found = answer(unit, [1.0, 2.0**-6], [1.0, 2.0**-7], format="float8_e4m3fn")
    assert found == 1 + 2.0**-13
    assert answer(unit, [1.0, 2.0**-6], [1.0, 2.0**-8], format="float8_e4m3fn") == 1.0
