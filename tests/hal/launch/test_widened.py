# SPDX-License-Identifier: Apache-2.0
"""Operators that CUDA has in 16 bits and torch's CPU has not: computed in float32, rounded, counted, undone."""

import importlib
import types

import pytest
import torch
import torch.nn.functional as F

import hal
from hal.errors import UnsupportedOperation

pytestmark = [
    pytest.mark.skipif(not hasattr(torch.library, "get_kernel"), reason="torch before 2.10 keeps its kernels"),
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental"),  # on CUDA as well
]


@pytest.fixture
def cuda():
    """The module that a program imports as torch, while a CPU stands for CUDA."""
    with hal.adopt("cpu") as adoption:
        yield types.SimpleNamespace(torch=importlib.import_module("torch"), adoption=adoption)


OPERATORS = {
    "avg_pool3d": ((1, 2, 4, 4, 4), lambda x: F.avg_pool3d(x, 2)),
    "bilinear": ((1, 3, 8, 8), lambda x: F.interpolate(x, size=(4, 5), mode="bilinear", antialias=True)),
    "bicubic": ((1, 3, 8, 8), lambda x: F.interpolate(x, size=(4, 5), mode="bicubic", antialias=True)),
    "multi_margin": ((3, 4), lambda x: F.multi_margin_loss(x, torch.tensor([1, 2, 0]))),
    "multilabel": ((3, 4), lambda x: F.multilabel_margin_loss(x, torch.tensor([[1, 2, 0, -1]] * 3))),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", OPERATORS)
def test_16_bits_are_computed_in_float32_and_rounded(cuda, name, dtype):
    shape, operator = OPERATORS[name]
    given = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    narrow, wide = (given.to(kind).clone().requires_grad_() for kind in (dtype, torch.float32))
    for x in (narrow, wide):
        y = operator(x)
        y.sum().backward() if x is wide else y.backward(torch.ones_like(y))
        x.result = y
    assert torch.equal(narrow.result, wide.result.to(dtype))
    assert torch.equal(narrow.grad, wide.grad.to(dtype))
    found = [entry for entry in cuda.adoption.entries() if entry.kind == "fallback"]
    assert found
    assert all(entry.nbytes for entry in found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_with_a_wide_result(cuda, dtype):
    a, b = torch.randn(4, 5).to(dtype), torch.randn(5, 6).to(dtype)
    assert torch.equal(torch.mm(a, b, out_dtype=torch.float32), a.float() @ b.float())
    assert torch.equal(torch.bmm(a[None], b[None], out_dtype=torch.float32)[0], a.float() @ b.float())
    out, c = torch.empty(4, 6), torch.randn(4, 6)
    assert torch.mm(a, b, out_dtype=torch.float32, out=out) is out
    assert torch.equal(out, a.float() @ b.float())
    for addend in (c, c.to(dtype)):
        expected = torch.addmm(addend.float(), a.float(), b.float())
        assert torch.equal(torch.addmm(addend, a, b, out_dtype=torch.float32), expected)
        assert torch.equal(torch.addmm(addend, a, b, out_dtype=torch.float32, out=out), expected)
        batches, own = (addend[None], a[None], b[None]), torch.baddbmm(*(x.float()[None] for x in (addend, a, b)))
        assert torch.equal(torch.baddbmm(*batches, out_dtype=torch.float32, out=out[None]), own)
    found = {entry.api for entry in cuda.adoption.entries() if entry.kind == "fallback"}
    assert found == {"torch.mm", "torch.bmm", "torch.addmm", "torch.baddbmm"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, as it loads its compiler of kernels
def test_products_with_a_wide_result_in_compiled_kernels(cuda):
    a, b = torch.randn(4, 5).bfloat16(), torch.randn(5, 6).bfloat16()
    compiled = cuda.torch.compile(lambda a, b: torch.mm(a, b, out_dtype=torch.float32).relu(), fullgraph=True)
    assert torch.equal(compiled(a, b), (a.float() @ b.float()).relu())


HALF = {torch.float32: torch.float16, torch.complex64: torch.complex32}
TRANSFORMS = {
    "fft": lambda t, x: t.fft.fft2(x),
    "rfft": lambda t, x: t.fft.rfft(x),
    "irfft": lambda t, x: t.fft.irfft(t.fft.rfft(x)),
    "hfft": lambda t, x: t.fft.hfft(x),
    "ihfft": lambda t, x: t.fft.ihfftn(x),
    "stft": lambda t, x: t.stft(x, 8, window=t.ones(8, dtype=x.dtype), return_complex=True),
}


@pytest.mark.filterwarnings("ignore:.*batching rule")  # of float32, too
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_of_float16_have_its_dtypes(cuda, name):
    given = torch.randn(2, 32, generator=torch.Generator().manual_seed(3)).half()
    narrow = given.clone().requires_grad_()
    y, wide = TRANSFORMS[name](cuda.torch, narrow), TRANSFORMS[name](cuda.torch, given.float())
    assert y.dtype == HALF[wide.dtype]
    if name != "irfft":  # which rounds twice
        assert torch.equal(y.to(wide.dtype), wide.to(y.dtype).to(wide.dtype))
    y.to(torch.complex64).abs().sum().backward()
    assert narrow.grad.dtype == torch.float16
    with torch.inference_mode():
        assert TRANSFORMS[name](cuda.torch, given.clone()).dtype == y.dtype
    mapped = torch.vmap(lambda x: TRANSFORMS[name](cuda.torch, x[None]))(given)
    assert mapped.dtype == y.dtype
    assert torch.equal(mapped[1].to(wide.dtype), TRANSFORMS[name](cuda.torch, given[1:]).to(wide.dtype))
    assert {entry.kind for entry in cuda.adoption.entries() if entry.api.startswith(("torch.fft", "torch.stft"))} == {
        "fallback"
    }
    with pytest.raises(RuntimeError):
        TRANSFORMS[name](cuda.torch, given.bfloat16())  # nor does CUDA


@pytest.mark.filterwarnings("ignore:.*batching rule")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_window_of_more_bits_makes_a_transform_of_as_many(cuda, dtype):
    x = (torch.randn(2, 32, generator=torch.Generator().manual_seed(3)) * 1e4).half()
    window = torch.hann_window(8, dtype=dtype)
    y = cuda.torch.stft(x, 8, window=window, return_complex=True)
    wide = x.to(torch.promote_types(x.dtype, dtype))
    assert y.isfinite().all()
    assert torch.equal(y, torch.stft(wide, 8, window=window, return_complex=True))
    assert not [entry for entry in cuda.adoption.entries() if entry.kind == "fallback"]
    spectrum = (y / 2**12).to(torch.complex32)
    expected = torch.istft(spectrum.to(torch.complex64), 8, window=window)
    for run in (cuda.torch.istft, torch.vmap(cuda.torch.istft, in_dims=(0, None, None, None, None))):
        assert torch.equal(run(spectrum, 8, None, None, window), expected)
    assert {entry.api for entry in cuda.adoption.entries() if entry.kind == "fallback"} == {"torch.istft"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_transforms_of_lengths_that_are_not_known_yet(cuda):
    compiled = torch.compile(lambda x: cuda.torch.fft.rfft(x).abs(), backend="aot_eager", dynamic=True)
    for length in (8, 16):
        assert compiled(torch.ones(length).half())[0].item() == length
    assert all(type(entry.nbytes) is int for entry in cuda.adoption.entries())


def test_a_transform_of_float16_into_a_tensor(cuda):
    fft, x = cuda.torch.fft, torch.randn(3, 8).half()
    out = torch.empty(0, dtype=torch.complex32)
    assert torch.equal(fft.fft(x, out=out).to(torch.complex64), fft.fft(x).to(torch.complex64))
    assert out.shape == (3, 8)
    assert torch.equal(fft.ifft(x.float(), out=torch.empty(3, 8, dtype=torch.complex64)), fft.ifft(x.float()))
    with pytest.raises(RuntimeError, match="Expected out tensor to have dtype"):
        fft.rfft(x, out=torch.empty(0, dtype=torch.complex64))
    with pytest.raises(RuntimeError, match="automatic differentiation"):
        fft.fft(x.requires_grad_(), out=out)


def by_columns(x):
    """As the kernel wants its second factor: the transpose of a contiguous tensor."""
    return x.mT.contiguous().mT


SHAPES = {
    "rows": ((48, 32), (2, 32, 16)), "columns": ((2, 16, 32), (32, 48)), "inner": ((16, 48), (48, 16)),
    "batch": ((2, 16, 32), (2, 32, 16)),
}  # fmt: skip


def group(name, g, a, b, scale_a, scale_b):
    """The two factors of one group in float64, scaled; the first has 16 rows, columns or products, the second 32."""
    part, own = (slice(0, 16), slice(16, 48))[g], slice(16 * g, 16 * g + 16)
    if name == "rows":
        return a[part] * scale_a[part, None], b[g] * scale_b[g]
    if name == "columns":
        return a[g] * scale_a[g, :, None], b[:, part] * scale_b[part]
    if name == "inner":
        return a[:, part] * scale_a[own, None], b[part] * scale_b[own]
    return a[g] * scale_a[g, :, None], b[g] * scale_b[g]


@pytest.mark.parametrize("name", SHAPES)
def test_grouped_products_of_scaled_numbers(cuda, name):
    draw = torch.Generator().manual_seed(5)
    a, b = (torch.randn(shape, generator=draw).to(torch.float8_e4m3fn) for shape in SHAPES[name])
    b = by_columns(b)
    scale_a, scale_b = (torch.rand(32 if name == "inner" else x.shape[:-1], generator=draw) for x in (a, b.mT))
    offs = None if name == "batch" else torch.tensor([16, 48], dtype=torch.int32)
    y = cuda.torch._scaled_grouped_mm(a, b, scale_a, scale_b, offs)
    assert y.dtype == torch.bfloat16
    factors = [group(name, g, a.double(), b.double(), scale_a, scale_b) for g in range(2)]
    join = {"rows": torch.cat, "columns": lambda parts: torch.cat(parts, 1)}.get(name, torch.stack)
    expected, size = join([x @ w for x, w in factors]), join([x.abs() @ w.abs() for x, w in factors])
    # Each factor is scaled and rounded in float32, K <= 32 products are summed in it, and the result is rounded.
    assert ((y.double() - expected).abs() <= size * (32 + 2 + 1) * 2.0**-24 + expected.abs() * 2.0**-8).all()
    with pytest.raises(RuntimeError, match=r"scale_a is torch.float32 .*expected"):
        cuda.torch._scaled_grouped_mm(a, b, scale_a[..., :3], scale_b, offs)
    with pytest.raises(RuntimeError, match="bias"):
        cuda.torch._scaled_grouped_mm(a, b, scale_a, scale_b, offs, torch.ones(16))
    recipes, product = torch.nn.functional.ScalingType, torch.nn.functional.scaled_grouped_mm
    again = product(a, b, scale_a, recipes.RowWise, scale_b, recipes.RowWise, offs=offs)
    assert torch.equal(again, y)
    with pytest.raises(UnsupportedOperation, match="scales of blocks"):
        product(a, b, scale_a, recipes.BlockWise1x32, scale_b, recipes.RowWise, offs=offs)


def test_a_routine_of_cusolver_is_a_change_of_meaning(cuda):
    x = cuda.torch.randn(3, 3, device="cuda")
    assert torch.equal(cuda.torch.linalg.svd(x, driver="gesvd").S, cuda.torch.linalg.svd(x).S)
    assert torch.equal(cuda.torch.linalg.svdvals(x, driver="gesvdj"), cuda.torch.linalg.svdvals(x))
    found = [entry.api for entry in cuda.adoption.entries() if entry.kind == "change"]
    assert found == ["torch.linalg.svd", "torch.linalg.svdvals"]


def test_strict_mode_refuses_them():
    with hal.adopt("cpu", strict=True), pytest.raises(UnsupportedOperation, match="avg_pool3d"):
        F.avg_pool3d(torch.ones(1, 1, 2, 2, 2, dtype=torch.float16), 2)


def test_afterwards_they_are_missing_again():
    with hal.adopt("cpu"):
        F.avg_pool3d(torch.ones(1, 1, 2, 2, 2, dtype=torch.float16), 2)
    with pytest.raises(RuntimeError, match="not implemented for 'Half'"):
        F.avg_pool3d(torch.ones(1, 1, 2, 2, 2, dtype=torch.float16), 2)
    with pytest.raises(RuntimeError, match=r"aten::mm\.dtype"):
        torch.mm(torch.ones(2, 2).half(), torch.ones(2, 2).half(), out_dtype=torch.float32)
    assert F.avg_pool3d(torch.ones(1, 1, 2, 2, 2), 2).item() == 1
