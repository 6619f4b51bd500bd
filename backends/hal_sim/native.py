# SPDX-License-Identifier: Apache-2.0
"""The compiled library as Python functions, or None where there is none."""

from __future__ import annotations

import _ctypes
import contextlib
import ctypes
import functools
import itertools
import logging
import os
from pathlib import Path
from typing import Any

import torch

from hal.errors import ConfigError
from hal.matrix_unit import MatrixUnit
from hal_sim import build, twin
from hal_sim.grouped import Lengths

log = logging.getLogger("hal")

_KINDS = ("truncated", "floored", "pairwise", "fused")
_RESULTS = {"float32": 0, "float32_13": 1, "float16": 2}
_NO_FLOOR = -(2**31)


class _Unit(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int32) for name in (
        "kind", "group", "fraction_bits", "result", "exponent_floor", "interleaved", "min_exponent_a", "min_exponent_b",
    )]  # fmt: skip


class _Operand(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("table", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("storage", "batch", "row", "column")),
    ]


class _Problem(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "m", "n", "k")),
        ("a", _Operand),
        ("b", _Operand),
        ("c", ctypes.c_void_p),
        ("d", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("c_batch", "c_row", "c_column", "d_batch", "d_row")),
    ]


_STORED = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_TABLE = 3


@functools.cache
def _table(dtype: torch.dtype) -> torch.Tensor:
    """Return what each number of 8 bits is."""
    return torch.arange(256, dtype=torch.uint8).view(dtype).float()


def _operand(x: torch.Tensor) -> _Operand:
    storage = _STORED.get(x.dtype, _TABLE)
    table = _table(x.dtype).data_ptr() if storage == _TABLE else None
    strides = x.stride() if x.ndim == 3 else (0, *x.stride())
    return _Operand(x.data_ptr(), table, storage, *strides)


def asked() -> str:
    """Return which core the environment asks for: auto, native or torch.

    Raises:
        ConfigError: it names another.
    """
    name = os.environ.get("HAL_SIM_CORE", "auto")
    if name not in ("auto", "native", "torch"):
        raise ConfigError(f"there is no HAL_SIM_CORE={name!r}", expected="auto, native or torch")
    return name


@functools.cache
def library() -> Any:
    """Return the library, compiled if need be; None, after one warning, where that fails or it computes wrongly.

    `HAL_SIM_CORE=torch` asks for None, `native` for an error instead of it.

    Raises:
        ConfigError: it was asked for by name, and cannot be had.
    """
    asked_for = asked()
    if asked_for == "torch":
        return None
    try:
        found = _loaded()
        if not _is_sound(found):
            raise build.BuildFailed("the compiled library does not compute what it should: a compiler's fault?")
    except build.BuildFailed as error:
        if asked_for == "native":
            raise ConfigError(f"HAL_SIM_CORE=native, and there is no compiled core: {error}") from error
        log.warning("simulated matrix units run in torch's own operators, some hundred times slower: %s", error)
        return None
    return found


def _loaded() -> Any:
    library = build.compiled()
    with contextlib.suppress(OSError):
        return _opened(library)
    # What is intact cannot be loaded, or is another library: it was made for another system, or another process is just
    # replacing it.
    library = build.compiled(anew=True)
    try:
        return _opened(library)
    except OSError as error:
        raise build.BuildFailed(str(error)) from error


def _opened(library: Path) -> Any:
    """Load the library, and tell ctypes what its functions return.

    Raises:
        OSError: the loader refuses it, or one of the functions is missing.
    """
    found = ctypes.CDLL(str(library))
    try:
        for name in ("hal_sim_multiply", "hal_sim_multiply_groups", "hal_sim_reference", "hal_sim_fused_float64"):
            getattr(found, name).restype = ctypes.c_int
    except AttributeError as error:
        _ctypes.dlclose(found._handle)  # or the loader would give it again for what is built in its place
        raise OSError(str(error)) from error
    return found


def multiply(
    found: Any, a_BMK: torch.Tensor, b_BKN: torch.Tensor, c_BMN: torch.Tensor | None, unit: MatrixUnit,
    min_exponents: tuple[int, int], *, reference: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Return what `twin.multiply` does; see there. `reference` takes the plainest code, one element after the other.

    Operands may be of 16 or 8 bits as well. No c is zero.

    Raises:
        MemoryError: there is none for copies of the operands, or for threads.
    """
    B, M, K = a_BMK.shape
    N = b_BKN.shape[2]
    threads = torch.get_num_threads()
    if unit.result == "float64":
        d_BMN = torch.zeros((B, M, N), dtype=torch.float64) if c_BMN is None else c_BMN.contiguous().clone()
        a_BMK, b_BKN = a_BMK.contiguous(), b_BKN.contiguous()
        for a, b, d in zip(a_BMK, b_BKN, d_BMN, strict=True):
            _check(
                found.hal_sim_fused_float64(*map(ctypes.c_int64, (M, N, K)), *map(_pointer, (a, b, d)), threads),
                a_BMK, b_BKN,
            )  # fmt: skip
        return d_BMN
    d_BMN = torch.empty((B, M, N), dtype=torch.float32)
    c, c_strides = (None, (0, 0, 0)) if c_BMN is None else (c_BMN.data_ptr(), c_BMN.stride())
    if reference or unit.result == "float16":  # the plainest code reads float32
        a_BMK, b_BKN = a_BMK.float(), b_BKN.float()
    problem = _Problem(B, M, N, K, _operand(a_BMK), _operand(b_BKN), c, d_BMN.data_ptr(), *c_strides, M * N, N)
    function = found.hal_sim_reference if reference else found.hal_sim_multiply
    _check(function(ctypes.byref(_rule(unit, min_exponents)), ctypes.byref(problem), threads), a_BMK, b_BKN)
    return d_BMN


def multiply_groups(
    found: Any, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, unit: MatrixUnit, min_exponents: tuple[int, int],
    lengths: Lengths,
) -> None:  # fmt: skip
    """Put into `out` the products of groups, from zero: of rows of `a` where `b` has a matrix for each, or of sums.

    Args:
        found: the library.
        a, b: [R, K] and [G, K, N], or [M, R] and [R, N], of the dtypes that `multiply` takes.
        out: float32 [R, N] or [G, M, N], contiguous. Rows that no group has are left.
        unit, min_exponents: as for `multiply`.
        lengths: the groups of R.

    Raises:
        MemoryError: there is none for copies of the operands, or for threads.
    """
    (M, K), N = a.shape, b.shape[-1]
    whole = _Problem(1, M, N, K, _operand(a), _operand(b), None, out.data_ptr(), 0, 0, 0, 0, N)
    parts = (ctypes.c_int64 * (2 * len(lengths)))(*itertools.chain.from_iterable(lengths))
    status = found.hal_sim_multiply_groups(
        ctypes.byref(_rule(unit, min_exponents)), ctypes.byref(whole), parts, ctypes.c_int64(len(lengths)), b.ndim == 3,
        torch.get_num_threads(),
    )  # fmt: skip
    if status:
        raise MemoryError(f"simulated products of {tuple(a.shape)} by {tuple(b.shape)} need memory that is not there")


def _check(status: int, a_BMK: torch.Tensor, b_BKN: torch.Tensor) -> None:
    if status:
        B, M, K = a_BMK.shape
        raise MemoryError(
            f"a simulated product of {B} x {M} x {K} by {K} x {b_BKN.shape[2]} needs memory that is not there"
        )


@functools.lru_cache(maxsize=256)
def _rule(unit: MatrixUnit, min_exponents: tuple[int, int]) -> _Unit:
    floor = _NO_FLOOR if unit.exponent_floor is None else unit.exponent_floor
    return _Unit(_KINDS.index(unit.kind), unit.group, unit.fraction_bits, _RESULTS[unit.result], floor,
                 unit.interleaved, *min_exponents)  # fmt: skip


def _pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _is_sound(found: Any) -> bool:
    """Return whether the library agrees with torch's own operators on a few products of each kind, bit for bit."""
    integers = torch.arange(17 * 40, dtype=torch.float32).remainder(13) - 6
    a_BMK = (integers * 1.1).bfloat16().float().view(1, 17, 40)
    b_BKN = (integers.view(1, 40, 17) * 0.3).bfloat16().float()
    c_BMN = integers[: 17 * 17].view(1, 17, 17) * 1e-3
    for unit in (
        MatrixUnit("truncated", 16, 25, exponent_floor=-133), MatrixUnit("floored", 8, 24),
        MatrixUnit("floored", 16, 24, interleaved=True), MatrixUnit("pairwise", 4), MatrixUnit("fused"),
    ):  # fmt: skip
        mine, theirs = (
            function(a_BMK, b_BKN, c_BMN, unit, (-126, -126))
            for function in (functools.partial(multiply, found), twin.multiply)
        )
        if not torch.equal(mine.view(torch.int32), theirs.view(torch.int32)):
            return False
    return True
