# SPDX-License-Identifier: Apache-2.0
"""The fast kernels against the plainest code, bit for bit, where they begin, end, or have to give up."""

import ctypes
import itertools
import platform

import pytest
import torch
from sim_operands import DTYPES, RULES, addends, as_read, differing, operands

from hal.matrix_unit import FORMATS, MATRIX_UNITS, MatrixUnit
from hal_sim import build, native

FLOAT32_RULES = [rule for rule in RULES if rule[0].result != "float64"]
ALIGNED_RULES = [rule for rule in FLOAT32_RULES if rule[0].kind in ("truncated", "floored")]


def check(unit, format, a, b, c=None, library=None):
    """Compare and return what was computed."""
    a, b = as_read(a, format), as_read(b, format)
    library, least = library or native.library(), (FORMATS[format].min_exponent,) * 2
    fast = native.multiply(library, a, b, c, unit, least)
    plain = native.multiply(library, a, b, c, unit, least, reference=True)
    assert not len(differing(fast, plain))
    return fast


@pytest.mark.parametrize(("unit", "format"), FLOAT32_RULES)
def test_tiles_panels_and_groups_may_be_cut_off_anywhere(unit, format):
    # Tiles have 4 rows and 16 to 64 columns; a group up to 32 products, and 128 are summed at a time.
    shapes = [(m, n, k) for m in (1, 3, 4, 5) for n in (1, 15, 16, 17, 33, 64, 65) for k in (1, 2, 7, 33)]
    for seed, (m, n, k) in enumerate([*shapes, (66, 130, 129), (131, 63, 257), (5, 70, 127), (65, 3, 128)]):
        a, b = operands("normal", (1, m, k), format, seed), operands("normal", (1, k, n), format, seed + 1)
        check(unit, format, a, b, addends(unit, (1, m, n), seed + 2) if seed % 2 else None)


@pytest.mark.parametrize(("unit", "format"), ALIGNED_RULES)
def test_significands_near_two_do_not_overflow(unit, format):
    # 32 or 16 products just below 4, and c: more than 2^31 units of 2^-25 on Hopper and Blackwell.
    largest = 2.0 - 2.0 ** (1 - FORMATS[format].bits)
    for sign in (1.0, -1.0):
        a, b = torch.full((1, 5, 300), largest), torch.full((1, 300, 70), sign * largest)
        check(unit, format, a, b)
        check(unit, format, a, b, torch.full((1, 5, 70), sign * 1.99))
        a[:, 2, ::16] = b[:, ::40] = 0.0
        check(unit, format, a, b, torch.full((1, 5, 70), -sign * 3.7))


@pytest.mark.parametrize("format", ["float16", "bfloat16", "tf32"])
def test_a_rule_of_fp8_is_right_for_wider_formats_too(format):
    # No chip has this one: halves of its 32 products leave an int32 where significands are nearer to 2 than those of FP8.
    unit, largest = MatrixUnit("truncated", 32, 25, exponent_floor=-133), 2.0 - 2.0 ** (1 - FORMATS[format].bits)
    for sign in (1.0, -1.0):
        a, b = torch.full((1, 5, 100), largest), torch.full((1, 100, 70), sign * largest)
        a[:, 1] = 1.875
        a[:, 2, ::16] = 0.0
        check(unit, format, a, b)
        check(unit, format, a, b, torch.full((1, 5, 70), sign * 1.99))


@pytest.mark.parametrize(("unit", "format"), ALIGNED_RULES)
def test_a_long_sum_may_outgrow_its_products(unit, format):
    # With 13 bits a product of 2^0 counts for nothing beside 2^13 of them, and its shift would be negative.
    k = 1 << 15
    ones = torch.ones(1, 2, k)
    ones[:, 1, 20_000:] = -1.0
    ones[:, :, 3::32] = 0.0
    found = check(unit, format, ones, torch.ones(1, k, 3))
    if unit.result != "float32_13":
        assert found[0, :, 0].tolist() == [k * 31 / 32, (20_000 - (k - 20_000)) * 31 / 32]


@pytest.mark.parametrize(("unit", "format"), ALIGNED_RULES)
@pytest.mark.parametrize("exponent", [-60, -50, -45, -44, -40, -30])
def test_groups_may_be_far_below_the_largest_number(unit, format, exponent):
    a, b = operands("normal", (1, 5, 128), format, 1).float(), operands("normal", (1, 128, 20), format, 2).float()
    if FORMATS[format].min_exponent > -100:
        exponent = FORMATS[format].min_exponent // 2
    else:
        a, b = a * 2.0**30, b * 2.0**30
    a[:, :, 32:] *= 2.0**exponent
    b[:, 32:] *= 2.0**exponent
    a[:, :, :32] *= torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0])[:, None]
    b[:, 40:48] = 0.0
    check(unit, format, a.to(DTYPES[format]), b.to(DTYPES[format]))


@pytest.mark.parametrize(("unit", "format"), FLOAT32_RULES)
@pytest.mark.parametrize("exponent", [-126, -100, -40, 23, 24, 40, 120])
def test_c_may_be_far_from_the_products(unit, format, exponent):
    a, b = operands("normal", (1, 4, 70), format, 1), operands("normal", (1, 70, 20), format, 2)
    c = operands("normal", (1, 4, 20), "float32", 3) * 2.0**exponent
    c[0, 0] = -0.0
    check(unit, format, a, b, c)
    check(unit, format, torch.full_like(a, -0.0)[:, :, :64], torch.full_like(b, 1.0)[:, :64], c)


@pytest.mark.parametrize(("unit", "format"), FLOAT32_RULES)
def test_one_special_or_distant_number_changes_only_its_row_or_column(unit, format):
    a, b = operands("normal", (2, 70, 50), format, 1).float(), operands("normal", (2, 50, 140), format, 2).float()
    plain = check(unit, format, a, b)
    for value in (torch.nan, torch.inf, 2.0 ** FORMATS[format].min_exponent, 2.0 ** (FORMATS[format].min_exponent - 1)):
        changed_a, changed_b = a.clone(), b.clone()
        changed_a[1, 67, 3] = changed_b[0, 7, 101] = value
        found = check(unit, format, changed_a, changed_b)
        same = found.view(torch.int32) == plain.view(torch.int32)
        assert same[0, :, [*range(101), *range(102, 140)]].all()
        assert same[1, [*range(67), 68, 69]].all()


@pytest.mark.parametrize(("unit", "format"), [rule for rule in FLOAT32_RULES if rule[0].kind == "floored"])
def test_sums_that_nearly_cancel_c_are_rounded_as_they_should_be(unit, format):
    # c is far enough above the products that their sum is shifted, and near enough for it to cancel most of c.
    generator = torch.Generator().manual_seed(0)
    a, b = 1 + torch.randint(0, 8, (1, 400, 8), generator=generator) / 8, torch.full((1, 8, 16), -1.0)
    a[:, :, 4:] *= 2.0 ** -torch.randint(0, 7, (1, 400, 4), generator=generator)
    exact = (a.double() @ b.double()).float()
    c = -exact + torch.randn(1, 400, 16, generator=generator) * 2.0 ** torch.randint(-24, 1, (1, 400, 16))
    check(unit, format, a, b, c)


@pytest.mark.parametrize(("unit", "format"), [rule for rule in ALIGNED_RULES if FORMATS[rule[1]].min_exponent < -100])
def test_small_results_are_subnormal_as_the_rule_says(unit, format):
    for exponent in range(-76, -54, 3):
        a, b = (operands("cancelling", (1, 8, 64), format, seed).float() * 2.0**exponent for seed in (1, 2))
        check(unit, format, a, b.transpose(1, 2).flip(1))


@pytest.mark.skipif(
    platform.machine() != "x86_64" or "AVX" not in torch.backends.cpu.get_cpu_capability(),
    reason="this processor has one width of vectors",
)
@pytest.mark.parametrize("target", ["x86-64-v3", "x86-64"])
def test_narrower_vectors_compute_the_same(target, monkeypatch, tmp_path):
    ordinary = build.compiled()
    monkeypatch.setenv("HAL_SIM_TARGET", target)
    narrow = build.compiled()
    assert narrow != ordinary
    library = ctypes.CDLL(str(narrow))
    for unit, format in FLOAT32_RULES:
        for kind in ("normal", "wide", "many zeros"):
            a, b = operands(kind, (1, 9, 140), format, 1), operands(kind, (1, 140, 37), format, 2)
            found = check(unit, format, a, b, addends(unit, (1, 9, 37), 3), library)
            assert not len(differing(found, check(unit, format, a, b, addends(unit, (1, 9, 37), 3))))


NARROW = [
    torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
]  # fmt: skip


@pytest.fixture(params=["native", "x86-64"])
def library(request, monkeypatch):
    """The library for this processor, and that for any of its kind, which converts float16 by itself."""
    if request.param != "native":
        if platform.machine() != "x86_64":
            pytest.skip("this processor has one set of instructions")
        monkeypatch.setenv("HAL_SIM_TARGET", request.param)
    return ctypes.CDLL(str(build.compiled()))


def every(dtype):
    """Return each number of a narrow dtype, NaN and infinities among them."""
    bits = torch.arange(2 ** (8 * dtype.itemsize))
    return bits.to({1: torch.uint8, 2: torch.uint16}[dtype.itemsize]).view(dtype)


@pytest.mark.parametrize("dtype", NARROW)
def test_each_number_is_read_as_torch_converts_it(dtype, library):
    numbers, one = every(dtype)[:, None, None], torch.ones(1, 1, 1).to(dtype)
    least = (FORMATS[str(dtype).removeprefix("torch.")].min_exponent,) * 2
    for a, b in ((numbers, one.expand_as(numbers)), (one.expand_as(numbers), numbers)):
        found = native.multiply(library, a, b, None, MatrixUnit("fused"), least)
        assert torch.equal(found.nan_to_num(1e38), numbers.float().nan_to_num(1e38))


@pytest.mark.parametrize("kind", ["every", "normal"])
@pytest.mark.parametrize("dtype", NARROW)
def test_numbers_are_read_in_any_layout(dtype, kind, library):
    """Strips are gathered four numbers at a time where these lie side by side, along either axis, or one by one."""
    draw, format = torch.Generator().manual_seed(4), str(dtype).removeprefix("torch.")
    pool = every(dtype)
    pool = pool[pool.float().isfinite()] if kind == "every" else torch.randn(4000, generator=draw).to(dtype)
    least = (FORMATS[format].min_exponent,) * 2
    for rows, columns in ((64, 64), (67, 61)):
        lying = [pool[torch.randint(len(pool), (1, rows, columns), generator=draw)] for _ in range(2)]
        layouts = ((x, x.mT.contiguous().mT, moved(x), x.repeat_interleave(2, 2)[..., ::2]) for x in lying)
        for a, b in itertools.product(*layouts):
            given = library, a, b.mT, None, MATRIX_UNITS["sm_90"]["bfloat16"], least
            assert not len(differing(native.multiply(*given), native.multiply(*given, reference=True)))


def moved(x):
    """Return the same numbers where no vector begins."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def test_batches_are_computed_as_their_matrices_are():
    unit, threads = MATRIX_UNITS["sm_90"]["bfloat16"], torch.get_num_threads()
    a, b = operands("normal", (40, 65, 70), "bfloat16", 1), operands("normal", (40, 70, 130), "bfloat16", 2)
    a[3, 5, 7] = torch.nan
    torch.set_num_threads(3)
    try:
        together = check(unit, "bfloat16", a, b)
        few = check(unit, "bfloat16", a[:2].repeat(1, 6, 6), b[:2].repeat(1, 6, 6))
    finally:
        torch.set_num_threads(threads)
    for i in (0, 3, 39):
        one = check(unit, "bfloat16", a[i : i + 1], b[i : i + 1])
        assert torch.equal(one.view(torch.int32), together[i : i + 1].view(torch.int32))
    assert few.shape == (2, 390, 780)
