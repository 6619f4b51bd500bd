# SPDX-License-Identifier: Apache-2.0
"""Another case with indices and counts of 32 bits, which the protocol admits: code that reads 64 is wrong here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hal_conformance.case import Params
from hal_conformance.cases.wrapped import Wrapped

if TYPE_CHECKING:
    import torch


class Int32(Wrapped):
    """The case `inner`, for one preset, with int32 for every int64 that goes in; what comes back is as ever."""

    @property
    def what(self) -> str:
        """See `Case.what`."""
        return f"As {self.inner.name}, with indices and counts in int32, which the protocol admits. {self.inner.what}"

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """See `Case.run`."""
        import torch

        narrow = {name: t.to(torch.int32) if t.dtype == torch.int64 else t for name, t in tensors.items()}
        return super().run(ops, narrow, p)
