# SPDX-License-Identifier: Apache-2.0
"""What `support()` says about the CPU, cell by cell, against float64 results that numpy computes."""

import warnings

import numpy as np
import pytest
import torch

import hal
from hal import support_table
from hal.support_table import SupportTable, _operators

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
FP8 = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]
DTYPES = [*FLOATS, torch.int64, torch.int8, torch.bool, *FP8]
CPU = torch.device("cpu")


@pytest.fixture
def device():
    with hal.open_device("cpu") as opened:
        yield opened


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def added(target, rows):
    target = target.copy()
    target[[3, 1]] += rows
    return target


# Each operator on the table's samples, x(shape): 0, 1, 2, 0, ... eps is what the dtype gives RMSNorm by default.
RESULTS = {
    "matmul": lambda x, eps: x(32, 32) @ x(32, 32),
    "bmm": lambda x, eps: x(2, 16, 16) @ x(2, 16, 16),
    "grouped_mm": lambda x, eps: np.concatenate([x(32, 32)[16 * g :][:16] @ x(2, 32, 32)[g] for g in (0, 1)]),
    "scaled_mm": lambda x, eps: x(32, 32) @ x(32, 32).T,
    "conv2d": lambda x, eps: np.einsum(
        "cyxij,ocij->oyx", np.lib.stride_tricks.sliding_window_view(x(4, 8, 8), (3, 3), (1, 2)), x(4, 4, 3, 3)
    )[None],
    "attention": lambda x, eps: (softmax(x(2, 8, 16) @ x(2, 8, 16).swapaxes(1, 2) / 4) @ x(2, 8, 16))[None],
    "softmax": lambda x, eps: softmax(x(4, 16)),
    "sigmoid": lambda x, eps: 1 / (1 + np.exp(-x(16))),
    "silu": lambda x, eps: x(16) / (1 + np.exp(-x(16))),
    "logsumexp": lambda x, eps: np.log(np.exp(x(4, 16)).sum(-1)),
    "rms_norm": lambda x, eps: x(4, 16) / np.sqrt((x(4, 16) ** 2).mean(-1, keepdims=True) + eps),
    "layer_norm": lambda x, eps: (
        (x(4, 16) - x(4, 16).mean(-1, keepdims=True)) / np.sqrt(x(4, 16).var(-1, keepdims=True) + 1e-5)
    ),
    "add": lambda x, eps: 2 * x(16),
    "sum": lambda x, eps: x(16).sum(),
    "cumsum": lambda x, eps: x(16).cumsum(),
    "sort": lambda x, eps: np.sort(x(16)),
    "topk": lambda x, eps: -np.sort(-x(16))[:4],
    "gather": lambda x, eps: x(16)[[3, 1]],
    "index_select": lambda x, eps: x(8, 4)[[3, 1]],
    "index_add": lambda x, eps: added(x(8, 4), x(2, 4)),
    "scatter_add": lambda x, eps: added(x(16), x(2)),
    "embedding": lambda x, eps: x(8, 4)[[3, 1]],
    "cross_entropy": lambda x, eps: -np.log(softmax(x(2, 16))[[0, 1], [3, 1]]).mean(),
    "cast": lambda x, eps: x(16),
    "copy": lambda x, eps: x(16),
}


def expected(operator, dtype):
    """The result in float64, from the samples as the dtype holds them: a bool knows 0 and 1 only."""

    def x(*shape):
        values = (np.arange(np.prod(shape)) % 3).reshape(shape).astype(np.float64)
        return np.minimum(values, 1) if dtype == torch.bool else values

    return RESULTS[operator](x, torch.finfo(dtype).eps if dtype.is_floating_point else 0)


def agrees(result, wanted):
    """Exactly, where the result is of integers; within four roundings of its dtype otherwise."""
    assert tuple(result.shape) == np.shape(wanted)
    if not result.dtype.is_floating_point:
        return torch.equal(result, torch.as_tensor(wanted).to(result.dtype))
    error = np.abs(result.double().numpy() - wanted)
    return bool((error <= 4 * torch.finfo(result.dtype).eps * np.maximum(np.abs(wanted), 1)).all())


def test_every_operator_of_the_table_has_a_result_here():
    assert set(RESULTS) == set(SupportTable.operators())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operator", RESULTS)
def test_a_supported_operator_computes_the_right_thing_and_another_one_raises(device, operator, dtype):
    answer = device.support(operator, dtype)
    run = _operators()[operator]
    if answer:
        assert agrees(run(CPU, dtype), expected(operator, dtype)), answer
    else:
        with pytest.raises((RuntimeError, TypeError, ValueError, NotImplementedError)):
            run(CPU, dtype)


@pytest.mark.parametrize("wrong", [0.5, 1.0625, -1.0, float("nan")])
@pytest.mark.parametrize("operator", RESULTS)
def test_a_wrong_result_would_be_noticed(operator, wrong):
    """Half the value is what FP8 of the other family would give."""
    run = _operators()[operator]
    dtype = torch.float8_e4m3fn if operator == "scaled_mm" else torch.bfloat16
    assert not agrees(run(CPU, dtype).float() * wrong, expected(operator, dtype))


def test_a_result_of_another_precision_would_be_noticed():
    for operator in ("softmax", "sigmoid", "silu", "logsumexp", "rms_norm", "attention", "cross_entropy"):
        emulation = _operators()[operator](CPU, torch.bfloat16).float()
        assert not agrees(emulation, expected(operator, torch.float32)), operator


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_training_loop_has_what_it_needs(device, dtype):
    lacking = {o for o in device.operators() if device.support(o, dtype).status == "unsupported"}
    assert lacking <= {"scaled_mm", "grouped_mm"}


@pytest.mark.parametrize("dtype", FP8, ids=str)
def test_fp8_is_computed_in_float32_unless_the_processor_has_a_unit(device, dtype):
    answer = device.support("scaled_mm", dtype)
    if torch.cpu._is_amx_tile_supported():  # oneDNN multiplies the OCP formats, and torch then emulates none
        fnuz = dtype in (torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
        assert answer.status == ("unsupported" if fnuz else "native")
    else:
        assert answer.status == "emulated"
    name = str(dtype).removeprefix("torch.float8_")
    assert device.precision.fp8_formats()[name] == answer


@pytest.mark.parametrize("dtype", ["bfloat16", None, 16, float])
def test_what_is_no_dtype_is_an_error_and_no_answer(device, dtype):
    for ask in (
        lambda: device.support("matmul", dtype),
        lambda: device.precision.supports(dtype),
        lambda: device.precision.autocast(dtype),
        lambda: device.precision.autocast(dtype, enabled=False),
    ):
        with pytest.raises(hal.ConfigError, match=r"torch\.bfloat16"):
            ask()


def table(monkeypatch, run, device=CPU):
    monkeypatch.setattr(support_table, "_operators", lambda: {"op": run})
    monkeypatch.setattr(support_table, "_fell_back", {})
    return SupportTable(device, "standin:0")


def ok(device, dtype):
    return torch.zeros(2, dtype=dtype, device=device)


def failing(times, error):
    """An operator that fails so many times, and then works."""
    calls = []

    def run(device, dtype):
        calls.append(dtype)
        if len(calls) <= times:
            raise error
        return ok(device, dtype)

    return run


def test_a_library_that_fails_once_is_asked_again(monkeypatch):
    assert table(monkeypatch, failing(1, RuntimeError("INTERNAL_ERROR"))).query("op", torch.float32).status == "native"


def test_a_refusal_is_not_kept_and_what_works_is(monkeypatch):
    asked = table(monkeypatch, failing(2, RuntimeError("not now")))
    assert asked.query("op", torch.float32).status == "unsupported"
    assert asked.query("op", torch.float32).status == "native"
    monkeypatch.setattr(support_table, "_operators", lambda: {"op": failing(99, RuntimeError("no longer"))})
    assert asked.query("op", torch.float32).status == "native"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 2147483648 bytes"
        ),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_no_memory_is_an_error_and_no_answer(monkeypatch, error):
    asked = table(monkeypatch, failing(1, error))
    with pytest.raises(hal.OutOfMemoryError) as caught:
        asked.query("op", torch.float32)
    assert caught.value.__cause__ is error
    assert asked.query("op", torch.float32).status == "native"


def test_a_device_that_has_failed_is_broken_and_lacks_no_operator(monkeypatch):
    def run(device, dtype):
        monkeypatch.setattr(torch, "zeros", lost)
        raise RuntimeError("an illegal memory access was encountered")

    def lost(*_, **__):
        raise RuntimeError("an illegal memory access was encountered")

    with pytest.raises(hal.Broken, match="illegal memory access"):
        table(monkeypatch, run).query("op", torch.float32)


def test_a_fallback_that_is_announced_once_in_a_process_is_remembered(monkeypatch):
    announced = []

    def run(device, dtype):
        if not announced:
            warnings.warn("The operator 'aten::op' will fall back to run on the CPU.", stacklevel=1)
        announced.append(dtype)
        return ok(device, dtype)

    first = table(monkeypatch, run)
    second = SupportTable(CPU, "standin:0 (another handle)")
    for asked in (first, second):
        for dtype in (torch.float32, torch.bfloat16):
            assert asked.query("op", dtype).status == "emulated"


def test_torchs_own_once_in_a_process_does_not_hide_a_fallback():
    values = torch.ones(4, 4).t()  # not contiguous, of which torch warns once

    def warned():
        with support_table._every_warning() as caught:
            torch.searchsorted(torch.arange(32.0).reshape(4, 8), values)
        return [str(warning.message) for warning in caught if "non-contiguous" in str(warning.message)]

    assert len(warned()) == len(warned()) == 1
    assert not torch.is_warn_always_enabled()


def test_an_operator_that_has_no_deterministic_form_is_asked_again_when_that_is_wanted(monkeypatch):
    def run(device, dtype):
        if torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled():
            raise RuntimeError("op does not have a deterministic implementation")
        return ok(device, dtype)

    asked = table(monkeypatch, run)
    try:
        for mode, status in (("default", "native"), ("error", "unsupported"), ("warn", "native")):
            torch.set_deterministic_debug_mode(mode)
            assert asked.query("op", torch.float32).status == status
    finally:
        torch.set_deterministic_debug_mode("default")
