# SPDX-License-Identifier: Apache-2.0
"""torch.device as a program sees it: an index alone is a CUDA device, and all else is torch's own class."""

import copy
import functools
import importlib
import inspect
import pickle
import types
import typing

import numpy as np
import pytest
import torch

import hal


@pytest.fixture
def cuda():
    """The module that a program imports as torch, while a CPU stands for CUDA."""
    with hal.adopt("cpu") as adoption:
        yield types.SimpleNamespace(torch=importlib.import_module("torch"), adoption=adoption)


TRUE = (torch.device,)
"""torch's own class, in a tuple: a global name that holds it is replaced, as it is in any program."""


@pytest.mark.parametrize("make", [
    lambda device: device(0), lambda device: device(device=0), lambda device: device(np.int64(0)),
])  # fmt: skip
def test_an_index_alone_is_a_cuda_device(cuda, make):
    with pytest.raises(RuntimeError, match="accelerator"):
        make(TRUE[0])
    made = make(cuda.torch.device)
    assert (made.type, made.index) == ("cuda", 0)
    assert type(made) is TRUE[0]
    assert cuda.torch.ones(2, device=made).device == made
    (entry,) = (entry for entry in cuda.adoption.entries() if entry.api == "torch.device")
    assert entry.line == make.__code__.co_firstlineno


@pytest.mark.parametrize("given", [("cpu",), ("cuda",), ("cuda", 1), ("meta",), ("cuda:0",), (torch.device("cpu"),)])
def test_anything_else_is_torchs_own(cuda, given):
    assert cuda.torch.device(*given) == TRUE[0](*given)


@pytest.mark.parametrize("given", [(-1,), (True,), (None,), (0.5,), (), ("cuda:0", 0), ("nonsense",)])
def test_a_wrong_device_raises_torchs_own_error(cuda, given):
    with pytest.raises((RuntimeError, TypeError)) as own:
        TRUE[0](*given)
    with pytest.raises(type(own.value)) as ours:
        cuda.torch.device(*given)
    assert str(ours.value) == str(own.value)


def test_the_class_passes_for_torchs(cuda):
    device, made = cuda.torch.device, torch.device("cuda", 0)
    assert isinstance(made, device)
    assert issubclass(type(made), device)
    assert type(made) == device  # noqa: E721  # programs write it so
    assert {device: 1}[type(made)] == {TRUE[0]: 1}[device] == 1
    assert isinstance(made, device | str)
    assert typing.get_args(typing.Optional[device]) == (TRUE[0], type(None))  # noqa: UP045  # another class than `|` makes
    assert repr(device) == repr(TRUE[0])
    assert device.type is TRUE[0].type
    match made:
        case device(type=kind):
            assert kind == "cuda"

    @functools.singledispatch
    def asked(thing):
        return "something"

    asked.register(device)(lambda thing: "a device")
    assert asked(made) == "a device"


def test_it_has_the_slots_of_torchs_and_no_subclasses_either(cuda):
    device, made = cuda.torch.device, torch.device("cuda", 0)
    assert issubclass(device, device)
    assert (device.__str__(made), device.__repr__(made), device.__hash__(made)) == (str(made), repr(made), hash(made))
    assert device.__eq__(made, device(0))
    assert pickle.loads(pickle.dumps(made)) == made
    assert device.__reduce__(made) == made.__reduce__()
    assert device.__new__(device, "cuda", 1) == TRUE[0]("cuda", 1)
    assert {"type", "index"} <= set(dir(device))
    with pytest.raises(TypeError, match="not an acceptable base type"):
        type("Device", (device,), {})


CHILD = """
import marshal, pickle, sys, types
code, module, kind = pickle.load(open("sent", "rb"))
print(types.FunctionType(marshal.loads(code), {"torch": module})(2), kind)
"""


def test_what_cloudpickle_sends_is_redirected_in_a_child_of_the_run(program, tmp_path):
    """It sends a function as its code and what its globals are, and a class that it finds under its name by that."""
    (tmp_path / "cloudpickle").mkdir()
    (tmp_path / "cloudpickle" / "__init__.py").write_text("")
    (tmp_path / "cloudpickle" / "cloudpickle.py").write_text("def _class_reduce(kind):\n    return None\n")
    (tmp_path / "child.py").write_text(CHILD)
    done = program("""
        import marshal, pickle, subprocess, sys
        import cloudpickle.cloudpickle as library
        import torch

        class Sent:
            def __reduce__(self):
                return library._class_reduce(torch.device)

        def where(n):
            return torch.zeros(n, device=torch.device("cuda:0")).device

        assert library._class_reduce(int) is None
        with open("sent", "wb") as file:
            pickle.dump((marshal.dumps(where.__code__), torch, Sent()), file)
        done = subprocess.run([sys.executable, "child.py"], capture_output=True, text=True)
        print(done.stdout.strip() or done.stderr)
    """)  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "cuda:0 <class 'torch.device'>\n"), done.stderr


def test_the_class_is_pickled_as_a_name(cuda):
    device = cuda.torch.device
    assert pickle.loads(pickle.dumps(device)) is device
    assert copy.deepcopy(device) is device
    kept = pickle.dumps(device)
    hal.release()
    assert pickle.loads(kept) is TRUE[0]
    with pytest.raises(RuntimeError, match="accelerator"):
        device(0)  # one that was kept is torch's own


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_annotations_of_it_are_understood(cuda):
    t = cuda.torch

    def kernel(x: torch.Tensor, where: torch.device, other: torch.device | None = None) -> torch.Tensor:
        return x.to(where)

    schema = t.library.infer_schema(kernel, mutates_args=())
    assert schema == "(Tensor x, Device where, Device? other=None) -> Tensor"
    own = torch.jit.annotations.try_ann_to_type
    assert str(t.jit.script(kernel).schema).endswith("(Tensor x, Device where, Device? other=None) -> Tensor")
    hal.release()
    assert torch.jit.annotations.try_ann_to_type is not own
    assert inspect.getmodule(torch.jit.annotations.try_ann_to_type) is torch.jit.annotations


def test_compiled_code_has_the_same_class(cuda):
    t = cuda.torch

    def step(x, index):
        where = t.device(index)
        if isinstance(where, t.device) and type(where) == t.device and x.device == t.device(0):  # noqa: E721
            return x.to(where) + t.ones(2, device=where)
        return x

    later = t.compile(lambda x: x.to(t.device("cuda", x.shape[0] - 2)), dynamic=True, backend="eager")
    assert later(t.ones(2, device=0)).is_cuda  # a number that is not known: run, as with torch's class
    x = t.ones(2, device=0)
    compiled = t.compile(step, fullgraph=True, backend="eager")
    assert compiled(x, 0).tolist() == step(x, 0).tolist() == [2.0, 2.0]
