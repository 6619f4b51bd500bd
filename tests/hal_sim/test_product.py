# SPDX-License-Identifier: Apache-2.0
"""Products as a device computes them: pieces of K, empty matrices, formats of float32 units."""

import os
import subprocess
import sys

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


# In a process of its own, since threads that begin while torch flushes do so for good.
FLUSHING = """
import torch
from hal.matrix_unit import MATRIX_UNITS
from hal_sim import native, product
from hal_sim.schedule import Schedule

torch.set_num_threads(2)
a, b = torch.zeros(1, 210, 128).bfloat16(), torch.zeros(1, 128, 210).bfloat16()
a[:, :, ::64], b[:, ::64] = 2.0**-70, 2.0**-66  # more elements than torch gives to one thread
compiled = native.library()
if torch.set_flush_denormal(True):
    torch.ones(1 << 20).add(1.0)
    for library in (compiled, None):
        native.library = lambda: library
        for dtype in (torch.float32, torch.float64):
            torch.set_default_dtype(dtype)
            for text in ("splitk=2", "promote=64"):
                found = product.multiply(
                    a, b, MATRIX_UNITS["sm_90"]["bfloat16"], ("bfloat16", "bfloat16"), Schedule.parse(text)
                )
                lost = int((found.view(torch.int32) != 1 << 14).sum())  # 2^-135, in units of 2^-149
                assert not lost, (library, dtype, text, lost)
    assert torch.get_num_threads() == 2
    assert torch.tensor(2.0**-140, dtype=torch.float32).mul(1.0).eq(0.0)  # as the caller has set it
"""


def test_sums_of_pieces_keep_subnormals_whatever_the_caller_has_set():
    done = subprocess.run(
        [sys.executable, "-c", FLUSHING], capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("architecture", ["sm_90", "gfx942"])
def test_infinities_of_pieces_that_cancel_are_the_units_nan(architecture):
    a, b = torch.ones(1, 1, 128), torch.ones(1, 128, 40)
    a[0, 0, 0], a[0, 0, 64] = torch.inf, -torch.inf
    for format, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        unit = MATRIX_UNITS[architecture][format]
        found = product.multiply(a.to(dtype), b.to(dtype), unit, (format,) * 2, Schedule(split_k=2))
        assert (found.view(torch.int32) == (0x7FFFFFFF if unit.kind == "truncated" else 0x7FC00000)).all()


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
    low = torch.tensor([0x7F800001, 0x7F801FFF, -0x7FFFFF], dtype=torch.int32).view(torch.float32)  # by low bits alone
    for format in ("tf32", "hf32"):
        assert product.operand(low, format).isnan().all()
        assert product.operand(torch.tensor([torch.inf, -torch.inf]), format).isinf().all()
        assert not product.operand(torch.empty(0, 3), format).numel()


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
