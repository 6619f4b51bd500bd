# SPDX-License-Identifier: Apache-2.0
"""Compiled code on a simulated device: its products are the unit's, bit for bit, whenever it was compiled."""

import functools
import gc
import importlib
import subprocess
import sys

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

import hal
from hal.errors import UnsupportedOperation

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch's own, as it loads its compiler of kernels
    pytest.mark.filterwarnings("ignore:(?s).*flex_attention called without torch.compile"),
]


def cancelling(*shape):
    """Numbers whose sums over the last axis are zero but for the rounding, which another order shows."""
    draw = torch.Generator().manual_seed(7)
    half = torch.randn((*shape[:-1], shape[-1] // 2), generator=draw)
    return torch.cat([half, -half], -1)[..., torch.randperm(shape[-1], generator=draw)]


A, V = cancelling(9, 600), torch.ones(600) + cancelling(600) * 2**-8
PRODUCTS = {
    "mv": (torch.mv, A, V),
    "matmul": (torch.matmul, A, V),
    "one row": (torch.nn.functional.linear, A[:1], A[1:2], A[0, :1]),
    "one by one": (torch.bmm, A[:4, None], A[4:8, :, None]),
    "two rows": (torch.mm, A[:2], A[:3].T),
    "addmv": (torch.addmv, A[:, 0], A, V),
    "batches": (torch.baddbmm, A[:4, :1, None], A[:4, None], A[4:8, :, None]),
}


@pytest.fixture(scope="module", autouse=True)
def _fresh():
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_are_the_units(name):
    function, *given = PRODUCTS[name]
    compiled = torch.compile(function)
    compiled(*given)  # before: the CPU's
    with hal.open_device("sim:h200"):
        assert torch.equal(compiled(*given), function(*given))
    with hal.open_device("sim:v100"):
        assert torch.equal(compiled(*given), function(*given))


def test_where_inductor_refuses_to_call_what_could_be_decomposed(monkeypatch):
    monkeypatch.setenv("CI", "true")
    with hal.open_device("sim:h200"):
        assert torch.equal(torch.compile(torch.mv)(A, V), torch.mv(A, V))


def test_gradients_too():
    layer, x = torch.nn.Linear(600, 1), A[:1].clone().requires_grad_()
    with hal.open_device("sim:h200"):
        mine = torch.autograd.grad(torch.compile(layer)(x).sum(), (x, layer.weight))
        assert all(map(torch.equal, mine, torch.autograd.grad(layer(x).sum(), (x, layer.weight))))


def test_the_kernels_that_autotuning_would_choose_are_left_out():
    a = A[:, :64].bfloat16()
    with hal.open_device("sim:h200"):
        compiled = torch.compile(lambda x: torch.relu(x @ x.T), mode="max-autotune-no-cudagraphs")
        assert torch.equal(compiled(a), torch.relu(a @ a.T))


def test_convolutions_that_lie_channels_last():
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3))
    net, x = (thing.to(memory_format=torch.channels_last) for thing in (net, torch.randn(2, 3, 9, 9)))
    with torch.no_grad(), hal.open_device("sim:h200"):
        assert torch.equal(torch.compile(net)(x), net(x))


def test_attention_that_is_compiled_is_counted():
    q = torch.randn(1, 2, 16, 16)
    with hal.open_device("sim:h200") as device:
        flex_attention(q, q, q)
        assert device.not_simulated() == {}
        torch.compile(flex_attention)(q, q, q)
        assert device.not_simulated() == {"flex_attention in compiled code": 1}
    with hal.open_device("sim:h200/strict"), pytest.raises(Exception, match="not simulated"):
        torch.compile(flex_attention)(q, q, q)


@pytest.mark.filterwarnings("ignore:.*batching rule")  # torch has none for its own kernel
@pytest.mark.parametrize("width", [16, 8, 24])
def test_attention_is_the_same_compiled_and_mapped(width):
    q, k, v = (torch.randn(2, 3, 9, size).bfloat16().requires_grad_() for size in (16, 16, width))

    def attend(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q * 1.5, k, v, is_causal=True)

    with hal.open_device("sim:h200/strict"):
        y, z = attend(q, k, v), torch.compile(attend)(q, k, v)
        assert torch.equal(y, z)
        mine = torch.autograd.grad(y.sum(), (q, k, v))
        assert all(map(torch.equal, mine, torch.autograd.grad(z.sum(), (q, k, v))))
        assert torch.equal(torch.vmap(attend)(q[None], k[None], v[None])[0], y)
        assert torch.equal(torch.vmap(torch.vmap(attend))(q[None], k[None], v[None])[0], y)
        mapped = torch.func.vmap(torch.func.grad(lambda *given: attend(*given).sum()))(q[None], k[None], v[None])[0]
        assert torch.equal(mapped, mine[0])


def test_code_in_cpp_alone_reaches_the_unit_too():
    def computed(a, v, q):
        return torch.addmv(v[:8], a, v) + 1, torch.nn.functional.scaled_dot_product_attention(q, q, q), torch.mm(a, a.T)

    given = A[:8, :64], V[:64], torch.randn(1, 2, 9, 16).bfloat16()
    with hal.open_device("sim:a100/strict"):
        found = torch.compile(computed, options={"cpp_wrapper": True})(*given)
        assert all(map(torch.equal, found, computed(*given)))


BEFORE = """
import torch, hal

def attend(q, k, v):
    return torch.nn.functional.scaled_dot_product_attention(q * 1.5, k, v, is_causal=True)

torch.manual_seed(0)
q, k, v = (torch.randn(2, 3, 9, size).bfloat16().requires_grad_() for size in (16, 16, 8))
torch.compile(attend)(q, k, v)
with hal.open_device("sim:h200/strict"):
    assert torch.equal(torch.compile(attend)(q, k, v), attend(q, k, v))
"""


def test_what_was_traced_before_the_first_opening_does_not_decompose_attention_for_good():
    done = subprocess.run([sys.executable, "-c", BEFORE], capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr


def multiplied(a, b):
    return a @ b + 1


@pytest.mark.parametrize("cpp", [False, True])
def test_other_ways_to_inductor_lead_to_the_unit(cpp):
    from torch._inductor import compile_fx

    own = compile_fx.compile_fx
    with hal.open_device("sim:h200/strict"):
        expected = multiplied(A[:1], V[:, None])
        way = functools.partial(compile_fx.compile_fx, config_patches={"cpp_wrapper": cpp})
        for backend in "inductor", way:
            assert torch.equal(torch.compile(multiplied, backend=backend)(A[:1], V[:, None]), expected)
    assert compile_fx.compile_fx is own


LATE = """
import sys, torch, hal

def multiplied(a, b):
    return a @ b + 1

a, b = torch.linspace(-1, 1, 600).view(1, 600).sin(), torch.linspace(0, 9, 600).view(600, 1).cos()
with hal.open_device("sim:h200/strict"):
    assert "torch._inductor.compile_fx" not in sys.modules
    compiled = torch.compile(multiplied)
    assert torch.equal(compiled(a, b), multiplied(a, b))
    assert torch._inductor.compile_fx.compile_fx.__wrapped__
assert not hasattr(torch._inductor.compile_fx.compile_fx, "__wrapped__")
assert not any("hal_sim" in type(finder).__module__ for finder in sys.meta_path)
"""


FAILS = """
import importlib.abc, importlib.util, sys

class Interrupts(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torch._inductor.codecache":  # which the module imports
            sys.meta_path.remove(self)
            raise KeyboardInterrupt

def interrupted():
    importlib.util.find_spec("torch._inductor.compile_fx")
    sys.meta_path.insert(0, Interrupts())
    try:
        import torch._inductor.compile_fx
    except KeyboardInterrupt:
        return
    raise AssertionError("it was imported")
"""


@pytest.mark.parametrize("first", ["", "interrupted()"])
def test_a_compiler_that_is_loaded_later_leads_to_the_unit_too(first):
    code = FAILS + LATE.replace("    compiled =", f"    {first}\n    compiled =")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr


def test_the_entry_is_put_back_where_a_device_was_dropped():
    own, finders = torch._inductor.compile_fx.compile_fx, len(sys.meta_path)

    def drop():
        hal.open_device("sim:h200")
        gc.collect()

    with pytest.warns(ResourceWarning):
        drop()
    gc.collect()
    with hal.open_device("sim:a100/strict"):
        a, b = A[:1], V[:, None]
        assert torch.equal(torch.compile(multiplied)(a, b), multiplied(a, b))
    assert torch._inductor.compile_fx.compile_fx is own
    assert len(sys.meta_path) == finders


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of torch's export
def test_packages_of_compiled_code_are_counted(tmp_path):
    net, x = torch.nn.Linear(64, 8), A[:8, :64]
    path = torch._inductor.aoti_compile_and_package(
        torch.export.export(net, (x,)), package_path=str(tmp_path / "net.pt2")
    )
    own = torch._C._aoti.AOTIModelPackageLoader
    with hal.open_device("sim:h200") as device:
        torch._inductor.aoti_load_package(path)(x)
        assert device.not_simulated() == {"a package of AOTInductor": 1}
    with hal.open_device("sim:h200/strict"), pytest.raises(UnsupportedOperation, match="AOTInductor"):
        torch._inductor.aoti_load_package(path)
    assert torch._C._aoti.AOTIModelPackageLoader is own


def test_kernels_that_stay_are_not_compiled_where_the_compiler_leaves_code_to_python():
    with hal.open_device("sim:h200"):
        pass
    with hal.adopt("cpu"):
        seen = importlib.import_module("torch")
        compiled = seen.compile(seen.nn.DataParallel(seen.nn.Linear(2, 3)), backend="eager")
        assert compiled(seen.ones(4, 2, device="cuda")).shape == (4, 3)  # and nobody warns of what cannot be traced


def test_afterwards_the_compiler_is_as_it_was():
    from torch._inductor import decomposition, lowering

    before = dict(decomposition.decompositions), dict(lowering.lowerings)
    entry = torch._inductor.compile_fx.compile_fx
    with hal.open_device("sim:h200"):
        torch.compile(torch.mv)(A, V)
        assert (dict(decomposition.decompositions), dict(lowering.lowerings)) == before
    assert torch._inductor.compile_fx.compile_fx is entry
