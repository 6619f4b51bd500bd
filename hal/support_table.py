# SPDX-License-Identifier: Apache-2.0
"""Which operators a device has, in which dtypes: found out by trying each once, on the opened device.

A hand-typed list is wrong after the next driver. An attempt runs the operator on a few elements, so that the
answer is the device's own, and is cached for the life of the device (its versions cannot change meanwhile).
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from hal.errors import ConfigError
from hal.support import Support

if TYPE_CHECKING:
    import torch

Attempt = Callable[["torch.device", "torch.dtype"], "torch.Tensor"]
Emulations = Callable[[str, "torch.dtype"], "str | None"]


def _sample(device: torch.device, dtype: torch.dtype, *shape: int) -> Any:
    """Return small numbers that every dtype holds; made on the host, as a device may lack the conversion."""
    import torch

    n = 1
    for size in shape:
        n *= size
    values = torch.arange(n, dtype=torch.float32).remainder(3).reshape(shape)
    return values.to(dtype).to(device)


def _scaled_mm(device: torch.device, dtype: torch.dtype) -> Any:
    import torch

    one = torch.ones((), device=device)
    right = _sample(device, dtype, 32, 32).t()  # column-major, as the scaled product wants its second operand
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


def _attempts() -> Mapping[str, Attempt]:
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
        self._known: dict[tuple[str, torch.dtype], Support] = {}
        self._lock = threading.Lock()

    @staticmethod
    def operators() -> tuple[str, ...]:
        """Return the names that `query` knows."""
        return tuple(_attempts())

    def query(self, operator: str, dtype: torch.dtype) -> Support:
        """Tell whether the device computes `operator` in `dtype`.

        Raises:
            ConfigError: there is no such operator in the table.
        """
        key = (operator, dtype)
        with self._lock:
            if key not in self._known:
                self._known[key] = self._try(operator, dtype)
            return self._known[key]

    def _try(self, operator: str, dtype: torch.dtype) -> Support:
        import torch

        attempts = _attempts()
        if operator not in attempts:
            raise ConfigError(
                f"{self._device_id}: no operator {operator!r} in the support table",
                expected=", ".join(sorted(attempts)),
            )
        try:
            with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                result = attempts[operator](self._device, dtype)
                # The transfer waits for the device: an asynchronous refusal arrives here, not later.
                result.to("cpu")
        except Exception as error:  # noqa: BLE001  whatever the vendor raises is the answer
            lines = str(error).strip().splitlines()
            return Support("unsupported", f"{type(error).__name__}: {lines[0] if lines else 'no message'}")
        how = self._emulated(operator, dtype) if self._emulated else None
        if how is None:
            # torch's own fallback for plug-in devices announces itself, once for each operator.
            how = next((str(w.message) for w in caught if "fall back" in str(w.message).lower()), None)
        if how is not None:
            return Support("emulated", how)
        if result.device.type != self._device.type:
            return Support("emulated", f"the result came back on {result.device.type}")
        return Support("native", f"tried on {self._device} with torch {torch.__version__}")
