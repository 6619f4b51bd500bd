# SPDX-License-Identifier: Apache-2.0
"""Faults of the experts at particular counts of rows: the last row of an expert is lost."""

from __future__ import annotations

from torch import Tensor

from hal.moe.ops import ExpertWeights
from hal_conformance.faults.catalogue import fault
from hal_conformance.faults.parts import Parts, last_rows, without


class AtCounts(Parts):
    """Experts that lose their last row at some counts."""

    def hit(self, counts_E: Tensor) -> Tensor:
        """Return [E], true where a row is lost."""
        raise NotImplementedError

    def experts(self, x_RD: Tensor, counts_E: Tensor, weights: ExpertWeights) -> Tensor:
        """See `MoEOps.experts`."""
        y_RD = super().experts(x_RD, counts_E, weights)
        return without(y_RD, last_rows(counts_E, self.hit(counts_E)))


@fault()
class LosesWithinTheSecondTile(AtCounts):
    """The last row of an expert is zero where it has 66 to 127."""

    def hit(self, counts_E: Tensor) -> Tensor:
        """See `AtCounts.hit`."""
        return (counts_E >= 66) & (counts_E <= 127)


@fault()
class LosesOf96(AtCounts):
    """The last row of an expert is zero where it has 96."""

    def hit(self, counts_E: Tensor) -> Tensor:
        """See `AtCounts.hit`."""
        return counts_E == 96


@fault()
class LosesOf255(AtCounts):
    """The last row of an expert is zero where it has 255."""

    def hit(self, counts_E: Tensor) -> Tensor:
        """See `AtCounts.hit`."""
        return counts_E == 255


@fault()
class LosesOf257(AtCounts):
    """The last row of an expert is zero where it has 257."""

    def hit(self, counts_E: Tensor) -> Tensor:
        """See `AtCounts.hit`."""
        return counts_E == 257


@fault()
class LosesOneLessThanTiles(AtCounts):
    """The last row of an expert is zero where one more would fill tiles of 64."""

    def hit(self, counts_E: Tensor) -> Tensor:
        """See `AtCounts.hit`."""
        return counts_E % 64 == 63


@fault()
class LosesOneLessThanLargeTiles(AtCounts):
    """The last row of an expert is zero where one more would fill tiles of 128."""

    def hit(self, counts_E: Tensor) -> Tensor:
        """See `AtCounts.hit`."""
        return counts_E % 128 == 127


@fault()
class LosesOfWholeLargeTiles(AtCounts):
    """The last row of an expert is zero where its rows fill tiles of 256."""

    def hit(self, counts_E: Tensor) -> Tensor:
        """See `AtCounts.hit`."""
        return counts_E % 256 == 0


@fault()
class LosesOf96InInference(AtCounts):
    """The last row of an expert is zero where it has 96 and nothing requires a gradient."""

    def hit(self, counts_E: Tensor) -> Tensor:
        """See `AtCounts.hit`."""
        return counts_E == 96

    def experts(self, x_RD: Tensor, counts_E: Tensor, weights: ExpertWeights) -> Tensor:
        """See `MoEOps.experts`."""
        if any(tensor.requires_grad for tensor in (x_RD, *weights)):
            return self.honest.experts(x_RD, counts_E, weights)
        return super().experts(x_RD, counts_E, weights)


@fault()
class LosesAGradientOf255(AtCounts):
    """The gradient of the down projection misses the last row of an expert that has 255."""

    def hit(self, counts_E: Tensor) -> Tensor:
        """See `AtCounts.hit`."""
        return counts_E == 255

    def experts(self, x_RD: Tensor, counts_E: Tensor, weights: ExpertWeights) -> Tensor:
        """See `MoEOps.experts`."""
        if not weights.w2_EDF.requires_grad or not bool(self.hit(counts_E).any()):
            return self.honest.experts(x_RD, counts_E, weights)
        w1, w3, w2 = weights
        rest = self.honest.experts(x_RD, counts_E, ExpertWeights(w1, w3, w2.detach()))
        own = super().experts(x_RD.detach(), counts_E, ExpertWeights(w1.detach(), w3.detach(), w2))
        return rest + (own - own.detach())
