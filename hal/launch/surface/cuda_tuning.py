# SPDX-License-Identifier: Apache-2.0
"""torch.cuda.tunable, which tries several forms of a matrix product and keeps the fastest, and cuFFT's cache of plans.

No other device has either. What a program sets it reads again, and every product runs in the device's one form.
"""

from __future__ import annotations

import operator
from typing import Any

from hal.launch.api import api, refused, value
from hal.launch.redirection import Redirection
from hal.launch.surface.cuda_device import cuda_index

_NOTE = "kept and given back; products run in the device's one form"
_WHY = "this device has one form of each product: there is nothing to tune"

# Setter, getter, and what CUDA's getter returns before anything is set.
_SETTINGS: tuple[tuple[str, str, Any], ...] = (
    ("enable", "is_enabled", False),
    ("tuning_enable", "tuning_is_enabled", True),
    ("record_untuned_enable", "record_untuned_is_enabled", False),
    ("set_max_tuning_duration", "get_max_tuning_duration", 30),
    ("set_max_tuning_iterations", "get_max_tuning_iterations", 100),
    ("set_rotating_buffer_size", "get_rotating_buffer_size", -1),
    ("set_filename", "get_filename", "tunableop_results.csv"),
)


def _enter(setter: str, getter: str, default: Any) -> None:
    # CUDA's setters name their argument in several ways, and some have a default.
    @api(f"torch.cuda.tunable.{setter}", verdict="emulated", note=_NOTE)
    def put(r: Redirection, *args: Any, **kwargs: Any) -> None:
        value = next(iter((*args, *kwargs.values())), True)
        r.kept[getter] = value
        if setter == "enable" and value:
            r.idle("torch.cuda.tunable.enable", _WHY)

    @api(f"torch.cuda.tunable.{getter}", verdict="emulated", note=_NOTE)
    def get(r: Redirection) -> Any:
        return r.kept.get(getter, default)


for _names in _SETTINGS:
    _enter(*_names)


@api("torch.cuda.tunable.get_results", "torch.cuda.tunable.get_validators", verdict="emulated", note=_NOTE)
def get_results(r: Redirection) -> tuple[Any, ...]:
    """Nothing was tuned."""
    return ()


@api("torch.cuda.tunable.read_file", verdict="emulated", note="reads nothing")
def read_file(r: Redirection, filename: str | None = None) -> bool:
    """False: no result in the file is of this device."""
    return False


@api("torch.cuda.tunable.set_numerical_check_tolerances", verdict="emulated", note="does nothing")
def set_numerical_check_tolerances(r: Redirection, enable: bool, atol: float = 1e-5, rtol: float = 1e-5) -> None:
    """There is no other form that could be checked."""


refused(
    "torch.cuda.tunable.tune_gemm_in_file", "torch.cuda.tunable.mgpu_tune_gemm_in_file",
    why=_WHY, hint="tune on the GPU that the file is for",
)  # fmt: skip


# cuFFT's cache -------------------------------------------------------------------------------------------------------


class PlanCache:
    """The plans of one device: there are none, and the largest number of them is kept."""

    def __init__(self, device_index: int) -> None:
        self.device_index = device_index
        self._most = 4096

    @property
    def size(self) -> int:
        """Plans in the cache."""
        return 0

    @size.setter
    def size(self, size: int) -> None:
        raise RuntimeError(
            ".size is a read-only property showing the number of plans currently in the cache. To change the cache "
            "capacity, set cufft_plan_cache.max_size."
        )

    @property
    def max_size(self) -> int:
        """What was set, or CUDA's own."""
        return self._most

    @max_size.setter
    def max_size(self, size: int) -> None:
        size = operator.index(size)
        if size < 0:
            raise RuntimeError(f"cuFFT planCache max size must be non-negative, but got {size}")
        self._most = size

    def clear(self) -> None:
        """Nothing is there."""


class PlanCaches:
    """The caches of all devices; itself that of the current one."""

    def __init__(self, redirection: Redirection) -> None:
        vars(self)["_redirection"] = redirection
        vars(self)["_caches"] = {}

    def __getitem__(self, device: Any) -> PlanCache:
        index = cuda_index(vars(self)["_redirection"], device)
        caches: dict[int, PlanCache] = vars(self)["_caches"]
        return caches.setdefault(index, PlanCache(index))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)  # asked of it as it is copied, when it has no devices yet
        return getattr(self[None], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self[None], name, value)


@value(
    "torch.backends.cuda.cufft_plan_cache", verdict="emulated", note="max_size is kept; there are no plans of cuFFT's"
)
def cufft_plan_cache(r: Redirection) -> PlanCaches:
    """See `PlanCaches`."""
    return PlanCaches(r)
