# SPDX-License-Identifier: Apache-2.0
"""Which tensors lie on the host, where the device's memory is the host's, too.

On a CPU that stands for CUDA a tensor does not show on which side it is. The rule: **a tensor is on the device,
unless it is known to be on the host**. Known are the results of `.cpu()` and of `.to("cpu")`, tensors that the program
made without naming a device, tensors from numpy, and views of all of these: what is remembered is the storage. Against
`FakeTensorMode`'s CUDA this is right for 26 of 30 idioms, and always errs to the same side: the result of an operator
on host tensors counts as on the device. docs/run.md lists where.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, final

if TYPE_CHECKING:
    import torch


@final
class HostTensors:
    """The storages that are known to be on the host.

    A storage is kept by address together with a weak reference of torch's own, which keeps its address from being used
    again until the entry is gone. Entries of storages that were freed are dropped each time their number has doubled.
    """

    def __init__(self) -> None:
        from torch.multiprocessing.reductions import StorageWeakRef

        self._weak: Any = StorageWeakRef
        self._known: dict[int, Any] = {}
        self._sweep_at = _FIRST_SWEEP

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        """Remember that a tensor's memory is on the host; return the tensor."""
        with contextlib.suppress(NotImplementedError, RuntimeError):
            # Sparse tensors have no storage of their own, and those of a compiler none at all.
            self.add_storage(tensor.untyped_storage())
        return tensor

    def add_storage(self, storage: torch.UntypedStorage) -> None:
        """Remember that a storage is on the host."""
        known = self._known
        if storage._cdata not in known:
            known[storage._cdata] = self._weak(storage)
            if len(known) >= self._sweep_at:
                self._sweep()

    def discard(self, tensor: torch.Tensor) -> None:
        """Remember that a tensor's memory is on the device from now on."""
        with contextlib.suppress(NotImplementedError, RuntimeError):
            self._known.pop(tensor.untyped_storage()._cdata, None)

    def __contains__(self, tensor: torch.Tensor) -> bool:
        if not self._known:
            return False
        try:
            return tensor.untyped_storage()._cdata in self._known
        except (NotImplementedError, RuntimeError):
            return False

    def __len__(self) -> int:
        return len(self._known)

    def _sweep(self) -> None:
        for address in [address for address, reference in list(self._known.items()) if reference.expired()]:
            self._known.pop(address, None)
        self._sweep_at = max(_FIRST_SWEEP, 2 * len(self._known))


_FIRST_SWEEP = 1024
