# SPDX-License-Identifier: Apache-2.0
"""Which tensors lie on the host, where the device's memory is the host's, too.

On a CPU that stands for CUDA a tensor does not show on which side it is. The rule: **a tensor is on the device,
unless it is known to be on the host**. Known are the results of `.cpu()` and of `.to("cpu")`, tensors that the program
made without naming a device, tensors from numpy, and views of all of these: what is remembered is the storage. Against
`FakeTensorMode`'s CUDA this is right for 26 of 30 idioms, and always errs to the same side: the result of an operator
on host tensors counts as on the device. docs/run.md lists where.

Also remembered is what is known to be on the device: what was made there by name or moved there. A move to the device
of anything else copies, for it may be on the host, and then CUDA would copy. What CUDA would not have copied costs
memory and time, but never changes what a program computes, unless it counts on the two being one.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, final

if TYPE_CHECKING:
    import torch


@final
class HostTensors:
    """The storages that are known to be on the host, and those that are known to be on the device.

    A storage is kept by address together with a weak reference of torch's own, which keeps its address from being used
    again until the entry is gone. Entries of storages that were freed are dropped each time their number has doubled.
    """

    def __init__(self) -> None:
        from torch.multiprocessing.reductions import StorageWeakRef

        self._weak: Any = StorageWeakRef
        self._known: dict[int, tuple[Any, bool]] = {}
        """By address: the reference, and whether the storage is on the host."""
        self._sweep_at = _FIRST_SWEEP

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        """Remember that a tensor's memory is on the host; return the tensor."""
        with contextlib.suppress(*_NO_STORAGE):
            self.add_storage(tensor.untyped_storage())
        return tensor

    def add_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """Remember that a tensor's memory is on the device; return the tensor."""
        with contextlib.suppress(*_NO_STORAGE):
            self.add_storage(tensor.untyped_storage(), False)
        return tensor

    def add_storage(self, storage: torch.UntypedStorage, host: bool = True) -> None:
        """Remember that a storage is on the host, or on the device."""
        known, address = self._known, storage._cdata
        entry = known.get(address)
        if entry is None:
            known[address] = (self._weak(storage), host)
            if len(known) >= self._sweep_at:
                self._sweep()
        elif entry[1] is not host:
            known[address] = (entry[0], host)

    def side(self, tensor: torch.Tensor) -> bool | None:
        """Return whether a tensor is on the host; None if nothing is known of it, which counts as on the device."""
        try:
            return self.side_of_storage(tensor.untyped_storage())
        except _NO_STORAGE:
            return None

    def side_of_storage(self, storage: torch.UntypedStorage) -> bool | None:
        """Return what `side` does, of a storage."""
        entry = self._known.get(storage._cdata)
        return None if entry is None else entry[1]

    def __contains__(self, tensor: torch.Tensor) -> bool:
        if not self._known:
            return False
        try:
            entry = self._known.get(tensor.untyped_storage()._cdata)
        except _NO_STORAGE:
            return False
        return entry is not None and entry[1]

    def __len__(self) -> int:
        return len(self._known)

    def _sweep(self) -> None:
        for address in [address for address, (reference, _) in list(self._known.items()) if reference.expired()]:
            self._known.pop(address, None)
        self._sweep_at = max(_FIRST_SWEEP, 2 * len(self._known))


_FIRST_SWEEP = 1024
_NO_STORAGE = (NotImplementedError, RuntimeError, ValueError)
"""What tensors without a storage raise when asked for it: sparse ones, a compiler's, parameters of lazy modules."""
