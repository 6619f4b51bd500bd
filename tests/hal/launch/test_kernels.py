# SPDX-License-Identifier: Apache-2.0
"""Operators that a program defines itself, with a kernel for CUDA: the device's tensors reach it, the host's its other."""

import importlib
import itertools

import pytest

import hal

_numbers = itertools.count()


@pytest.fixture
def name():
    """A name that no other operator has: torch keeps them for the life of the process."""
    return f"hal_test{next(_numbers)}::scaled"


@pytest.fixture
def torch():
    """The module that a program imports as torch, while a CPU stands for CUDA."""
    with hal.adopt("cpu"):
        yield importlib.import_module("torch")


def scaled(by):
    return lambda x: x * by


def define(torch, name, by, device_types):
    def kernel(x):
        return x * by

    kernel.__annotations__ = {"x": torch.Tensor, "return": torch.Tensor}
    return torch.library.custom_op(name, kernel, mutates_args=(), device_types=device_types)


def both(torch, operator):
    return operator(torch.ones(1, device="cuda")).item(), operator(torch.ones(1)).item()


def test_a_kernel_for_cuda_alone_serves_the_device(torch, name):
    assert define(torch, name, 3, "cuda")(torch.ones(1, device="cuda")).item() == 3


@pytest.mark.parametrize("first", ["cpu", None])
def test_the_kernel_of_the_host_stays_the_hosts(torch, name, first):
    operator = define(torch, name, 2, first)
    operator.register_kernel("cuda")(scaled(5))
    assert both(torch, operator) == (5, 2)


def test_the_order_of_registration_does_not_matter(torch, name):
    operator = define(torch, name, 5, "cuda")
    operator.register_kernel("cpu")(scaled(2))
    assert both(torch, operator) == (5, 2)


def test_one_registration_for_both(torch, name):
    assert both(torch, define(torch, name, 4, ("cpu", "cuda"))) == (4, 4)


def test_a_library_of_its_own_and_one_that_is_gone(torch, name):
    space, _, operator = name.partition("::")
    for by in (7, 8):
        library = torch.library.Library(space, "DEF")
        library.define(f"{operator}(Tensor x) -> Tensor")
        library.impl(operator, scaled(by), "CUDA")
        assert getattr(getattr(torch.ops, space), operator)(torch.ones(1, device="cuda")).item() == by
        library._destroy()


def test_after_the_release_a_kernel_for_cuda_alone_is_not_called(name):
    with hal.adopt("cpu"):
        torch = importlib.import_module("torch")
        alone, other = define(torch, name, 3, "cuda"), define(torch, f"{name}2", 2, "cpu")
        other.register_kernel("cuda")(scaled(5))
    assert other(torch.ones(1)).item() == 2
    with pytest.raises(NotImplementedError, match="for CUDA only"):
        alone(torch.ones(1))


def test_torchs_own_operators_are_left_alone(torch):
    library = torch.library.Library("aten", "IMPL")
    library.impl("sgn", scaled(9), "CUDA")
    assert torch.sgn(torch.ones(1, device="cuda")).item() == 1
    library._destroy()
