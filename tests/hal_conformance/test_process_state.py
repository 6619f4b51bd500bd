# SPDX-License-Identifier: Apache-2.0
"""Whatever an implementation leaves changed is seen and put back, and to look takes next to no time."""

from __future__ import annotations

import os
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from hal.fp32_switch import has_fp32_switches
from hal_conformance.execution.process_state import ProcessState, _generators, kinds

KEPT = []
"""What was entered and not left: some modes end when nobody has their object."""


def enter(context):
    KEPT.append(context)
    context.__enter__()


LEAKS = {
    "torch's gradient mode": lambda: torch.set_grad_enabled(False),
    "torch's inference mode": lambda: enter(torch.inference_mode()),
    "numpy's reactions to floating-point errors": lambda: np.seterr(all="raise"),
    "numpy's handler of floating-point errors": lambda: np.seterrcall(print),
    "the flushing of denormals": lambda: torch.set_flush_denormal(True),
    "torch's default dtype": lambda: torch.set_default_dtype(torch.float64),
    "torch's default device": lambda: torch.set_default_device("meta"),
    "torch's function modes": lambda: enter(TorchFunctionMode()),
    "torch's dispatch modes": lambda: enter(TorchDispatchMode()),
    "the seed of torch's random numbers": lambda: torch.manual_seed(5),
    "torch's anomaly detection": lambda: torch.set_anomaly_enabled(True),
    "autograd's multithreading": lambda: torch.autograd.set_multithreading_enabled(False),
    "hooks of saved tensors": lambda: enter(torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)),
    "autocast on cpu": lambda: torch.set_autocast_enabled("cpu", True),
    "the nesting of autocast": lambda: enter(torch.autocast("cpu", torch.bfloat16)),
    "the cache of autocast": lambda: torch.set_autocast_cache_enabled(False),
    "deterministic algorithms": lambda: torch.use_deterministic_algorithms(True, warn_only=True),
    "torch.backends.opt_einsum": lambda: vars(torch.backends.opt_einsum.m).update(strategy="greedy"),
    "torch's float32_matmul_precision": lambda: torch.set_float32_matmul_precision("medium"),
    "torch's mkldnn_enabled": lambda: setattr(torch.backends.mkldnn, "enabled", False),
    "torch's mkldnn_deterministic": lambda: setattr(torch.backends.mkldnn, "deterministic", True),
    "torch's cudnn_benchmark": lambda: setattr(torch.backends.cudnn, "benchmark", True),
    "torch's cudnn_deterministic": lambda: setattr(torch.backends.cudnn, "deterministic", True),
    "torch's cublas_allow_bf16_reduced_precision_reduction":
        lambda: setattr(torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", False),
    "torch's cublas_allow_tf32": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "torch's flash_sdp_enabled": lambda: torch.backends.cuda.enable_flash_sdp(False),
    "torch's math_sdp_enabled": lambda: torch.backends.cuda.enable_math_sdp(False),
}  # fmt: skip
if has_fp32_switches():
    LEAKS |= {
        "the fp32_precision of generic all": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
        "the fp32_precision of mkldnn matmul": lambda: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),
        "the fp32_precision of cuda matmul": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    }


@pytest.fixture(autouse=True)
def as_it_was():
    os.environ.pop("PYTEST_CURRENT_TEST", None)  # which pytest changes before it runs a test's body
    state = ProcessState("cpu")
    yield
    assert state.put_back() == ("", True)
    KEPT.clear()


@pytest.mark.parametrize("name", LEAKS)
def test_what_is_left_changed_is_named_and_put_back(name):
    state = ProcessState("cpu")
    assert name in state.names
    LEAKS[name]()
    said, restored = state.put_back()
    assert said.startswith("left ")
    assert f"{name} at " in said or " more" in said
    assert restored, said
    assert state.put_back() == ("", True)


def other(value):
    """Return another value than this one, of its kind; None: there is none that is safe to set."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, tuple) and all(isinstance(part, bool) for part in value):
        return tuple(not part for part in value)
    return None


SWITCHES = [kind.name for kind in kinds("cpu") if other(kind.read()) is not None]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SWITCHES)
def test_every_switch_that_torch_has_is_seen_and_put_back(name):
    kind = next(kind for kind in kinds("cpu") if kind.name == name)
    state, before = ProcessState("cpu"), kind.read()
    try:
        kind.write(other(before))
    except (RuntimeError, TypeError) as error:
        pytest.skip(f"this torch cannot set it: {error}")
    if kind.read() == before:
        state.put_back()
        pytest.skip("this build of torch does not change it")
    said, restored = state.put_back()
    assert name in said or " more" in said
    assert restored
    assert kind.read() == before


def test_many_leaks_at_once_are_all_put_back_and_the_first_are_named():
    state = ProcessState("cpu")
    for name in ("torch's gradient mode", "torch's default dtype", "torch's mkldnn_enabled", "deterministic algorithms",
                 "the flushing of denormals"):  # fmt: skip
        LEAKS[name]()
    said, restored = state.put_back()
    assert said.startswith("left the flushing of denormals at ")
    assert said.endswith(" and 2 more")
    assert restored


def test_what_cannot_be_put_back_is_said():
    mode = TorchFunctionMode()
    with mode:
        state = ProcessState("cpu")
    assert state.put_back() == ("left torch's function modes at 0", False)


def test_random_generators_may_move_and_are_put_back_without_a_word():
    def draw():
        return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()

    state, first = ProcessState("cpu"), draw()
    assert draw() != first
    assert state.put_back() == ("", True)
    assert draw() == first


def test_seeds_of_python_and_numpy_are_put_back():
    state = ProcessState("cpu")
    random.seed(5)
    np.random.seed(5)
    assert state.put_back() == ("", True)


def test_a_seed_that_an_accelerator_is_given_is_said_and_put_back(monkeypatch):
    held = {"seed": 3}
    module = SimpleNamespace(initial_seed=lambda: held["seed"], manual_seed=lambda seed: held.update(seed=seed))
    monkeypatch.setattr(torch, "cuda", module)
    seed = next(kind for kind in _generators("cuda") if kind.name == "the seed of cuda's random numbers")
    before = seed.read()
    module.manual_seed(7)
    assert seed.read() != before
    seed.write(before)
    assert held == {"seed": 3}


def test_variables_that_were_there_are_put_back_and_their_values_are_not_shown(monkeypatch):
    monkeypatch.setenv("HAL_TEST_SECRET", "s3cret")
    state = ProcessState("cpu")
    os.environ["HAL_TEST_SECRET"] = "another"
    said, restored = state.put_back()
    assert (said, restored) == ("left the environment at other values of HAL_TEST_SECRET", True)
    assert os.environ["HAL_TEST_SECRET"] == "s3cret"
    monkeypatch.setenv("HAL_TEST_CACHE_DIR", "added")
    assert state.put_back() == ("", True)
    os.environ.clear()
    said, restored = state.put_back()
    assert said.startswith("left the environment at other values of ")
    assert restored
    assert os.environ["HAL_TEST_SECRET"] == "s3cret"


def test_the_working_directory_is_put_back(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = ProcessState("cpu")
    os.chdir("/")
    assert state.put_back() == ("left the working directory at /", True)
    assert os.getcwd() == str(tmp_path)  # noqa: PTH109


def test_the_current_stream_of_an_accelerator_is_put_back(monkeypatch):
    held = {"stream": 0, "device": 0}
    monkeypatch.setattr(
        torch, "accelerator", SimpleNamespace(
            current_stream=lambda: held["stream"], set_stream=lambda value: held.update(stream=value),
            current_device_index=lambda: held["device"], set_device_index=lambda value: held.update(device=value),
        ), raising=False,
    )  # fmt: skip
    state = ProcessState("cuda")
    held.update(stream=7, device=1)
    assert state.put_back() == ("left the current device at 1, the current stream at 7", True)
    assert held == {"stream": 0, "device": 0}


def test_the_number_of_threads_is_put_back_without_a_word():
    state, threads = ProcessState("cpu"), torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    assert state.put_back() == ("", True)
    assert torch.get_num_threads() == threads
