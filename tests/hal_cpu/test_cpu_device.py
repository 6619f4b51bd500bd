# SPDX-License-Identifier: Apache-2.0
"""The CPU's facets against the raw answers of the kernel and of torch."""

import collections
import contextlib
import gc
import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import hal
from hal import philox


@pytest.fixture
def device():
    with hal.open_device("cpu") as opened:
        yield opened


def kernel(name):
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


def test_opening_changes_nothing_once_torch_is_imported(device):
    assert list(device.changes) == []
    assert device.because == "asked for by name"


def test_process_memory_is_what_the_kernel_says(device):
    before = device.memory.stats()
    block = torch.ones(64 << 20, dtype=torch.uint8)
    after = device.memory.stats()
    assert abs(after.process - kernel("VmRSS")) < 8 << 20  # other threads may allocate between the two readings
    assert after.process - before.process > 48 << 20
    assert before.allocated is None
    assert "allocated" not in before.sources
    del block


def test_the_peak_starts_anew_at_a_reset(device):
    block = torch.ones(128 << 20, dtype=torch.uint8)
    high = device.memory.stats().peak_process
    del block
    device.memory.empty_cache()
    device.memory.reset_peak()
    assert device.memory.stats().peak_process < high - (64 << 20)


def test_counted_tensors_are_counted_once_and_die(device):
    with device.memory.count_tensors():
        a = torch.zeros(1000, dtype=torch.float32)
        view = a[10:].view(-1)
        assert device.memory.allocated() == 4000
        b = a + 1
        assert device.memory.allocated() == 8000
        del a
        assert device.memory.allocated() == 8000, "the view keeps the storage alive"
        del view
        assert device.memory.allocated() == 4000
        assert device.memory.stats().peak_allocated == 8000
        with pytest.raises(hal.ConfigError), device.memory.count_tensors():
            pass
    assert device.memory.allocated() is None
    del b


def test_a_limit_raises_our_error_with_the_size_that_was_asked_for():
    """In a process of its own: a kernel limit is felt by everything in it."""
    script = """
import hal, torch
with hal.open_device("cpu") as device:
    device.memory.limit(8 << 30)
    try:
        with device.memory.catch_out_of_memory():
            torch.empty(16 << 30, dtype=torch.uint8)
    except hal.OutOfMemoryError as error:
        assert error.requested == 16 << 30, error.requested
        assert isinstance(error.__cause__, RuntimeError)
        assert error.stats.process > 0
        assert isinstance(error, MemoryError)
        print("raised")
    try:
        device.memory.limit(1)
    except hal.ConfigError:
        print("refused")
    device.memory.limit(None)
    torch.empty(16 << 30, dtype=torch.uint8)
    print("lifted")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["raised", "refused", "lifted"], done.stderr


def test_other_errors_pass_unchanged(device):
    with pytest.raises(RuntimeError, match="mat1 and mat2"), device.memory.catch_out_of_memory():
        torch.ones(2, 3) @ torch.ones(2, 3)


def test_ieee_is_set_read_back_measured_and_put_back(device):
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    report = device.precision.fp32_mode("ieee")
    assert dict(report.input_bits) == {"matmul": 24, "conv": 24}
    assert dict(report.switches)["torch.backends.mkldnn.matmul.fp32_precision"] == "ieee"
    assert matmul.fp32_precision == "ieee"
    device.close()
    assert matmul.fp32_precision == before


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Nonsense(TorchDispatchMode):
    """A mode in which no product works."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "mm" in str(func) or "conv" in str(func):
            raise RuntimeError("a mode of the user's")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "surroundings",
    [
        lambda: default_dtype(torch.bfloat16),
        lambda: default_dtype(torch.float64),
        lambda: torch.device("meta"),
        lambda: torch.autocast("cpu", torch.bfloat16),
        torch.inference_mode,
        torch.enable_grad,
        FakeTensorMode,
        Nonsense,
    ],
    ids=[
        "bfloat16 by default",
        "float64 by default",
        "meta by default",
        "autocast",
        "inference",
        "gradients",
        "fake tensors",
        "a mode of the user's",
    ],
)
def test_what_surrounds_the_call_does_not_decide_what_is_measured(device, surroundings):
    with surroundings():
        report = device.precision.fp32_mode("ieee")
        with pytest.raises(hal.UnsupportedPrecision, match="matmul keeps 24, conv keeps 24"):
            device.precision.fp32_mode("tf32")
        dtypes = (torch.float32, torch.bfloat16, torch.float8_e4m3fn)
        inside = [device.support(operator, dtype) for operator in device.operators() for dtype in dtypes]
    assert dict(report.input_bits) == {"matmul": 24, "conv": 24}
    with hal.open_device("cpu") as other:
        assert inside == [other.support(operator, dtype) for operator in device.operators() for dtype in dtypes]


def test_a_convolution_that_fails_once_is_still_part_of_the_proof(device, monkeypatch):
    convolution, calls = torch.nn.functional.conv2d, []

    def once(*arguments, **keywords):
        calls.append(arguments)
        if len(calls) == 1:
            raise RuntimeError("INTERNAL_ERROR")
        return convolution(*arguments, **keywords)

    monkeypatch.setattr(torch.nn.functional, "conv2d", once)
    assert dict(device.precision.fp32_mode("ieee").input_bits) == {"matmul": 24, "conv": 24}


def test_a_device_without_convolutions_is_proved_without_them_and_says_so(device, monkeypatch):
    def absent(*arguments, **keywords):
        raise NotImplementedError("no convolution here")

    monkeypatch.setattr(torch.nn.functional, "conv2d", absent)
    report = device.precision.fp32_mode("ieee")
    assert dict(report.input_bits) == {"matmul": 24}
    assert report.absent == (("conv", "NotImplementedError: no convolution here"),)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.OutOfMemoryError("out of memory. Tried to allocate 2.00 GiB"), hal.OutOfMemoryError),
        (RuntimeError("INTERNAL_ERROR"), hal.Broken),
    ],
)
def test_a_measurement_that_fails_is_no_answer_about_the_mode(device, monkeypatch, error, kind):
    assert device.support("matmul", torch.float32)
    before = torch.backends.mkldnn.matmul.fp32_precision

    def fails(a, b):
        raise error

    monkeypatch.setattr(torch.Tensor, "__matmul__", fails)
    with pytest.raises(kind) as caught:
        device.precision.fp32_mode("ieee")
    assert caught.value.__cause__ is error
    assert torch.backends.mkldnn.matmul.fp32_precision == before


INHERITED = """
import hal, torch
torch.backends.fp32_precision = "tf32"
parts = torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv, torch.backends.mkldnn.rnn
with hal.open_device("cpu") as device:
    device.precision.fp32_mode("ieee")
    assert [part.fp32_precision for part in parts] == ["ieee"] * 3
assert [part.fp32_precision for part in parts] == ["tf32"] * 3
torch.backends.fp32_precision = "ieee"
assert [part.fp32_precision for part in parts] == ["ieee"] * 3, "what was inherited became its own"
torch.backends.mkldnn.matmul.fp32_precision = "tf32"
with hal.open_device("cpu") as device:
    device.precision.fp32_mode("ieee")
torch.backends.fp32_precision = "none"
assert [part.fp32_precision for part in parts] == ["tf32", "none", "none"], "what was its own stays its own"
print("ok")
"""


def test_a_float32_switch_that_inherited_inherits_again():
    done = subprocess.run([sys.executable, "-c", INHERITED], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "ok", done.stderr


def test_determinism_that_the_user_asked_for_with_warnings_comes_back_with_warnings(device):
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        device.precision.deterministic()
        assert torch.get_deterministic_debug_mode() == 2
        device.precision.deterministic(False)
        assert torch.get_deterministic_debug_mode() == 1
        device.precision.deterministic()
        device.close()
        assert torch.get_deterministic_debug_mode() == 1
    finally:
        torch.set_deterministic_debug_mode("default")


@pytest.mark.parametrize("mode", ["tf32", "bf16x3"])
def test_a_mode_that_measures_as_nothing_is_unsupported_and_leaves_no_trace(device, mode):
    device.precision.fp32_mode("ieee")
    others = (torch.backends.cudnn.conv.fp32_precision, torch.backends.fp32_precision)
    with pytest.raises(hal.UnsupportedPrecision):
        device.precision.fp32_mode(mode)
    assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
    # Trap: mkldnn's own top-level setter resets cuDNN's switches.
    assert (torch.backends.cudnn.conv.fp32_precision, torch.backends.fp32_precision) == others


def test_two_open_devices_cannot_hold_one_switch_at_two_values(device):
    device.precision.deterministic()
    with hal.open_device("cpu") as second:
        second.precision.deterministic()
        device.close()
        assert torch.are_deterministic_algorithms_enabled(), "the second still holds it"
    assert not torch.are_deterministic_algorithms_enabled()


def test_an_unknown_mode_is_refused(device):
    with pytest.raises(hal.ConfigError, match="ieee, tf32, bf16x3"):
        device.precision.fp32_mode("fp64")


def test_autocast_computes_in_the_dtype_that_was_asked_for(device):
    with device.precision.autocast(torch.bfloat16):
        assert (torch.ones(4, 4) @ torch.ones(4, 4)).dtype == torch.bfloat16


def test_autocast_refuses_what_torch_would_only_warn_of(device):
    with pytest.raises(hal.UnsupportedDtype):
        device.precision.autocast(torch.float64)


def test_an_operator_that_the_table_does_not_know_is_an_error(device):
    with pytest.raises(hal.ConfigError, match="grouped_mm"):
        device.support("no_such_operator", torch.float32)


def test_seeding_and_state_reproduce_and_leave_other_generators_alone(device):
    other = torch.Generator().manual_seed(5)
    device.random.seed(7)
    state = device.random.get_state()
    first = torch.rand(8)
    device.random.set_state(state)
    assert torch.equal(torch.rand(8), first)
    device.random.seed(7)
    assert torch.equal(torch.rand(8), first)
    assert other.initial_seed() == 5
    with pytest.raises(hal.ConfigError, match="no state"):
        device.random.set_state(torch.zeros(3, dtype=torch.uint8))
    with pytest.raises(hal.ConfigError, match="seed is -1"):
        device.random.seed(-1)


def test_a_portable_stream_has_the_hosts_bits(device):
    drawn = device.random.stream(3, "router").normal(4, 5)
    assert drawn.numpy().tobytes() == philox.normal(3, "router", 20).tobytes()


def test_events_measure_time_and_a_stream_is_a_context(device):
    start, end = device.event(), device.event()
    with pytest.raises(hal.ConfigError):
        start.elapsed_ms(end)
    with device.stream() as stream:
        start.record(stream)
        threading.Event().wait(0.02)
        end.record(stream)
    stream.wait(end)
    device.synchronize()
    assert end.query()
    assert start.elapsed_ms(end) >= 20


def test_a_closed_device_says_so(device):
    device.close()
    device.close()
    with pytest.raises(hal.DeviceClosed):
        device.synchronize()


@pytest.mark.parametrize(
    "use",
    [
        lambda precision: precision.fp32_mode("ieee"),
        lambda precision: precision.deterministic(),
        lambda precision: precision.measure("matmul"),
        lambda precision: precision.supports(torch.float32),
        lambda precision: precision.fp8_formats(),
        lambda precision: precision.autocast(torch.bfloat16),
    ],
)
def test_a_facet_that_outlives_its_device_refuses_and_holds_nothing(device, use):
    kept, tensor = device.precision, torch.ones(2, device=device.torch_device)
    device.close()
    before = (torch.are_deterministic_algorithms_enabled(), torch.backends.mkldnn.matmul.fp32_precision)
    with pytest.raises(hal.DeviceClosed):
        use(kept)
    assert (torch.are_deterministic_algorithms_enabled(), torch.backends.mkldnn.matmul.fp32_precision) == before
    assert list(device.changes) == []
    assert tensor.sum() == 2


def test_a_switch_that_the_user_writes_meanwhile_is_shown_and_kept(device):
    before = torch.get_float32_matmul_precision()
    device.precision.fp32_mode("ieee")
    try:
        torch.set_float32_matmul_precision("high")  # which also writes mkldnn.matmul
        now = torch.backends.mkldnn.matmul.fp32_precision
        assert now != "ieee"
        assert any(change.new == "ieee" and change.now == now for change in device.changes)
        device.close()
        assert torch.backends.mkldnn.matmul.fp32_precision == now
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
        torch.backends.mkldnn.matmul.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "none"


def test_a_refused_mode_leaves_the_switch_as_the_user_wrote_it(device):
    part = torch.backends.mkldnn.matmul
    device.precision.fp32_mode("ieee")
    try:
        for written in ("tf32", "none"):
            part.fp32_precision = written
            now = part.fp32_precision
            with pytest.raises(hal.UnsupportedPrecision):
                device.precision.fp32_mode("tf32")
            assert part.fp32_precision == now
            torch.backends.fp32_precision = "tf32" if now != "tf32" else "ieee"
            assert (part.fp32_precision != now) == (written == "none"), "it inherits exactly if it did"
            torch.backends.fp32_precision = "none"
    finally:
        part.fp32_precision = torch.backends.fp32_precision = "none"


def test_a_device_that_is_dropped_warns_once_its_last_facet_is_gone_and_holds_up_nobody():
    before = torch.are_deterministic_algorithms_enabled()
    dropped = hal.open_device("cpu")
    dropped.precision.deterministic()
    precision = dropped.precision
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del dropped
        gc.collect()
        assert precision.supports(torch.float32), "a facet keeps what its handle set"
    with pytest.warns(ResourceWarning, match=r"cpu \(handle \d+\) was dropped without close\(\), and torch.use_determ"):
        del precision
    assert torch.are_deterministic_algorithms_enabled()
    with hal.open_device("cpu") as second:
        second.precision.deterministic()
    assert torch.are_deterministic_algorithms_enabled() == before


def test_prepare_places_a_training_loop_and_leaves_the_loop_alone(device):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    Batch = collections.namedtuple("Batch", "x y")
    data = [Batch(torch.ones(4, 3), {"target": torch.zeros(4, 2), "name": "first"})] * 2
    model, optimizer, loader = device.prepare(model, optimizer, data)
    for batch in loader:
        assert isinstance(batch, Batch)
        assert batch.y["name"] == "first"
        torch.nn.functional.mse_loss(model(batch.x), batch.y["target"]).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(loader) == 2
    assert loader.count(data[0]) == 2, "everything else stays reachable"
    assert len(optimizer.state) == 2


def test_prepare_refuses_what_it_cannot_place(device):
    with pytest.raises(hal.ConfigError, match="cannot place a int"):
        device.prepare(3)
    elsewhere = torch.optim.SGD([torch.nn.Parameter(torch.empty(2, device="meta"))])
    with pytest.raises(hal.ConfigError, match="together with its model"):
        device.prepare(elsewhere)


def test_opening_imports_torch_without_its_plugins_and_leaves_no_trace_of_it():
    script = """
import os, sys, hal
device = hal.open_device("cpu")
assert "torch" in sys.modules
assert "TORCH_DEVICE_BACKEND_AUTOLOAD" not in os.environ
assert list(device.changes) == []
device.close()
try:
    hal.open_device("cpu", allocator=hal.AllocatorPlan(expandable_segments=True))
except hal.ConfigError as error:
    assert "too late" in str(error)
    print("ok")
"""
    environment = {k: v for k, v in os.environ.items() if k != "TORCH_DEVICE_BACKEND_AUTOLOAD"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "ok", done.stderr
