# SPDX-License-Identifier: Apache-2.0
"""Another case, on tensors that are views of others: code that reads storage in the order of memory is wrong here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hal_conformance.case import Footprint, Params
from hal_conformance.cases.wrapped import Wrapped

if TYPE_CHECKING:
    import torch


class Strided(Wrapped):
    """The case `inner`, for one preset, with every matrix (inputs and upstream gradients) stored by columns.

    Vectors are every second element of another, the others being NaN, or zero.
    """

    @property
    def what(self) -> str:
        """See `Case.what`."""
        return (
            f"As {self.inner.name}, with every matrix stored by columns, and every vector every second element of "
            f"another. {self.inner.what}"
        )

    def footprint(self, p: Params) -> Footprint:
        """See `Case.footprint`."""
        inner = super().footprint(p)
        return Footprint(2 * inner.inputs, inner.outputs)

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """See `Case.run`."""
        how = {0: lambda tensor: tensor, 1: self.spread}
        return super().run(ops, {name: how.get(t.dim(), self.view)(t) for name, t in tensors.items()}, p)

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the same matrix, laid out otherwise."""
        return tensor.mT.contiguous().mT

    def spread(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the same vector, laid out otherwise."""
        around = float("nan") if tensor.is_floating_point() else 0
        return tensor.new_full((2 * len(tensor),), around)[::2].copy_(tensor)


class Shifted(Strided):
    """The case `inner`, for one preset, with every tensor dense and one element behind where its storage begins."""

    @property
    def what(self) -> str:
        """See `Case.what`."""
        return (
            f"As {self.inner.name}, with every tensor dense and one element behind where its storage begins, as a part "
            "of a flat buffer is: no vector load of several elements is aligned. "
            f"{self.inner.what}"
        )

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """See `Strided.view`: what lies before and behind is NaN, or zero."""
        around = float("nan") if tensor.is_floating_point() else 0
        return tensor.new_full((tensor.numel() + 8,), around)[1 : 1 + tensor.numel()].view(tensor.shape).copy_(tensor)

    def spread(self, tensor: torch.Tensor) -> torch.Tensor:
        """See `Strided.spread`."""
        return self.view(tensor)


class Sliced(Strided):
    """The case `inner`, for one preset, with every matrix lying inside a larger one of NaN."""

    MARGIN = 8
    """Columns on either side: 16 bytes or more, so that rows stay where vector loads want them."""

    @property
    def what(self) -> str:
        """See `Case.what`."""
        return (
            f"As {self.inner.name}, with every matrix a part of a larger one: rows do not follow one another, the "
            f"first is not where the storage begins, and what lies around is NaN. {self.inner.what}"
        )

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """See `Strided.view`."""
        *lead, rows, columns = tensor.shape
        around = float("nan") if tensor.is_floating_point() else 0
        whole = tensor.new_full((*lead, rows + 2, columns + 2 * self.MARGIN), around)
        part = whole[..., 1:-1, self.MARGIN : self.MARGIN + columns]
        return part.copy_(tensor)

    def spread(self, tensor: torch.Tensor) -> torch.Tensor:
        """See `Strided.spread`: as it is."""
        return tensor
