# SPDX-License-Identifier: Apache-2.0
"""Which operators a device has, in which dtypes: found out by trying each once, on the opened device.

A hand-typed list is wrong after the next driver. An attempt runs the operator on a few elements, so that the
answer is the device's own. What works is remembered for the life of the device (its versions cannot change
meanwhile); a refusal is asked for again each time, so that no bad moment becomes a lasting answer.
"""

from __future__ import annotations

import contextlib
import math
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from hal.attempt import attempt
from hal.errors import ConfigError, HalError, Unsupported
from hal.matrix_unit import PARTNERS
from hal.support import Support

if TYPE_CHECKING:
    import torch

Operator = Callable[["torch.device", "torch.dtype"], "torch.Tensor"]
Emulations = Callable[[str, "torch.dtype"], "str | None"]

_FALLS_BACK = re.compile(r"fall(s|ing)? back\b.*\b(CPU|host)\b", re.IGNORECASE | re.DOTALL)
_fell_back: dict[tuple[str, str], str] = {}
"""(device type, operator) to how the host does it instead. For the life of the process, as some vendors warn of it once
only; for all dtypes, since what is missing is the kernel."""


def _sample(device: torch.device, dtype: torch.dtype, *shape: int) -> Any:
    """Return small numbers that every dtype holds; made on the host, as a device may lack the conversion."""
    import torch

    n = math.prod(shape)
    values = torch.arange(n, dtype=torch.float32, device="cpu").remainder(3).reshape(shape)
    return values.to(dtype).to(device)


def _scaled_mm(device: torch.device, dtype: torch.dtype) -> Any:
    import torch

    one = torch.ones((), dtype=torch.float32, device=device)
    name = str(dtype).removeprefix("torch.")
    other: torch.dtype = getattr(torch, PARTNERS.get(name, name))
    right = _sample(device, other, 32, 32).t()  # column-major, as the scaled product wants its second operand
    return torch._scaled_mm(_sample(device, dtype, 32, 32), right, one, one, out_dtype=torch.bfloat16)


def _grouped_mm(device: torch.device, dtype: torch.dtype) -> Any:
    import torch

    function = getattr(torch.nn.functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
    if function is None:
        raise NotImplementedError(f"torch {torch.__version__} has no grouped_mm")
    offsets = torch.tensor([16, 32], dtype=torch.int32, device=device)
    return function(_sample(device, dtype, 32, 32), _sample(device, dtype, 2, 32, 32), offs=offsets)


def _index(device: torch.device, *values: int) -> Any:
    import torch

    return torch.tensor(values, dtype=torch.int64, device=device)


def _operators() -> Mapping[str, Operator]:
    import torch
    import torch.nn.functional as F

    s = _sample
    return {
        "matmul": lambda d, t: s(d, t, 32, 32) @ s(d, t, 32, 32),
        "bmm": lambda d, t: torch.bmm(s(d, t, 2, 16, 16), s(d, t, 2, 16, 16)),
        "grouped_mm": _grouped_mm,
        "scaled_mm": _scaled_mm,
        "conv2d": lambda d, t: F.conv2d(s(d, t, 1, 4, 8, 8), s(d, t, 4, 4, 3, 3)),
        "attention": lambda d, t: F.scaled_dot_product_attention(*[s(d, t, 1, 2, 8, 16)] * 3),
        "softmax": lambda d, t: torch.softmax(s(d, t, 4, 16), -1),
        "sigmoid": lambda d, t: torch.sigmoid(s(d, t, 16)),
        "silu": lambda d, t: F.silu(s(d, t, 16)),
        "logsumexp": lambda d, t: torch.logsumexp(s(d, t, 4, 16), -1),
        "rms_norm": lambda d, t: F.rms_norm(s(d, t, 4, 16), (16,)),
        "layer_norm": lambda d, t: F.layer_norm(s(d, t, 4, 16), (16,)),
        "add": lambda d, t: s(d, t, 16) + s(d, t, 16),
        "sum": lambda d, t: s(d, t, 16).sum(),
        "cumsum": lambda d, t: s(d, t, 16).cumsum(0),
        "sort": lambda d, t: torch.sort(s(d, t, 16), stable=True)[0],
        "topk": lambda d, t: torch.topk(s(d, t, 16), 4)[0],
        "gather": lambda d, t: torch.gather(s(d, t, 16), 0, _index(d, 3, 1)),
        "index_select": lambda d, t: s(d, t, 8, 4).index_select(0, _index(d, 3, 1)),
        "index_add": lambda d, t: s(d, t, 8, 4).index_add(0, _index(d, 3, 1), s(d, t, 2, 4)),
        "scatter_add": lambda d, t: s(d, t, 16).scatter_add(0, _index(d, 3, 1), s(d, t, 2)),
        "embedding": lambda d, t: F.embedding(_index(d, 3, 1), s(d, t, 8, 4)),
        "cross_entropy": lambda d, t: F.cross_entropy(s(d, t, 2, 16), _index(d, 3, 1)),
        "cast": lambda d, t: s(d, t, 16).to(torch.float32),
        "copy": lambda d, t: s(d, t, 16).clone(),
    }


class SupportTable:
    """The operators of one opened device. Thread-safe.

    Args:
        device: where they are tried.
        device_id: for messages.
        emulated: a backend's cited table: for (operator, dtype) how it is emulated, or None.
    """

    def __init__(self, device: torch.device, device_id: str, emulated: Emulations | None = None) -> None:
        self._device = device
        self._device_id = device_id
        self._emulated = emulated
        # What works, by operator, dtype and torch's deterministic mode, in which some operators refuse.
        self._known: dict[tuple[str, torch.dtype, int], Support] = {}
        self._lock = threading.Lock()

    @staticmethod
    def operators() -> tuple[str, ...]:
        """Return the names that `query` knows."""
        return tuple(_operators())

    def query(self, operator: str, dtype: torch.dtype) -> Support:
        """Tell whether the device computes `operator` in `dtype`, as the process's settings are now.

        Raises:
            ConfigError: there is no such operator in the table, or `dtype` is no `torch.dtype`.
            OutOfMemoryError, Broken: the device cannot try it at the moment.
        """
        import torch

        if not isinstance(dtype, torch.dtype):
            raise ConfigError(f"{self._device_id}: {dtype!r} is no dtype", expected="a torch.dtype, as torch.bfloat16")
        if operator not in self.operators():
            raise ConfigError(
                f"{self._device_id}: no operator {operator!r} in the support table",
                expected=", ".join(sorted(self.operators())),
            )
        key = (operator, dtype, torch.get_deterministic_debug_mode())
        with self._lock:
            # The second attempt is for a library that fails once: a refusal counts when it is repeated.
            answer = self._known.get(key) or self._try(operator, dtype) or self._try(operator, dtype)
            if answer:
                self._known[key] = answer
            return answer

    def _try(self, operator: str, dtype: torch.dtype) -> Support:
        import torch

        run = _operators()[operator]
        try:
            with attempt(self._device_id, self._device), _every_warning() as caught:
                result = run(self._device, dtype)
                # The transfer waits for the device: an asynchronous refusal arrives here, not later.
                result.to("cpu")
        except Unsupported as error:  # a backend that knows better than to try
            return Support("unsupported", error.reason)
        except HalError:
            raise
        except Exception as error:  # noqa: BLE001  whatever the vendor raises is the answer
            lines = str(error).strip().splitlines()
            return Support("unsupported", f"{type(error).__name__}: {lines[0] if lines else 'no message'}")
        how = self._emulated(operator, dtype) if self._emulated else None
        if how is None:
            kernel = (self._device.type, operator)
            for warning in caught:
                if _FALLS_BACK.search(str(warning.message)):
                    _fell_back.setdefault(kernel, str(warning.message))
            how = _fell_back.get(kernel)
        if how is not None:
            return Support("emulated", how)
        if result.device.type != self._device.type:
            return Support("emulated", f"the result came back on {result.device.type}")
        return Support("native", f"tried on {self._device} with torch {torch.__version__}")


@contextlib.contextmanager
def _every_warning() -> Iterator[list[warnings.WarningMessage]]:
    """Collect all warnings inside: where a device lacks an operator, torch's fallback to the host tells by one.

    torch warns once in the life of a process, whichever operator and device came first, unless it is told otherwise.
    """
    import torch

    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield caught
    finally:
        torch.set_warn_always(before)
