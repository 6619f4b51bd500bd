# SPDX-License-Identifier: Apache-2.0
"""Another case with other sizes: tokens that tiles divide, or more than a block holds, and widths of odd numbers.

`base.shape` never gives a number of tokens that 32 divides, and gives at most 161 but at full scale; so a fast path for
whole tiles would not be run, and what is lost beyond 1,024 rows would not show. Its widths are multiples of 8.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hal.contract import Contract
from hal_conformance.case import Arrays, Footprint, Params
from hal_conformance.cases.base import At, Shape, observed, part, shape
from hal_conformance.cases.wrapped import Wrapped
from hal_conformance.numerics.detectors import joined
from hal_conformance.verdicts import Judgement

if TYPE_CHECKING:
    import torch

FEW_EXPERTS = ("mixtral-8x7b",)
"""Eight experts and two choices: many tokens of it are cheap."""


class Sized(Wrapped):
    """The case `inner` with sizes of its own."""

    def sizes(self, p: Params) -> Shape:
        """Return the sizes."""
        raise NotImplementedError

    def at(self, p: Params) -> At:
        """Return the instance with those sizes."""
        return At(p.preset, p.dtype, p.scale, p.seed, self.sizes(p))

    def footprint(self, p: Params) -> Footprint:
        """See `Case.footprint`."""
        return self.inner.footprint(self.at(p))

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`."""
        return self.inner.inputs(self.at(p))

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """See `Case.run`."""
        return self.inner.run(ops, tensors, self.at(p))

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`."""
        return self.inner.judge(inputs, outputs, self.at(p), contract)


class Aligned(Sized):
    """As many tokens as fill tiles of 64, or of 128, to the last row."""

    @property
    def what(self) -> str:
        """See `Case.what`."""
        return f"As {self.inner.name}, with 64 tokens (128 beyond tiny): whole tiles, no tail. {self.inner.what}"

    def sizes(self, p: Params) -> Shape:
        """See `Sized.sizes`."""
        s = shape(p)
        return Shape(64 if p.scale == "tiny" else 128, s.width, s.hidden)


class Long(Sized):
    """More tokens than a block of 1,024 or 2,048 threads has, with narrow rows."""

    @property
    def what(self) -> str:
        """See `Case.what`."""
        return f"As {self.inner.name}, with {self.TOKENS:,} narrow tokens at every scale. {self.inner.what}"

    TOKENS = 2100
    WIDTH = 64

    def sizes(self, p: Params) -> Shape:
        """See `Sized.sizes`."""
        return Shape(self.TOKENS, self.WIDTH, self.WIDTH)


class Many(Long):
    """More tokens than 16 bits count, in one dtype: CUDA's grids have at most 65,535 blocks along their second axis."""

    TOKENS = 65_792  # 257 times 256: whole blocks, one more than 16 bits count
    WIDTH = 8

    def dtypes(self) -> tuple[str, ...]:
        """See `Case.dtypes`."""
        return _one_of(super().dtypes())


def _one_of(dtypes: tuple[str, ...]) -> tuple[str, ...]:
    """Return one dtype for what does not depend on it: which rows there are."""
    return ("bfloat16",) if "bfloat16" in dtypes else dtypes[:1]


@dataclass(frozen=True)
class Wide(Sized):
    """Few rows that are longer than what a kernel's loops read in one pass, at every scale.

    The scaled widths fit into one tile of K at tiny, and into two at small: what is lost beyond shows here alone.

    Attributes:
        of: the sizes.
    """

    of: Shape = field(default=Shape(9, 1032, 24), kw_only=True)

    @property
    def what(self) -> str:
        """See `Case.what`."""
        long = "channels" if self.of.width >= self.of.hidden else "hidden units"
        return (
            f"As {self.inner.name}, with {self.of.tokens} tokens and {max(self.of.width, self.of.hidden):,} {long} at "
            f"every scale: many tiles of K and of N, and the last of them in part. {self.inner.what}"
        )

    def sizes(self, p: Params) -> Shape:
        """See `Sized.sizes`."""
        return self.of


@dataclass(frozen=True)
class Whole(Wide):
    """Sizes that every tile divides, as those of real models are: the scaled ones are multiples of 8."""

    of: Shape = field(default=Shape(128, 256, 128), kw_only=True)

    @property
    def what(self) -> str:
        """See `Case.what`."""
        return (
            f"As {self.inner.name}, with {self.of.tokens} tokens, {self.of.width:,} channels and {self.of.hidden} "
            f"hidden units at every scale: whole tiles of 128 and of 256, and nothing beside them. {self.inner.what}"
        )


class Unaligned(Sized):
    """Widths that are odd: rows begin nowhere in particular, and vector loads and tiles leave a part of each over."""

    @property
    def what(self) -> str:
        """See `Case.what`."""
        return (
            f"As {self.inner.name}, with odd widths, which the protocol admits: K and N are multiples of nothing. (An "
            f"implementation that raises `hal.errors.Unsupported` for them is UNSUPPORTED here.) {self.inner.what}"
        )

    def sizes(self, p: Params) -> Shape:
        """See `Sized.sizes`: three less than multiples of 8."""
        s = shape(p)
        return Shape(s.tokens, s.width - 3, s.hidden - 3)


class TokenCounts(Wrapped):
    """The case `inner`, for one preset in one dtype, with each of several numbers of narrow tokens in turn."""

    FIRST = 97
    WIDTH = 8

    @property
    def what(self) -> str:
        """See `Case.what`."""
        return (
            f"As {self.inner.name}, for {self.FIRST} to {self.FIRST + 15} narrow tokens (to {self.FIRST + 31} beyond "
            "tiny), one after the other: every rest that a tile of 16 (of 32) tokens may leave. A tail that is "
            f"lost for one of them is wrong here. {self.inner.what}"
        )

    def dtypes(self) -> tuple[str, ...]:
        """See `Case.dtypes`."""
        return _one_of(super().dtypes())

    def each(self, p: Params) -> dict[str, At]:
        """Return the instances by their label."""
        counts = range(self.FIRST, self.FIRST + (16 if p.scale == "tiny" else 32))
        return {
            f"{count} tokens": At(p.preset, p.dtype, p.scale, p.seed, Shape(count, self.WIDTH, self.WIDTH))
            for count in counts
        }

    def footprint(self, p: Params) -> Footprint:
        """See `Case.footprint`."""
        each = [super(TokenCounts, self).footprint(at) for at in self.each(p).values()]
        return Footprint(sum(one.inputs for one in each), sum(one.outputs for one in each))

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`."""
        return {
            f"{label}/{name}": array
            for label, at in self.each(p).items()
            for name, array in self.inner.inputs(at).items()
        }

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """See `Case.run`."""
        return {
            f"{label}/{name}": tensor
            for label, at in self.each(p).items()
            for name, tensor in observed(self.inner.run(ops, part(tensors, label), at)).items()
        }

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`."""
        return joined({
            label: self.inner.judge(part(inputs, label), part(outputs, label), at, contract)
            for label, at in self.each(p).items()
        })  # fmt: skip
