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

    x = t.ones(2, device=0)
    compiled = t.compile(step, fullgraph=True, backend="eager")
    assert compiled(x, 0).tolist() == step(x, 0).tolist() == [2.0, 2.0]
