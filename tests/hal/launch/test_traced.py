# SPDX-License-Identifier: Apache-2.0
"""Compiled code under redirection: counted, noted and refused as if it were run."""

import importlib
import types

import pytest
import torch

import hal
from hal.errors import UnsupportedOperation


@pytest.fixture
def cuda():
    """The module that a program imports as torch, while a CPU stands for CUDA."""
    with hal.adopt("cpu") as adoption:
        yield types.SimpleNamespace(torch=importlib.import_module("torch"), adoption=adoption)


PROGRAM = """
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

def step(x):
    if x.is_cuda and x.device.type == "cuda":
        x = x + torch.ones(3, device="cuda")
    if torch.cuda.is_available():
        x = x * torch.zeros(3).cuda().to(x.dtype)
    return torch.zeros(3) + x.sum()

def count(x):
    return torch.histc(x, 4, 0, 3) + 1

def attend(q):
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return torch.nn.functional.scaled_dot_product_attention(q, q, q)

def branch(x):
    return x * 2 if x.is_cuda else x * 3

def whole(x):
    return x * 2 if x.is_cuda else x * 3

def makes(x):
    return torch.zeros(3).is_cuda, torch.zeros_like(x).is_cuda, torch.arange(3, device=x.device).is_cuda, (x + 1).is_cuda
"""


def program():
    names = {"__name__": "program"}
    exec(compile(PROGRAM, "program.py", "exec"), names)
    return types.SimpleNamespace(**names)


def entries(adoption, kind=None):
    return {
        (e.kind, e.api, e.line) for e in adoption.entries() if e.file.endswith("program.py") and kind in (None, e.kind)
    }


def test_what_compiled_code_calls_is_counted_at_its_lines():
    seen = []
    for compiled in (False, True):
        with hal.adopt("cpu") as adoption:
            step = program().step
            x = importlib.import_module("torch").ones(3, device="cuda")
            (torch.compile(step, backend="eager", fullgraph=True) if compiled else step)(x)
            seen.append(entries(adoption))
    run, traced = seen
    assert ("belief", "torch.Tensor.is_cuda", 6) in run
    assert {api for _, api, _ in run} >= {
        "torch.ones",
        "torch.Tensor.cuda",
        "torch.Tensor.device",
        "torch.cuda.is_available",
    }
    assert traced == run


@pytest.mark.parametrize(("name", "kind"), [("count", "fallback"), ("attend", "change")])
def test_what_is_not_as_on_cuda_is_noted_where_it_is_compiled(cuda, name, kind):
    x = torch.ones(1, 2, 4, 8, device="cuda", dtype=torch.int32 if name == "count" else torch.float32)
    torch.compile(getattr(program(), name), backend="eager", fullgraph=True)(x)
    (found,) = entries(cuda.adoption, kind)
    line = next(
        i for i, text in enumerate(PROGRAM.split("\n"), 1) if ("histc" if name == "count" else "with sdpa") in text
    )
    assert found[2] == line


@pytest.mark.parametrize("name", ["count", "attend"])
def test_strict_mode_refuses_it_in_compiled_code_too(name):
    with hal.adopt("cpu", strict=True):
        x = torch.ones(1, 2, 4, 8, device="cuda", dtype=torch.int32 if name == "count" else torch.float32)
        with pytest.raises(UnsupportedOperation, match=r"program.py:\d+ would change its meaning"):
            torch.compile(getattr(program(), name), backend="eager")(x)
        with pytest.raises(Exception, match="would change its meaning"):
            torch.compile(getattr(program(), name), backend="eager", fullgraph=True)(x)


def test_compiled_code_takes_the_branch_that_code_takes_that_is_run(cuda):
    branch = program().branch
    compiled = torch.compile(branch, backend="eager")
    host, device = cuda.torch.ones(1), cuda.torch.ones(1, device="cuda")
    for x in (host, device, host):
        assert compiled(x).item() == branch(x).item() == (2 if x is device else 3)


def test_where_one_graph_is_wanted_the_other_branch_is_noted_with_its_line(cuda):
    assert torch.compile(program().whole, backend="eager", fullgraph=True)(cuda.torch.ones(1)).item() == 2
    assert entries(cuda.adoption, "change") == {("change", "torch.Tensor.is_cuda", 23)}


def test_properties_of_the_device_are_constants_of_compiled_code(cuda):
    t = cuda.torch

    def step(x):
        return x * t.cuda.get_device_properties(x.device).multi_processor_count + len(t.cuda.get_device_name(0))

    x = t.ones(3, device="cuda")
    assert torch.equal(torch.compile(step, backend="eager", fullgraph=True)(x), step(x))


def test_what_compiled_code_makes_is_where_it_would_be(cuda):
    x = cuda.torch.ones(3, device="cuda")
    makes = program().makes
    assert torch.compile(makes, backend="eager")(x) == makes(x) == (False, True, True, True)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", lambda graph, inputs: graph.forward])
def test_what_a_graph_moves_to_where_it_is_stays_the_same_tensor_and_on_the_device(cuda, backend):
    """A graph holds the true device, and code that is written for one belongs to no module."""
    t = cuda.torch

    def train(x, buffer):
        there = buffer.to(x.device)
        there.add_(1)
        return there, buffer.to("cuda"), x.new_zeros(2, device=x.device)

    x, buffer = t.ones(2, device="cuda"), t.zeros(2, device="cuda")
    found = t.compile(train, backend=backend)(x, buffer)
    assert buffer.tolist() == [1, 1]
    assert all(y.is_cuda for y in found)


def test_a_library_that_is_replaced_is_noted_in_compiled_code(cuda):
    flash = importlib.import_module("flash_attn")
    q = cuda.torch.randn(1, 4, 2, 8, device="cuda")
    attend = cuda.torch.compile(lambda q: flash.flash_attn_func(q, q, q) + 1, backend="eager", fullgraph=True)
    assert torch.equal(attend(q), flash.flash_attn_func(q, q, q) + 1)
    for length in (5, 6):  # which the compiler leaves open from the second on
        q = cuda.torch.randn(1, length, 2, 8, device="cuda")
        assert torch.equal(attend(q), flash.flash_attn_func(q, q, q) + 1)
    noted = [entry for entry in cuda.adoption.entries() if entry.api == "flash_attn.flash_attn_func"]
    assert {entry.kind for entry in noted} == {"change"}
    assert {entry.file for entry in noted} == {__file__}
