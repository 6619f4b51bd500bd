# SPDX-License-Identifier: Apache-2.0
"""Faults of the experts: a row, a count, one expert, one weight."""

from __future__ import annotations

import torch
from torch import Tensor

from hal.moe.ops import ExpertWeights
from hal_conformance.faults.catalogue import fault
from hal_conformance.faults.parts import Alone, Parts, last_rows, without


class AfterExperts(Parts):
    """Experts whose result is changed."""

    def change(self, y_RD: Tensor, counts_E: Tensor) -> Tensor:
        """Return the changed result."""
        raise NotImplementedError

    def experts(self, x_RD: Tensor, counts_E: Tensor, weights: ExpertWeights) -> Tensor:
        """See `MoEOps.experts`."""
        y_RD = super().experts(x_RD, counts_E, weights)
        return self.change(y_RD, counts_E) if len(y_RD) else y_RD


@fault()
class DropsAToken(AfterExperts):
    """The last row of the busiest expert is lost."""

    def change(self, y_RD: Tensor, counts_E: Tensor) -> Tensor:
        """See `AfterExperts.change`."""
        return without(y_RD, last_rows(counts_E, counts_E == counts_E.max())[:1])


@fault()
class SwapsTwoRows(AfterExperts):
    """Two neighbouring rows of the output change places."""

    def change(self, y_RD: Tensor, counts_E: Tensor) -> Tensor:
        """See `AfterExperts.change`."""
        order = torch.arange(len(y_RD), device=y_RD.device)
        order[:2] = order[:2].flip(0)
        return y_RD[order]


@fault("ROCm/aiter#3933")
class LosesResidue1(AfterExperts):
    """The last row of an expert is zero where its count is 1 modulo 16."""

    def change(self, y_RD: Tensor, counts_E: Tensor) -> Tensor:
        """See `AfterExperts.change`."""
        return without(y_RD, last_rows(counts_E, counts_E % 16 == 1))


@fault("ROCm/aiter#3933")
class LosesResidue13(AfterExperts):
    """The last row of an expert is zero where its count is 13 modulo 16."""

    def change(self, y_RD: Tensor, counts_E: Tensor) -> Tensor:
        """See `AfterExperts.change`."""
        return without(y_RD, last_rows(counts_E, counts_E % 16 == 13))


@fault()
class LosesBeyond64(AfterExperts):
    """The last row of an expert with more than 64 rows is zero."""

    def change(self, y_RD: Tensor, counts_E: Tensor) -> Tensor:
        """See `AfterExperts.change`."""
        return without(y_RD, last_rows(counts_E, counts_E > 64))


@fault()
class LosesBeyond256(AfterExperts):
    """The last row of an expert with more than 256 rows is zero."""

    def change(self, y_RD: Tensor, counts_E: Tensor) -> Tensor:
        """See `AfterExperts.change`."""
        return without(y_RD, last_rows(counts_E, counts_E > 256))


@fault()
class LosesBeyond512(AfterExperts):
    """The last row of an expert with more than 512 rows is zero."""

    def change(self, y_RD: Tensor, counts_E: Tensor) -> Tensor:
        """See `AfterExperts.change`."""
        return without(y_RD, last_rows(counts_E, counts_E > 512))


@fault()
class LosesFullTilesOf32(AfterExperts):
    """The last row of an expert with exactly 32 rows is zero."""

    def change(self, y_RD: Tensor, counts_E: Tensor) -> Tensor:
        """See `AfterExperts.change`."""
        return without(y_RD, last_rows(counts_E, counts_E == 32))


@fault()
class LosesFullTilesOf64(AfterExperts):
    """The last row of an expert is zero where its count is a multiple of 64, but not of 128."""

    def change(self, y_RD: Tensor, counts_E: Tensor) -> Tensor:
        """See `AfterExperts.change`."""
        return without(y_RD, last_rows(counts_E, counts_E % 128 == 64))


@fault()
class LosesFullTilesOf128(AfterExperts):
    """The last row of an expert is zero where its count is a multiple of 128."""

    def change(self, y_RD: Tensor, counts_E: Tensor) -> Tensor:
        """See `AfterExperts.change`."""
        return without(y_RD, last_rows(counts_E, counts_E % 128 == 0))


@fault()
class LosesAllOfOneExpert(AfterExperts):
    """The result is zero where one expert of several has every row."""

    def change(self, y_RD: Tensor, counts_E: Tensor) -> Tensor:
        """See `AfterExperts.change`."""
        return y_RD * 0 if 1 < int(counts_E.max()) == len(y_RD) and len(counts_E) > 1 else y_RD


@fault()
class LosesALonelyRow(AfterExperts):
    """The result is zero where there is a single row."""

    def change(self, y_RD: Tensor, counts_E: Tensor) -> Tensor:
        """See `AfterExperts.change`."""
        return y_RD * 0 if len(y_RD) == 1 else y_RD


@fault()
class OneExpertOff(AfterExperts):
    """The last expert's output is 1 % too large."""

    def change(self, y_RD: Tensor, counts_E: Tensor) -> Tensor:
        """See `AfterExperts.change`."""
        own = torch.arange(len(y_RD), device=y_RD.device) >= int(counts_E[:-1].sum())
        return torch.where(own[:, None], y_RD * 1.01, y_RD)


@fault("ROCm/aiter#4032")
class NanOfOneRow(AfterExperts):
    """An expert with a single row returns NaN."""

    def change(self, y_RD: Tensor, counts_E: Tensor) -> Tensor:
        """See `AfterExperts.change`."""
        y_RD = y_RD.clone()
        y_RD[last_rows(counts_E, counts_E == 1)] = torch.nan
        return y_RD


@fault("vllm PR#7210")
class DoublesOneExpert(Parts):
    """One expert's down projection is doubled, as FNUZ weights read as OCP are."""

    def experts(self, x_RD: Tensor, counts_E: Tensor, weights: ExpertWeights) -> Tensor:
        """See `MoEOps.experts`."""
        w2 = weights.w2_EDF
        factor = torch.ones(len(w2), 1, 1, dtype=w2.dtype, device=w2.device)
        factor[len(w2) // 2] = 2
        return super().experts(x_RD, counts_E, weights._replace(w2_EDF=w2 * factor))


@fault("ROCm/aiter#5413")
class WidthOf64(AfterExperts):
    """The result is zero where the width is no multiple of 64."""

    def change(self, y_RD: Tensor, counts_E: Tensor) -> Tensor:
        """See `AfterExperts.change`."""
        return y_RD * 0 if y_RD.shape[1] % 64 else y_RD


@fault()
class AlignedWidth(AfterExperts):
    """The result is zero where the width is a multiple of 128."""

    def change(self, y_RD: Tensor, counts_E: Tensor) -> Tensor:
        """See `AfterExperts.change`."""
        return y_RD if y_RD.shape[1] % 128 else y_RD * 0


@fault("pytorch#172440")
class ReadsStorage(Parts):
    """Matrices that do not lie in the order of memory give zero."""

    def experts(self, x_RD: Tensor, counts_E: Tensor, weights: ExpertWeights) -> Tensor:
        """See `MoEOps.experts`."""
        y_RD = super().experts(x_RD, counts_E, weights)
        return y_RD if all(w.is_contiguous() for w in weights) else y_RD * 0


@fault("TransformerEngine PR#3037")
class FailsWithoutRows(Parts):
    """A launch without rows is refused."""

    def experts(self, x_RD: Tensor, counts_E: Tensor, weights: ExpertWeights) -> Tensor:
        """See `MoEOps.experts`."""
        if not len(x_RD):
            raise RuntimeError("invalid configuration argument")
        return super().experts(x_RD, counts_E, weights)


@fault()
class SwapsProjections(Parts):
    """The gate and the up projection of the first expert change places."""

    def experts(self, x_RD: Tensor, counts_E: Tensor, weights: ExpertWeights) -> Tensor:
        """See `MoEOps.experts`."""
        w1, w3, w2 = weights
        swapped = ExpertWeights(torch.cat([w3[:1], w1[1:]]), torch.cat([w1[:1], w3[1:]]), w2)
        return super().experts(x_RD, counts_E, swapped)


class FlipsABit(Parts):
    """The lowest bit of one matrix of the busiest expert is flipped."""

    matrix = "w1_EFD"

    def experts(self, x_RD: Tensor, counts_E: Tensor, weights: ExpertWeights) -> Tensor:
        """See `MoEOps.experts`."""
        w = getattr(weights, self.matrix)
        flipped = w.detach().clone()
        bits = flipped.view(torch.int32 if w.dtype == torch.float32 else torch.int16)
        bits[int(counts_E.argmax())] ^= 1
        return super().experts(x_RD, counts_E, weights._replace(**{self.matrix: w + (flipped - w.detach())}))


@fault()
class FlipsABitOfW1(FlipsABit):
    """The lowest bit of one expert's gate projection is flipped."""


@fault()
class FlipsABitOfW3(FlipsABit):
    """The lowest bit of one expert's up projection is flipped."""

    matrix = "w3_EFD"


@fault()
class FlipsABitOfW2(FlipsABit):
    """The lowest bit of one expert's down projection is flipped."""

    matrix = "w2_EDF"


@fault()
class WritesItsWeights(Parts):
    """The down projection is cleared after it was used in training."""

    def experts(self, x_RD: Tensor, counts_E: Tensor, weights: ExpertWeights) -> Tensor:
        """See `MoEOps.experts`."""
        if not x_RD.requires_grad:
            return super().experts(x_RD, counts_E, weights)
        y_RD = super().experts(x_RD, counts_E, ExpertWeights(*(w.clone() for w in weights)))
        weights.w2_EDF.data.zero_()
        return y_RD


@fault()
class LosesBeforeAnEmptyLast(AfterExperts):
    """Where the last expert has no row, the last row of all is zero."""

    def change(self, y_RD: Tensor, counts_E: Tensor) -> Tensor:
        """See `AfterExperts.change`."""
        return without(y_RD, torch.tensor([len(y_RD) - 1], device=y_RD.device)) if int(counts_E[-1]) == 0 else y_RD


@fault()
class GivesAnEmptyFirstARow(Alone):
    """Where the first expert has no row, it takes the first one of the second."""

    def experts(self, x_RD: Tensor, counts_E: Tensor, weights: ExpertWeights) -> Tensor:
        """See `MoEOps.experts`."""
        taken = int(len(counts_E) > 1 and counts_E[0] == 0 and counts_E[1] > 0)
        moved = torch.zeros_like(counts_E)
        moved[:2] = torch.tensor([taken, -taken])[: len(counts_E)]
        return super().experts(x_RD, counts_E + moved, weights)
