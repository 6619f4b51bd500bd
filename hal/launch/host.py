# SPDX-License-Identifier: Apache-2.0
"""Which tensors lie on the host, where the device's memory is the host's, too.

On a CPU that stands for CUDA a tensor does not show on which side it is. The rule: **a tensor is on the device,
unless it is known to be on the host**. Known are the results of `.cpu()` and of `.to("cpu")`, tensors that the program
made without naming a device, tensors from numpy, and views of all of these: what is marked is the storage. Against
`FakeTensorMode`'s CUDA this is right for 26 of 30 idioms, and always errs to the same side: the result of an operator
on host tensors counts as on the device. docs/run.md lists where.

Also marked is what is known to be on the device: what was made there by name or moved there. A move to the device
of anything else copies, for it may be on the host, and then CUDA would copy. What CUDA would not have copied costs
memory and time, but never changes what a program computes, unless it counts on the two being one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, final

if TYPE_CHECKING:
    import torch


@final
class HostTensors:
    """The storages that are known to be on the host, and those that are known to be on the device.

    A storage carries its side as an attribute, which torch keeps as long as the memory, whatever tensors share it.
    """

    def __init__(self) -> None:
        import torch

        self._tensor, base = torch.Tensor, torch._C.TensorBase
        self._device_of, self._to, self._records = base.device.__get__, base.to, torch.is_grad_enabled
        self._traced_by = torch._C._get_tracing_state
        self._on_host, self._on_device = object(), object()
        """The two marks; those of another adoption are others, so that nothing is known any more of what it knew."""

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        """Remember that a tensor's memory is on the host; return the tensor."""
        return self._mark(tensor, self._on_host)

    def add_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """Remember that a tensor's memory is on the device; return the tensor."""
        return self._mark(tensor, self._on_device)

    def _mark(self, tensor: torch.Tensor, side: object) -> torch.Tensor:
        if isinstance(tensor, self._tensor):  # and not what stands for one while torch.fx traces
            try:  # noqa: SIM105  contextlib takes as long again
                tensor.untyped_storage()._hal_side = side  # type: ignore[attr-defined]
            except _NO_STORAGE:
                pass
        return tensor

    def moved(self, source: torch.Tensor, result: torch.Tensor, host: bool) -> torch.Tensor:
        """Copy what torch has not, if a tensor crosses between host and device, and remember where it is now.

        CUDA copies what crosses. Whether a tensor does is not known where nothing is known of it: that is copied, too.
        A leaf of autograd is not, since a copy of it is no leaf, and an optimizer that is given one raises. Nor is what
        `torch.jit.trace` traces: what is known differs between its runs, whose graphs it compares.

        Args:
            source: the tensor that is moved.
            result: what torch made of it: often the same one, or another dtype.
            host: whether it is moved to the host.
        """
        if self._device_of(result).type != "cpu":
            return result
        if result is source:
            known = self.side(source)
            if known is host:
                return result
            leaf = known is None and not host and source.requires_grad and source.is_leaf and self._records()
            if not leaf and self._traced_by() is None:
                result = self._to(source, source.dtype, copy=True)
        return self._mark(result, self._on_host if host else self._on_device)

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a copy on the host that counts as pinned; the tensor itself if it does already.

        Nothing is locked: the device works on the host's memory. But the program may write into the source, as one
        does that reads into the same array again and again.

        Raises:
            RuntimeError: the tensor is on the device; in CUDA's words.
        """
        if self.side(tensor) is False:
            kind = tensor.type().replace("torch.", "torch.cuda.", 1)
            raise RuntimeError(f"cannot pin '{kind}' only dense CPU tensors can be pinned")
        if self.is_pinned(tensor):
            return tensor
        return self.add_pinned(tensor.clone())

    def add_pinned(self, tensor: torch.Tensor) -> torch.Tensor:
        """Remember that a tensor's memory is on the host, and pinned; return the tensor."""
        try:  # noqa: SIM105  contextlib takes as long again
            tensor.untyped_storage()._hal_pinned = True  # type: ignore[attr-defined]
        except _NO_STORAGE:
            pass
        return self.add(tensor)

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        """Return whether a tensor's memory counts as pinned."""
        try:
            return getattr(tensor.untyped_storage(), "_hal_pinned", False)
        except _NO_STORAGE:
            return False

    def add_storage(self, storage: torch.UntypedStorage, host: bool = True) -> None:
        """Remember that a storage is on the host, or on the device."""
        storage._hal_side = self._on_host if host else self._on_device  # type: ignore[attr-defined]

    def side(self, tensor: torch.Tensor) -> bool | None:
        """Return whether a tensor is on the host; None if nothing is known of it, which counts as on the device."""
        if not isinstance(tensor, self._tensor):
            return None
        try:
            return self.side_of_storage(tensor.untyped_storage())
        except _NO_STORAGE:
            return None

    def side_of_storage(self, storage: torch.UntypedStorage) -> bool | None:
        """Return what `side` does, of a storage."""
        mark = getattr(storage, "_hal_side", None)
        return True if mark is self._on_host else False if mark is self._on_device else None

    def __contains__(self, tensor: torch.Tensor) -> bool:
        if not isinstance(tensor, self._tensor):
            return False
        try:
            return getattr(tensor.untyped_storage(), "_hal_side", None) is self._on_host
        except _NO_STORAGE:
            return False


_NO_STORAGE = (NotImplementedError, RuntimeError, ValueError)
"""What tensors without a storage raise when asked for it: sparse ones, a compiler's, parameters of lazy modules."""
