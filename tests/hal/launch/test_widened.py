# SPDX-License-Identifier: Apache-2.0
"""Operators that CUDA has in 16 bits and torch's CPU has not: computed in float32, rounded, counted, undone."""

import importlib
import types

import pytest
import torch
import torch.nn.functional as F

import hal
from hal.errors import UnsupportedOperation

pytestmark = pytest.mark.skipif(not hasattr(torch.library, "get_kernel"), reason="torch before 2.10 keeps its kernels")


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
    assert {entry.api for entry in cuda.adoption.entries() if entry.kind == "fallback"} >= {"torch.mm", "torch.bmm"}


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
