# SPDX-License-Identifier: Apache-2.0
"""Products of matrices whose inner length is filled up with zeros to a multiple of 32: without the fault of `known`.

The same library multiplies as before, so that nothing else changes, and nobody can tell but by the fault.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

LENGTH = 32

_aten = torch.ops.aten
_FIRST: Mapping[Any, int] = {
    _aten.mm: 0, _aten.bmm: 0, _aten.addmm: 1, _aten.addmm_: 1, _aten.baddbmm: 1, _aten.baddbmm_: 1,
    **({_aten._grouped_mm: 0} if hasattr(_aten, "_grouped_mm") else {}),
}  # fmt: skip
"""Operators, and the place of the first of their two operands."""


def filled(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a [..., M, K] and b [..., K, N] with zeros behind K."""
    missing = -a.shape[-1] % LENGTH
    if not missing:
        return a, b
    pad = torch.nn.functional.pad
    return pad(a, (0, missing)), pad(b, (0, 0, 0, missing))


class Padded(TorchDispatchMode):
    """The products of this thread, forward and backward, while it is on."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Compute an operator; see `torch.utils._python_dispatch`."""
        first = _FIRST.get(func.overloadpacket)
        if first is None or not all(x.dtype == torch.bfloat16 for x in args[first : first + 2]):
            return func(*args, **(kwargs or {}))
        a, b = args[first : first + 2]
        if func.overloadpacket is getattr(_aten, "_grouped_mm", None) and a.ndim == b.ndim == 2:
            return _of_groups(a, b, *args[2:], **(kwargs or {}))
        return func(*args[:first], *filled(a, b), *args[first + 2 :], **(kwargs or {}))


def _of_groups(
    a: torch.Tensor, b: torch.Tensor, offs: torch.Tensor, bias: None = None, out_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Return a grouped product whose groups are slices of K: each has an inner length of its own."""
    ends = [0, *offs.tolist()]
    parts = [torch.mm(*filled(a[:, i:j], b[i:j])) for i, j in itertools.pairwise(ends)]
    return torch.stack(parts).to(out_dtype or a.dtype)
