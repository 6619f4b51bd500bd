# SPDX-License-Identifier: Apache-2.0
"""Packed sequences: their own code tries a tensor to see which device it reaches, and would see the true one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hal.launch import api as state
from hal.launch.api import door
from hal.launch.patches import Patches
from hal.launch.redirection import Redirection

if TYPE_CHECKING:
    import torch

_NAME = "torch.nn.utils.rnn.PackedSequence"

door(f"{_NAME}.to", f"{_NAME}.cuda", f"{_NAME}.cpu", f"{_NAME}.is_cuda")


def install(redirection: Redirection, patches: Patches) -> None:
    """Replace the moves, and the answer to where a packed sequence is."""
    import torch.nn.utils.rnn as rnn

    packed: Any = rnn.PackedSequence
    true_to, true_cuda, true_cpu, true_is_cuda = packed.to, packed.cuda, packed.cpu, packed.is_cuda

    def moved(self: Any, move: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        data = move(self.data)
        if data is self.data:
            return self
        order = (None if index is None else move(index) for index in (self.sorted_indices, self.unsorted_indices))
        return type(self)(data, self.batch_sizes, *order)

    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        r = state.active()
        asked = args[0] if args else kwargs.get("device", kwargs.get("other"))
        host = None if r is None or r.hosts is None else _goes_to_host(r, asked)
        if r is None or r.hosts is None or host is None:
            return true_to(self, *args, **kwargs)
        if not host:
            r.audit.count_outside(f"{_NAME}.to", sys._getframe(1))
        hosts = r.hosts

        def move(tensor: torch.Tensor) -> torch.Tensor:
            made = tensor.to(*args, **kwargs) if tensor is self.data else tensor  # the order keeps its dtype
            return hosts.moved(tensor, made, host)

        return moved(self, move)

    def cuda(self: Any, *args: Any, **kwargs: Any) -> Any:
        r = state.active()
        if r is None:
            return true_cuda(self, *args, **kwargs)
        r.audit.count_outside(f"{_NAME}.cuda", sys._getframe(1))
        return moved(self, lambda tensor: tensor.cuda(*args, **kwargs))

    def cpu(self: Any, *args: Any, **kwargs: Any) -> Any:
        r = state.active()
        if r is None or r.hosts is None or args or kwargs:
            return true_cpu(self, *args, **kwargs)
        return moved(self, lambda tensor: tensor.cpu())

    def is_cuda(self: Any) -> bool:
        r = state.active()
        if r is None:
            return bool(true_is_cuda.fget(self))
        r.audit.count(f"{_NAME}.is_cuda", sys._getframe(1), belief=True)
        on_host = r.hosts is not None and self.data in r.hosts
        return not on_host and bool(r.present(self.data.device).type == "cuda")

    patches.set(packed, "to", to)
    patches.set(packed, "cuda", cuda)
    patches.set(packed, "cpu", cpu)
    patches.set(packed, "is_cuda", property(is_cuda))


def _goes_to_host(r: Redirection, asked: Any) -> bool | None:
    """Return whether what a tensor is moved to, the first argument of `to`, is on the host; None if that moves none."""
    import torch

    if isinstance(asked, torch.Tensor):
        return r.hosts is not None and asked in r.hosts
    if r.is_host(asked):
        return True
    return False if asked is not None and r.index(asked) is not None else None
