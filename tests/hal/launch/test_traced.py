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

def moves(x):
    return x * (2 if x.cpu().is_cuda or x.to("cpu").is_cuda else 3) * (5 if "cuda" in x.cpu().type() else 7)

def typed(x):
    return x * (2 if x.type() == "torch.cuda.FloatTensor" else 3) * (5 if "cuda" in (x + 1).type() else 7)

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


def test_a_tensor_that_compiled_code_moves_to_the_host_is_there(cuda):
    x = cuda.torch.ones(1, device="cuda")
    assert torch.compile(program().moves, backend="eager")(x).item() == program().moves(x).item() == 21
    torch._dynamo.reset()
    assert torch.compile(program().moves, backend="eager", fullgraph=True)(x).item() == 10
    assert {api for _, api, _ in entries(cuda.adoption, "change")} == {"torch.Tensor.is_cuda", "torch.Tensor.type"}


def test_a_type_names_cuda_in_compiled_code_too(cuda):
    for x, expected in ((cuda.torch.ones(1, device="cuda"), 10), (cuda.torch.ones(1), 15)):
        assert torch.compile(program().typed, backend="eager")(x).item() == program().typed(x).item() == expected


class Asks(torch.nn.Module):
    def __init__(self, torch):
        super().__init__()
        self.torch = torch

    def forward(self, x):
        t = self.torch
        y = x * (2 if x.is_cuda else 3) * (5 if x.device.type == "cuda" else 7) * (11 if "cuda" in x.type() else 13)
        if not x.is_cpu and x.get_device() == 0:
            y = y * t.cuda.get_device_properties(x.device).multi_processor_count + t.zeros(1, device=x.device)
        copy, back = x.cpu(), x.to("cpu").to("cuda:0")
        return y * (17 if copy.is_cuda or not t.zeros_like(back).is_cuda else 19)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # torch's own, as it exports
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_model_that_is_exported_takes_the_branch_that_it_takes_when_it_is_run(cuda, device):
    from torch.fx.experimental.proxy_tensor import make_fx

    x, model = cuda.torch.ones(2, device=device), Asks(cuda.torch)
    exported = [cuda.torch.export.export(model, (x,)).module()]
    exported += [make_fx(model, tracing_mode=mode, pre_dispatch=pre)(x) for mode in ("real", "fake", "symbolic")
                 for pre in (False, True)]  # fmt: skip
    length = torch.export.Dim("length")
    exported.append(cuda.torch.export.export(model, (x,), dynamic_shapes={"x": {0: length}}).module())
    assert all(torch.equal(run(x), model(x)) for run in exported)
    asked = {entry.api for entry in cuda.adoption.entries() if entry.kind == "belief"}
    assert device == "cpu" or "torch.Tensor.device" in asked


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_model_that_is_exported_as_one_graph_takes_it_too_or_is_noted(cuda):
    t, branch = cuda.torch, program().branch

    class Model(torch.nn.Module):
        def forward(self, x):
            return branch(x)

    exported = [t.export.export(Model(), (t.ones(1, device=device),), strict=True).module()(t.ones(1))
                for device in ("cuda", "cpu")]  # fmt: skip
    assert [y.item() for y in exported] == [2, 2]
    assert entries(cuda.adoption, "change") == {("change", "torch.Tensor.is_cuda", 20)}


def test_tensors_without_numbers_are_where_they_are_made(cuda):
    from torch._subclasses.fake_tensor import FakeTensorMode

    t, layer = cuda.torch, torch.nn.Linear
    host, there = t.ones(3), t.ones(3, device="cuda")
    with FakeTensorMode() as mode:
        x, h = t.ones(3, device="cuda"), t.ones(3)
        on_device = [x, h.cuda(), h.to(x), layer(3, 4, device="cuda").weight, mode.from_tensor(there)]
        on_host = [h, x.cpu(), mode.from_tensor(host)]
        product = layer(3, 4, device="cuda")(x) + layer(3, 4).cuda()(h.cuda())
        assert {y.device for y in (*on_device, product)} == {torch.device("cuda", 0)}
        assert {y.device for y in on_host} == {torch.device("cpu")}
        assert str(x) == "FakeTensor(..., device='cuda:0', size=(3,))"
    hal.release()
    assert x.device == h.device == torch.device("cpu")


def test_properties_of_the_device_are_constants_of_compiled_code(cuda):
    t = cuda.torch

    def step(x):
        y = x * 2 if t.cuda.is_bf16_supported() else x
        return y * t.cuda.get_device_properties(x.device).multi_processor_count + len(t.cuda.get_device_name(0))

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
