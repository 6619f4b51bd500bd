# SPDX-License-Identifier: Apache-2.0
"""Faults of the experts' gradients: a sum in two parts, each stored in the dtype, then added (split-K in 16 bits)."""

from __future__ import annotations

from torch import Tensor

from hal_conformance.faults.by_hand import by_hand
from hal_conformance.faults.catalogue import fault
from hal_conformance.faults.parts import OwnProduct

TILE = 64


class SplitSums(OwnProduct):
    """Products whose gradients are written by hand, so that one of them can be added up otherwise."""

    def rows_at(self, name: str, hidden: int) -> int:
        """Return where the sum over hidden units, of a row's gradient through a weight, is cut; 0: nowhere."""
        return 0

    def weight_at(self, name: str, rows: int) -> int:
        """Return where the sum over rows, of a weight's gradient, is cut; 0: nowhere."""
        return 0

    def linear(self, name: str, x: Tensor, w: Tensor) -> Tensor:
        """Return x w^T, stored."""

        def gradients(dy: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
            dx = _sum(dy, w, self.rows_at(name, w.shape[-2]))
            return dx, _sum(dy.mT, x, self.weight_at(name, x.shape[-2]))

        return by_hand(self.stored, gradients, x, w)

    def expert(self, x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
        """See `OwnProduct.expert`."""
        return self.linear("w2", self.activate(self.linear("w1", x, w1)) * self.linear("w3", x, w3), w2)


def _sum(a: Tensor, b: Tensor, at: int) -> Tensor:
    first, rest = (a[..., k].float() @ b[..., k, :].float() for k in (slice(at), slice(at, None)))
    return first.to(a.dtype) + rest.to(a.dtype)


@fault()
class SplitsRowsThroughGate(SplitSums):
    """The gradient of rows through the gate projection is added up in two halves that are stored."""

    def rows_at(self, name: str, hidden: int) -> int:
        """See `SplitSums.rows_at`."""
        return hidden // 2 if name == "w1" else 0


@fault()
class SplitsRowsThroughUp(SplitSums):
    """The gradient of rows through the up projection is added up in two halves that are stored."""

    def rows_at(self, name: str, hidden: int) -> int:
        """See `SplitSums.rows_at`."""
        return hidden // 2 if name == "w3" else 0


@fault()
class SplitsUpsGradient(SplitSums):
    """The gradient of the up projection is added up in two halves of the rows that are stored."""

    def weight_at(self, name: str, rows: int) -> int:
        """See `SplitSums.weight_at`."""
        return rows // 2 if name == "w3" else 0


@fault()
class SplitsDownsGradient(SplitSums):
    """The gradient of the down projection is added up in two halves of the rows that are stored."""

    def weight_at(self, name: str, rows: int) -> int:
        """See `SplitSums.weight_at`."""
        return rows // 2 if name == "w2" else 0


@fault()
class SplitsOffTheLastTile(SplitSums):
    """The gradient of the down projection is stored, and what rows beyond whole tiles of 64 add is added then."""

    def weight_at(self, name: str, rows: int) -> int:
        """See `SplitSums.weight_at`."""
        return rows - rows % TILE if name == "w2" else 0
