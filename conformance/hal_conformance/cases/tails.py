# SPDX-License-Identifier: Apache-2.0
"""Another case at numbers of tokens around whole tiles: one row that is left over, one that is lacking, and one tile.

`base.shape` and `sized` give whole tiles and some odd numbers, of 33 tokens or more. Kernels treat the last row of a
tile, and a tile of one row, by code of their own; and small batches by small tiles.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hal.contract import Contract
from hal_conformance.case import Arrays, Footprint, Params
from hal_conformance.cases.base import At, Shape, part, shape
from hal_conformance.cases.wrapped import Wrapped
from hal_conformance.numerics.detectors import joined
from hal_conformance.verdicts import Judgement

if TYPE_CHECKING:
    import torch

AROUND_TILES = {
    "tiny": (16, 17, 31, 65),
    "small": (16, 17, 31, 65, 127, 129),
    "full": (16, 17, 31, 65, 127, 129),
}
"""Tiles of 16, 32, 64 and 128; 31 also lacks one of two tiles of 16, and 65 is one more than four of them."""


class Tails(Wrapped):
    """The case `inner`, for the first of its presets, at each of these numbers of tokens."""

    @property
    def what(self) -> str:
        """See `Case.what`."""
        return (
            f"As {self.inner.name}, with 16, 17, 31 and 65 tokens (beyond tiny with 127 and 129, too): one small tile, "
            f"a row more than fills tiles, and one less. {self.inner.what}"
        )

    def at(self, p: Params) -> dict[str, Params]:
        """Return the instances, by number of tokens."""
        s = shape(p)
        return {
            str(tokens): At(p.preset, p.dtype, p.scale, p.seed, Shape(tokens, s.width, s.hidden))
            for tokens in AROUND_TILES[p.scale]
        }

    def footprint(self, p: Params) -> Footprint:
        """See `Case.footprint`."""
        each = [self.inner.footprint(at) for at in self.at(p).values()]
        return Footprint(sum(one.inputs for one in each), sum(one.outputs for one in each))

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`."""
        return {f"{n}/{name}": array for n, at in self.at(p).items() for name, array in self.inner.inputs(at).items()}

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """See `Case.run`."""
        found = {n: self.inner.run(ops, part(tensors, n), at) for n, at in self.at(p).items()}
        return {f"{n}/{name}": tensor for n, outputs in found.items() for name, tensor in outputs.items()}

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`."""
        return joined({
            f"{n} tokens": self.inner.judge(part(inputs, n), part(outputs, n), at, contract)
            for n, at in self.at(p).items()
        })  # fmt: skip
