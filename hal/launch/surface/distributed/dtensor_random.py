# SPDX-License-Identifier: Apache-2.0
"""Random operators on distributed tensors: each shard has numbers of its own, as on CUDA, and replicas have the same.

torch does so by the offset of CUDA's counter-based generator, and on a CPU not at all: shards would be alike, without a
word but a warning. A CPU's generator has no offset. Here each operator draws one number from it, the same in every
process, and the shard's own numbers come from a seed made of that number and the shard's index.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from hal.launch.awaited import when_loaded
from hal.launch.patches import Patches
from hal.launch.redirection import Redirection

_MODULE, _DISPATCH = "torch.distributed.tensor._random", "torch.distributed.tensor._dispatch"


def install(redirection: Redirection, patches: Patches) -> None:
    """Put the tracker in place, once somebody loads what asks for it."""
    if redirection.hosts is not None:
        when_loaded(_MODULE, "OffsetBasedRNGTracker", lambda owner: _track(patches, owner))
        when_loaded(
            "torch.distributed.tensor._dispatch", "is_rng_supported_mesh", lambda known: _support(patches, known)
        )


def _track(patches: Patches, owner: Any) -> None:
    module = sys.modules[_MODULE]
    tracker = _tracker(owner.__mro__[1])
    patches.set(module, "OffsetBasedRNGTracker", tracker)
    patches.set(module, "is_rng_supported_mesh", _supported(vars(module)["is_rng_supported_mesh"]))
    # One that is there keeps torch from asking whether the mesh has generators like CUDA's.
    patches.set(module, "_rng_tracker", tracker())


def _support(patches: Patches, known: Any) -> None:
    patches.set(sys.modules[_DISPATCH], "is_rng_supported_mesh", _supported(known))


def _supported(original: Any) -> Any:
    def is_rng_supported_mesh(device_mesh: Any) -> bool:
        return device_mesh._device_type == "cpu" or bool(original(device_mesh))

    return is_rng_supported_mesh


def _tracker(base: Any) -> Any:
    import torch

    class HostRNGTracker(base):  # type: ignore[misc]  # torch's, known when it is loaded
        """See the module."""

        def __init__(self, device_mesh: Any = None, run_state_sync: bool = True) -> None:
            # Not the base's: it wants a device that has such generators.
            self._device = torch.device("cpu")
            self._device_handle = torch.cpu
            self._use_distribute_region = True
            self._alike = not run_state_sync

        @contextlib.contextmanager
        def _distribute_region(self, spec: Any, generator: torch.Generator | None = None) -> Iterator[None]:
            tracing = vars(sys.modules[_DISPATCH])["_are_we_tracing"]
            if tracing() or not self.distribute_region_enabled:
                yield
                return
            default = torch.default_generator
            source = default if generator is None else generator
            if not self._alike and generator is None:
                # As torch does on CUDA, at the first such operator: all processes go on from the first one's state.
                state = default.get_state()
                torch.distributed.broadcast(state, 0)
                default.set_state(state)
                self._alike = True
            drawn = int(torch.randint(2**62, (), generator=source))
            before = default.get_state()
            default.manual_seed(drawn + _shard(spec))
            try:
                yield
            finally:
                default.set_state(before)

    return HostRNGTracker


def _shard(spec: Any) -> int:
    """Return the index of this process's shard; replicas have one."""
    index = 0
    for size, at, placement in zip(spec.mesh.shape, spec.mesh.get_coordinate(), spec.placements, strict=True):
        if hasattr(placement, "split_factor") or placement.is_shard():  # a strided shard does not call itself one
            index = index * size + at
    return index
