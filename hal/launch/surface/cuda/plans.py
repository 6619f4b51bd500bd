# SPDX-License-Identifier: Apache-2.0
"""cuFFT's cache of plans, which no other device has: what a program sets it reads again."""

from __future__ import annotations

import operator
from typing import Any

from hal.launch.api import value
from hal.launch.redirection import Redirection
from hal.launch.surface.cuda.device import cuda_index


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
