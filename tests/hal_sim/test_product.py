# SPDX-License-Identifier: Apache-2.0
"""Products as a device computes them: pieces of K, empty matrices, formats of float32 units."""

import pytest
import torch

from hal.errors import ConfigError
from hal.matrix_unit import MATRIX_UNITS
from hal_sim import native, product
from hal_sim.schedule import Schedule

HOPPER = MATRIX_UNITS["sm_90"]["bfloat16"]
BFLOAT16 = ("bfloat16", "bfloat16")


def matrices(m, k, n, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(1, m, k, generator=generator).to(dtype), torch.randn(1, k, n, generator=generator).to(dtype))


@pytest.mark.parametrize(
    ("K", "split_k", "itemsize", "expected"),
    [(1024, 1, 2, [(0, 1024)]), (1024, 4, 2, [(0, 256), (256, 512), (512, 768), (768, 1024)]),
     (1000, 3, 2, [(0, 384), (384, 768), (768, 1000)]), (100, 4, 2, [(0, 64), (64, 100)]),
     (300, 2, 1, [(0, 256), (256, 300)]), (1, 8, 2, [(0, 1)]), (0, 2, 2, [])],
)  # fmt: skip
def test_k_is_split_at_multiples_of_the_grain(K, split_k, itemsize, expected):
    pieces = list(Schedule(split_k=split_k).pieces(K, itemsize))
    assert [(piece.start, piece.stop) for (piece,) in pieces] == expected


def test_pieces_are_added_in_float32_in_the_order_of_k():
    a, b = matrices(5, 300, 7)
    parts = [product.multiply(a[:, :, k : k + 128], b[:, k : k + 128], HOPPER, BFLOAT16) for k in (0, 128, 256)]
    expected = parts[0] + parts[1] + parts[2]
    found = product.multiply(a, b, HOPPER, BFLOAT16, Schedule(split_k=3))  # grains of 64: 128, 128, 44
    assert torch.equal(found, expected)
    assert torch.equal(product.multiply(a, b, HOPPER, BFLOAT16, Schedule(promote=128)), expected)
    assert not torch.equal(product.multiply(a, b, HOPPER, BFLOAT16), expected)


def test_a_slice_that_is_promoted_is_summed_by_itself():
    a, b = matrices(3, 512, 4)
    halves = [product.multiply(a[:, :, at], b[:, at], HOPPER, BFLOAT16, Schedule(promote=64))
              for at in (slice(0, 256), slice(256, 512))]  # fmt: skip
    assert torch.equal(product.multiply(a, b, HOPPER, BFLOAT16, Schedule(split_k=2, promote=64)), halves[0] + halves[1])


@pytest.mark.parametrize("text", ["splitk=4", "splitk=2/grain=128", "promote=128", "splitk=3/promote=64"])
def test_a_schedule_is_read_as_it_is_written(text):
    assert str(Schedule.parse(text)) == text


@pytest.mark.parametrize(
    "text", ["", "splitk", "splitk=0", "splitk=-1", "splitk=2/splitk=3", "order=1", "splitk=2,", "split_k=2"]
)
def test_another_schedule_is_refused(text):
    with pytest.raises(ConfigError, match="no such option"):
        Schedule.parse(text)


@pytest.mark.parametrize(("m", "k", "n"), [(0, 4, 3), (3, 0, 4), (3, 4, 0), (0, 0, 0)])
@pytest.mark.parametrize("schedule", [Schedule(), Schedule(split_k=2)])
def test_empty_matrices_have_empty_or_zero_products(m, k, n, schedule):
    found = product.multiply(*matrices(m, k, n), HOPPER, BFLOAT16, schedule)
    assert found.shape == (1, m, n)
    assert found.dtype == torch.float32
    assert not found.count_nonzero()
    assert found.is_contiguous()


def test_operands_that_begin_anywhere_in_memory():
    a, b = matrices(9, 40, 11)
    flat = torch.empty(a.numel() + 1, dtype=a.dtype)
    flat[1:] = a.flatten()
    assert torch.equal(
        product.multiply(flat[1:].view_as(a), b, HOPPER, BFLOAT16), product.multiply(a, b, HOPPER, BFLOAT16)
    )


def test_tf32_units_cut_what_they_take_in_and_hf32_rounds_it():
    x = torch.tensor([1 + 2.0**-10 + 2.0**-11 + 2.0**-12, 2.0**-136, torch.inf, -1 - 2.0**-11 - 2.0**-12, torch.nan])
    cut = product.operand(x, "tf32")
    assert cut[:4].tolist() == [1 + 2.0**-10, 2.0**-136, torch.inf, -1.0]
    assert cut[4].isnan()
    rounded = product.operand(x, "hf32")
    assert rounded[:4].tolist() == [1 + 2.0**-9, 2.0**-136, torch.inf, -1 - 2.0**-10]  # ties to even, at 11 bits
    assert rounded[4].isnan()


@pytest.mark.parametrize("architecture", sorted(MATRIX_UNITS))
def test_float32_and_float64_are_chains_of_fused_multiply_adds(architecture):
    units = MATRIX_UNITS[architecture]
    assert ("float64" in units) == (not architecture.startswith("davinci"))  # Ascend has no float64 unit
    for name in sorted({"float32", "float64"} & set(units)):
        dtype = getattr(torch, name)
        a, b = matrices(3, 20, 5, dtype)
        found = product.multiply(a, b, units[name], (name, name))
        exact = [[sum_of_fused(a[0, i].tolist(), b[0, :, j].tolist(), dtype) for j in range(5)] for i in range(3)]
        assert found[0].tolist() == exact


def sum_of_fused(a, b, dtype):
    from fractions import Fraction

    total = 0.0
    for x, y in zip(a, b, strict=True):
        exact = Fraction(x) * Fraction(y) + Fraction(total)
        total = float(exact) if dtype == torch.float64 else nearest_float32(exact)
    return total


def nearest_float32(exact):
    """Round a fraction to float32; through float64 it would be rounded twice."""
    near = torch.tensor(float(exact), dtype=torch.float32)
    candidates = [near, *(torch.nextafter(near, torch.tensor(end)) for end in (-torch.inf, torch.inf))]
    from fractions import Fraction

    return min((abs(Fraction(x.item()) - exact), x.view(torch.int32).item() & 1, x.item()) for x in candidates)[2]


def test_without_a_compiler_the_same_comes_out(monkeypatch):
    a, b = matrices(6, 100, 5)
    compiled = product.multiply(a, b, HOPPER, BFLOAT16, Schedule(split_k=2))
    monkeypatch.setattr(native, "library", lambda: None)
    assert torch.equal(product.multiply(a, b, HOPPER, BFLOAT16, Schedule(split_k=2)), compiled)
