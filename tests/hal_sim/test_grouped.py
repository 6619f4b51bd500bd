# SPDX-License-Identifier: Apache-2.0
"""Grouped and scaled products: group by group they are those of the unit, whatever the sizes of the groups."""

import functools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import hal
from hal.errors import UnsupportedOperation
from hal_sim import grouped, native, product
from hal_sim.chips import CHIPS
from hal_sim.schedule import Schedule

LENGTHS = st.lists(st.integers(0, 7), max_size=6)


def numbers(*shape, seed=0, dtype=torch.bfloat16):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def unit(a, b, name="bfloat16", schedule=product.ONE_PIECE):
    return product.multiply(a[None], b[None], CHIPS["h200"].units[name], (name, name), schedule)[0]


def batches(a, b):
    name = str(a.dtype).removeprefix("torch.")
    return product.multiply(a, b, CHIPS["h200"].units[name], (name, name))


TOGETHER = functools.partial(product.multiply_groups, CHIPS["h200"].units["bfloat16"], ("bfloat16", "bfloat16"))
WAYS = pytest.mark.parametrize("together", [None, TOGETHER], ids=["one by one", "together"])


def parts(lengths, extra=0):
    """Return the ends of groups, their slices, and the extent of all of it."""
    ends = torch.tensor(lengths).cumsum(0).to(torch.int32)
    return ends, [slice(int(e) - n, int(e)) for e, n in zip(ends, lengths, strict=True)], sum(lengths) + extra


@WAYS
@given(LENGTHS, st.integers(0, 3))
@settings(max_examples=60)
def test_groups_of_rows(together, lengths, extra):
    ends, slices, R = parts(lengths, extra)
    a, b = numbers(R, 24), numbers(len(lengths), 24, 16, seed=1)
    found = grouped.grouped(batches, a, b, ends, together)
    expected = torch.zeros(R, 16)
    for each, weights in zip(slices, b, strict=True):
        expected[each] = unit(a[each], weights)
    assert torch.equal(found, expected)


@WAYS
@given(LENGTHS, st.integers(0, 3))
@settings(max_examples=60)
def test_groups_of_columns(together, lengths, extra):
    ends, slices, R = parts(lengths, extra)
    a, b = numbers(len(lengths), 5, 24), numbers(24, R, seed=1)
    found = grouped.grouped(batches, a, b, ends, together)
    expected = torch.zeros(5, R)
    for each, weights in zip(slices, a, strict=True):
        expected[:, each] = unit(weights, b[:, each])
    assert torch.equal(found, expected)


@WAYS
@given(LENGTHS, st.integers(0, 3))
@settings(max_examples=60)
def test_groups_of_products(together, lengths, extra):
    ends, slices, R = parts(lengths, extra)
    a, b = numbers(5, R), numbers(R, 16, seed=1)
    found = grouped.grouped(batches, a, b, ends, together)
    for each, of_group in zip(slices, found, strict=True):
        assert torch.equal(of_group, unit(a[:, each], b[each]))


@pytest.mark.parametrize("options", ["", "/splitk=2"])
def test_no_groups_at_all_are_zeros(options):
    none = torch.zeros(0, dtype=torch.int32)
    with hal.open_device(f"sim:h200{options}"):
        for a, b, shape in (((5, 16), (0, 16, 8), (5, 8)), ((0, 16), (0, 16, 8), (0, 8)), ((0, 8, 16), (16, 8), (8, 8)),
                            ((8, 8), (8, 16), (0, 8, 16))):  # fmt: skip
            found = torch._grouped_mm(numbers(*a), numbers(*b), offs=none)
            assert found.shape == shape
            assert not found.any()
        scaled = torch._scaled_grouped_mm(numbers(16, 16, dtype=torch.float8_e4m3fn),
                                          numbers(0, 16, 16, dtype=torch.float8_e4m3fn).mT, torch.ones(16),
                                          torch.ones(0, 16), none)  # fmt: skip
        assert scaled.shape == (16, 16)
        assert not scaled.any()


def test_all_groups_are_one_call_of_the_core(h200, monkeypatch):
    calls = []
    native.library()  # which tries itself out with what is replaced here
    of_groups = native.multiply_groups
    monkeypatch.setattr(native, "multiply_groups", lambda *given: calls.append("groups") or of_groups(*given))
    monkeypatch.setattr(native, "multiply", lambda *given: calls.append("one"))
    ends = torch.tensor([5, 5, 30, 64], dtype=torch.int32)
    F.grouped_mm(numbers(64, 24), numbers(4, 24, 16), offs=ends)
    F.grouped_mm(numbers(24, 64).T.contiguous().T, numbers(64, 16), offs=ends)
    assert calls == ["groups", "groups"]


def test_groups_of_a_schedule_are_shared_out_one_by_one():
    ends = torch.tensor([40, 64], dtype=torch.int32)
    a, b = numbers(64, 512), numbers(2, 512, 16, seed=1)
    schedule = Schedule(split_k=4)
    with hal.open_device("sim:h200/splitk=4"):
        found = F.grouped_mm(a, b, offs=ends)
    expected = torch.cat([unit(a[:40], b[0], schedule=schedule), unit(a[40:], b[1], schedule=schedule)])
    assert torch.equal(found, expected.bfloat16())
    assert not torch.equal(expected, torch.cat([unit(a[:40], b[0]), unit(a[40:], b[1])]))


@pytest.mark.parametrize("lengths", [[300, 700], [3, 0, 900, 40, 7, 7, 7, 120, 1, 2, 90, 33, 0]])
def test_threads_share_groups_of_any_size(lengths):
    ends, slices, R = parts(lengths)
    a, b = numbers(R, 96), numbers(len(lengths), 96, 80, seed=1)
    a[1, 2] = torch.nan  # for which the core has slower ways
    expected = torch.cat([unit(a[each], weights) for each, weights in zip(slices, b, strict=True)])
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        found = grouped.grouped(batches, a, b, ends, TOGETHER)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found.view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize(
    ("a", "b", "ends", "says"),
    [
        ((4, 8), (2, 8, 8), [3, 2], "must ascend"), ((4, 8), (2, 8, 8), [2, 5], "at most 4"),
        ((4, 8), (2, 8, 8), [4], "2 int32 offsets"), ((4, 8), (2, 8, 8), None, "without offsets"),
        ((4, 8), (2, 9, 8), [2, 4], "cannot be multiplied"), ((4, 8), (9, 4), [4, 8], "cannot be multiplied"),
        ((2, 4, 8), (2, 8, 8), [2, 4], "no groups in common"), ((4, 8), (2, 8, 8), [-1, 4], "must ascend"),
    ],
)  # fmt: skip
def test_groups_that_cannot_be_are_refused(a, b, ends, says):
    ends = None if ends is None else torch.tensor(ends, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=says):
        grouped.grouped(batches, numbers(*a), numbers(*b), ends)


def test_offsets_of_int64_and_other_dtypes_are_refused():
    with pytest.raises(RuntimeError, match="int32 offsets are needed"):
        grouped.grouped(batches, numbers(4, 8), numbers(2, 8, 8), torch.tensor([2, 4]))
    with hal.open_device("sim:h200"), pytest.raises(RuntimeError):
        torch._grouped_mm(numbers(4, 8), numbers(2, 8, 8).float(), offs=torch.tensor([2, 4], dtype=torch.int32))


def test_a_grouped_product_forward_and_backward_is_the_units():
    x, w = numbers(24, 16), numbers(3, 16, 32, seed=1)
    ends, dy = torch.tensor([8, 8, 24], dtype=torch.int32), numbers(24, 32, seed=2)
    for options, schedule in (("", product.ONE_PIECE), ("/splitk=2/grain=8", Schedule(split_k=2, grain=8))):
        with hal.open_device(f"sim:h200{options}"):
            x1, w1 = x.clone().requires_grad_(), w.clone().requires_grad_()
            y = F.grouped_mm(x1, w1, offs=ends)
            y.backward(dy)
        for at, expert in ((slice(0, 8), 0), (slice(8, 24), 2)):
            of = {"schedule": schedule}
            assert torch.equal(y[at], unit(x[at], w[expert], **of).bfloat16())
            assert torch.equal(x1.grad[at], unit(dy[at], w[expert].t(), **of).bfloat16())
            assert torch.equal(w1.grad[expert], unit(x[at].t(), dy[at], **of).bfloat16())
        assert not w1.grad[1].any()


# Scaled --------------------------------------------------------------------------------------------------------------

E4M3 = torch.float8_e4m3fn
ENDS = torch.tensor([3, 3, 11], dtype=torch.int32)
SLICES = (slice(0, 3), slice(3, 3), slice(3, 11))


def scales(*shape, seed):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) + 0.5


def eight(*shape, seed):
    return numbers(*shape, seed=seed, dtype=E4M3)


def e4m3(a, b):
    return unit(a, b, "float8_e4m3fn")


@pytest.fixture
def h200():
    with hal.open_device("sim:h200") as device:
        yield device


def test_scaled_groups_of_rows(h200):
    a, b, sa, sb = eight(12, 32, seed=0), eight(3, 16, 32, seed=1).mT, scales(12, seed=2), scales(3, 16, seed=3)
    found = torch._scaled_grouped_mm(a, b, sa, sb, ENDS, out_dtype=torch.bfloat16)
    for expert, at in enumerate(SLICES):
        assert torch.equal(found[at], (e4m3(a[at], b[expert]) * sa[at, None] * sb[expert]).bfloat16())
    again = F.scaled_grouped_mm(a, b, sa, F.ScalingType.RowWise, sb, F.ScalingType.RowWise, offs=ENDS)
    assert torch.equal(again, found)


def test_scaled_groups_of_columns(h200):
    a, b, sa, sb = eight(3, 16, 32, seed=0), eight(12, 32, seed=1).t(), scales(3, 16, seed=2), scales(12, seed=3)
    found = torch._scaled_grouped_mm(a, b, sa, sb, ENDS, out_dtype=torch.bfloat16)
    for expert, at in enumerate(SLICES):
        assert torch.equal(found[:, at], (e4m3(a[expert], b[:, at]) * sa[expert, :, None] * sb[at]).bfloat16())


def test_scaled_groups_of_products(h200):
    # Rows lie 16 bytes apart, of which the last four are in no group.
    a, b, sa, sb = eight(16, 16, seed=0), eight(8, 16, seed=1).t(), scales(48, seed=2), scales(24, seed=3)
    found = torch._scaled_grouped_mm(a, b, sa, sb, ENDS, out_dtype=torch.bfloat16)
    for group, at in enumerate(SLICES):
        rows, columns = sa.view(3, 16)[group, :, None], sb.view(3, 8)[group]
        assert torch.equal(found[group], (e4m3(a[:, at], b[at]) * rows * columns).bfloat16())


def test_scaled_batches(h200):
    a, b, sa, sb = eight(3, 16, 32, seed=0), eight(3, 8, 32, seed=1).mT, scales(3, 16, seed=2), scales(3, 8, seed=3)
    found = torch._scaled_grouped_mm(a, b, sa, sb, out_dtype=torch.bfloat16)
    for group in range(3):
        assert torch.equal(found[group], (e4m3(a[group], b[group]) * sa[group, :, None] * sb[group]).bfloat16())


def test_scaled_products_by_recipe(h200):
    a, b, one = eight(16, 32, seed=0), eight(48, 32, seed=1).t(), torch.tensor(0.75)
    whole, rows = F.ScalingType.TensorWise, F.ScalingType.RowWise
    assert torch.equal(F.scaled_mm(a, b, one, whole, one, whole), (e4m3(a, b) * one * one).bfloat16())
    sa, sb = scales(16, 1, seed=2), scales(1, 48, seed=3)
    assert torch.equal(F.scaled_mm(a, b, sa, rows, sb, rows), (e4m3(a, b) * sa * sb).bfloat16())
    assert torch.equal(F.scaled_mm(a, b, sa, rows, sb, rows), torch._scaled_mm(a, b, sa, sb, out_dtype=torch.bfloat16))


def test_scales_of_blocks_are_refused(h200):
    a, b = eight(128, 128, seed=0), eight(128, 128, seed=1).t()
    blocks = F.ScalingType.BlockWise1x128, F.ScalingType.BlockWise128x128
    with pytest.raises(UnsupportedOperation, match="BlockWise1x128 scales are not simulated"):
        F.scaled_mm(a, b, scales(128, 1, seed=2), blocks[0], scales(1, 1, seed=3), blocks[1])
    with pytest.raises(UnsupportedOperation, match="TensorWise scales are not simulated"):
        one = torch.tensor(1.0)
        F.scaled_grouped_mm(a, b, one, F.ScalingType.TensorWise, one, F.ScalingType.TensorWise,
                            offs=torch.tensor([128], dtype=torch.int32))  # fmt: skip


def test_scales_of_another_shape_are_refused(h200):
    a, b = eight(12, 32, seed=0), eight(3, 16, 32, seed=1).mT
    with pytest.raises(RuntimeError, match=r"scale_b is torch.float32 \(16,\), expected float32 \(3, 16\)"):
        torch._scaled_grouped_mm(a, b, scales(12, seed=2), scales(16, seed=3), ENDS)


def test_a_chip_without_fp8_refuses_scaled_groups_and_a_cpu_has_none():
    a, b, sa, sb = eight(12, 32, seed=0), eight(3, 16, 32, seed=1).mT, scales(12, seed=2), scales(3, 16, seed=3)
    with hal.open_device("sim:a100"), pytest.raises(UnsupportedOperation, match="no matrix unit"):
        torch._scaled_grouped_mm(a, b, sa, sb, ENDS)
    with pytest.raises(NotImplementedError, match="_scaled_grouped_mm"):
        torch._scaled_grouped_mm(a, b, sa, sb, ENDS)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda a, b, sa, sb: (a, b, sb, sa), "scale_a of shape"),
        (lambda a, b, sa, sb: (a.bfloat16(), b, sa, sb), "8 bits"),
        (lambda a, b, sa, sb: (a, b.half(), sa, sb), "8 bits"),
        (lambda a, b, sa, sb: (a[:, :20], b[:20], sa, sb), "multiples of 16"),
        (lambda a, b, sa, sb: (a, b[:, :8], sa, sb[:, :8]), "multiples of 16"),
        (lambda a, b, sa, sb: (a, b.contiguous(), sa, sb), "row-major times column-major"),
        (lambda a, b, sa, sb: (a.t().contiguous().t(), b, sa, sb), "row-major times column-major"),
        (lambda a, b, sa, sb: (a, b, sa.double(), sb), "scale_a is torch.float64"),
        (lambda a, b, sa, sb: (a, b, sa, sb.bfloat16()), "scale_b is torch.bfloat16"),
        (lambda a, b, sa, sb: (a, b, sa, sb, torch.ones(48)), "a bias of torch.float32"),
    ],
)
def test_what_torch_refuses_to_scale_is_refused(h200, change, says):
    given = change(eight(16, 32, seed=0), eight(48, 32, seed=1).t(), scales(16, 1, seed=2), scales(1, 48, seed=3))
    with pytest.raises((RuntimeError, UnsupportedOperation), match=says):
        torch._scaled_mm(*given, out_dtype=torch.bfloat16)


def test_scales_of_rows_beside_one_number_are_refused_as_on_a_card(h200):
    a, b, one = eight(16, 32, seed=0), eight(48, 32, seed=1).t(), torch.tensor(1.0)
    rows, columns = scales(16, 1, seed=2), scales(1, 48, seed=3)
    for pair in ((rows, one), (rows, one.view(1, 1)), (one, columns), (one.view(1), columns)):
        with pytest.raises(ValueError, match="Invalid scaling configuration"):
            torch._scaled_mm(a, b, *pair, out_dtype=torch.bfloat16)
    # Of a single row both are right.
    found = torch._scaled_mm(a[:1], b, one.view(1, 1), columns, out_dtype=torch.bfloat16)
    assert torch.equal(found, (e4m3(a[:1], b) * columns).bfloat16())


def test_recipes_that_their_scales_do_not_follow_are_refused(h200):
    a, b, one = eight(16, 32, seed=0), eight(8, 32, seed=1).t(), torch.tensor(1.0)
    whole, rows = F.ScalingType.TensorWise, F.ScalingType.RowWise
    for sa, of_a, sb, of_b in ((scales(16, 1, seed=2), whole, one, whole), (one, rows, one, rows),
                               (one, whole, scales(1, 8, seed=3), rows)):  # fmt: skip
        with pytest.raises(RuntimeError, match="numbers for a"):
            F.scaled_mm(a, b, sa, of_a, sb, of_b)


def test_the_scale_of_a_result_acts_before_it_is_rounded(h200):
    a, b, one = torch.ones(16, 32).to(E4M3), torch.full((16, 32), 32.0).to(E4M3).t(), torch.tensor(1.0)
    found = torch._scaled_mm(a, b, one, one, scale_result=torch.tensor(0.25), out_dtype=E4M3)
    assert (found.float() == 256).all()


def test_a_grouped_product_has_no_other_dtype_than_its_operands_and_lies_in_rows(h200):
    a, b, ends = numbers(3, 8, 16), numbers(16, 24), torch.tensor([8, 16, 24], dtype=torch.int32)
    assert F.grouped_mm(a, b, offs=ends).is_contiguous()
    with pytest.raises(RuntimeError, match="dtype of the operands"):
        torch._grouped_mm(a, b, offs=ends, out_dtype=torch.float32)


TWO_GROUPS = torch.tensor([3, 9], dtype=torch.int32)
LAYOUTS = {
    "rows apart by no multiple of 16 bytes": lambda: (torch.zeros(9, 20), torch.zeros(2, 20, 8)),
    "weights apart by no multiple of 16 bytes": lambda: (torch.zeros(9, 24), torch.zeros(2, 24, 7)),
    "a part of wider rows": lambda: (torch.zeros(9, 25)[:, :24], torch.zeros(2, 24, 8)),
    "expanded": lambda: (torch.zeros(1, 24).expand(9, 24), torch.zeros(2, 24, 8)),
    "expanded from a number": lambda: (torch.zeros(()).expand(9, 24), torch.zeros(2, 24, 8)),
    "every second column": lambda: (torch.zeros(9, 48)[:, ::2], torch.zeros(2, 24, 8)),
    "columns apart by no multiple of 16 bytes": lambda: (torch.zeros(24, 12).t()[:9], torch.zeros(2, 24, 8)),
    "aligned rows": lambda: (torch.zeros(9, 32)[:, :24], torch.zeros(2, 24, 8)),
    "one expert's weights for all": lambda: (torch.zeros(9, 24), torch.zeros(1, 24, 8).expand(2, 24, 8)),
    "weights in columns": lambda: (torch.zeros(9, 24), torch.zeros(2, 8, 24).transpose(1, 2)),
    "columns": lambda: (torch.zeros(24, 16).t()[:9], torch.zeros(2, 24, 8)),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_that_torch_refuses_is_refused_in_its_words(layout, dtype):
    a, b = LAYOUTS[layout]()
    # Elements are where they were, whatever the dtype.
    a, b = (torch.empty_strided(x.shape, x.stride(), dtype=dtype).zero_() for x in (a, b))

    def answer():
        try:
            return torch._grouped_mm(a, b, offs=TWO_GROUPS).shape
        except RuntimeError as error:
            return str(error)[:24]

    expected = answer()
    with hal.open_device("sim:h200"):
        assert answer() == expected


def test_the_gradient_of_a_sum_is_refused_as_on_a_card():
    x, w = numbers(9, 24).requires_grad_(), numbers(2, 24, 8, seed=1)
    with hal.open_device("sim:h200"), pytest.raises(RuntimeError, match="Invalid strides/sizes"):
        torch._grouped_mm(x, w, offs=TWO_GROUPS).sum().backward()
