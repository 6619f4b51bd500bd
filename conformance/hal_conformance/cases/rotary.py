# SPDX-License-Identifier: Apache-2.0
"""Rotary embedding, forward and backward.

Legend: T tokens, H heads, d width of a head, R rotated channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hal.contract import Contract
from hal_conformance import inputs as make
from hal_conformance.case import F64, Array, Arrays, Params
from hal_conformance.cases.base import Base, backward, keeps_nonfinite, leaf, observed, shape
from hal_conformance.cases.kept_results import KeptResults
from hal_conformance.cases.sized import TokenCounts
from hal_conformance.cases.strided import Shifted, Sliced, Strided
from hal_conformance.cases.tails import Tails
from hal_conformance.cases.untrained import IN_SERVICE, Untrained
from hal_conformance.numerics.detectors import exact, judge, merge, structure
from hal_conformance.oracle.rotary import rotary
from hal_conformance.verdicts import Judgement

if TYPE_CHECKING:
    import torch

HEADS = {"tiny": (3, 24), "small": (5, 40), "full": (16, 128)}
"""H and d: odd numbers of heads, and widths that are no powers of two."""


@dataclass(frozen=True)
class Sizes:
    """Of one instance."""

    tokens: int
    heads: int
    width: int
    rotated: int


class Rotary(Base):
    """Queries or keys, rotated, and the gradient rotated back."""

    def sizes(self, p: Params) -> Sizes:
        """Return the sizes: all channels are rotated."""
        heads, width = HEADS[p.scale]
        return Sizes(shape(p).tokens, heads, width, width)

    def presets(self) -> tuple[str, ...]:
        """See `Case.presets`: only sizes depend on it."""
        return ("ling-lite",)

    def table(self, p: Params, tokens: int, rotated: int) -> dict[str, Array]:
        """Return cos and sin of random angles, made from the tangent of half of each: no host's cosine is needed."""
        tangent = make.words(p.seed, "rotary/tangent", tokens, rotated // 2) / 2.0**32
        signs = 1.0 - 2.0 * make.integers(p.seed, "rotary/signs", 0, 1, 2, tokens, rotated // 2)
        square = tangent * tangent
        cos, sin = (1.0 - square) / (1.0 + square), 2.0 * tangent / (1.0 + square)
        return {name: _both(sign * half) for name, sign, half in
                (("cos_TR", signs[0], cos), ("sin_TR", signs[1], sin))}  # fmt: skip

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`."""
        s = self.sizes(p)
        x = make.activations(p.seed, "rotary/x", s.tokens, s.heads * s.width).reshape(s.tokens, s.heads, s.width)
        dy = make.normal(p.seed, "rotary/dy", s.tokens, s.heads, s.width)
        table = self.table(p, s.tokens, s.rotated)
        return {"x_THd": make.store(x, p.dtype), **table, "dy_THd": make.store(dy, p.dtype)}

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """See `Case.run`."""
        x = leaf(tensors["x_THd"])
        y = ops.rotary(x, tensors["cos_TR"], tensors["sin_TR"])
        backward(y, tensors["dy_THd"])
        return observed({"y_THd": y, "dx_THd": x.grad})

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`: errors of different elements have nothing in common."""
        x, cos, sin = inputs["x_THd"], inputs["cos_TR"], inputs["sin_TR"]
        wrong = structure(outputs, {"y_THd": (x.shape, p.dtype), "dx_THd": (x.shape, p.dtype)})
        if wrong is not None:
            return wrong
        y, dx = rotary(x, cos, sin).stored(p.dtype), rotary(inputs["dy_THd"], cos, -sin).stored(p.dtype)
        return merge([judge("y", outputs["y_THd"], y, bias=True), judge("dx", outputs["dx_THd"], dx, bias=True)])


class QuarterTurns(Rotary):
    """Angles that are multiples of a right angle, on a part of the channels."""

    def sizes(self, p: Params) -> Sizes:
        """See `Rotary.sizes`."""
        heads, width = HEADS[p.scale]
        return Sizes(shape(p).tokens, heads, width, width // 4 * 2)

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`: every bit of the dtype is used, and one token is NaN."""
        s = self.sizes(p)
        turns = make.integers(p.seed, "rotary/turns", 0, 3, s.tokens, s.rotated // 2)
        x, dy = (make.full_bits(p.seed, f"rotary/{name}", s.tokens, s.heads, s.width) for name in ("bits", "dbits"))
        x[s.tokens // 2] = np.nan
        return {
            "x_THd": make.store(x, p.dtype),
            "cos_TR": _both(np.array([1.0, 0.0, -1.0, 0.0])[turns]),
            "sin_TR": _both(np.array([0.0, 1.0, 0.0, -1.0])[turns]),
            "dy_THd": make.store(dy, p.dtype),
        }

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`: nothing but data movement and signs."""
        x, cos, sin = inputs["x_THd"], inputs["cos_TR"], inputs["sin_TR"]
        wrong = structure(outputs, {"y_THd": (x.shape, p.dtype), "dx_THd": (x.shape, p.dtype)})
        if wrong is not None:
            return wrong
        y, dx = rotary(x, cos, sin).value, rotary(inputs["dy_THd"], cos, -sin).value
        return merge([exact("y", outputs["y_THd"], y), exact("dx", outputs["dx_THd"], dx)])


class Overflow(Rotary):
    """Results and gradients beyond float16."""

    def dtypes(self) -> tuple[str, ...]:
        """See `Case.dtypes`: where a loss is scaled, and the scale is found by what overflows."""
        return ("float16",)

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`: numbers from 30,000 to 65,000 of either sign, which a rotation carries beyond 65,504."""
        arrays = super().inputs(p)
        for name in ("x_THd", "dy_THd"):
            shape = arrays[name].shape
            size = 30000.0 + 35000.0 * make.words(p.seed, f"rotary/large/{name}", *shape) / 2.0**32
            sign = 1.0 - 2.0 * make.integers(p.seed, f"rotary/large/sign/{name}", 0, 1, *shape)
            arrays[name] = make.store(sign * size, p.dtype)
        return arrays

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`."""
        keeps_nonfinite(contract)
        return super().judge(inputs, outputs, p, contract)


class OneToken(Rotary):
    """One token."""

    def sizes(self, p: Params) -> Sizes:
        """See `Rotary.sizes`."""
        heads, width = HEADS[p.scale]
        return Sizes(1, heads, width, width)


class OneHead(Rotary):
    """One head."""

    def sizes(self, p: Params) -> Sizes:
        """See `Rotary.sizes`."""
        width = HEADS[p.scale][1]
        return Sizes(shape(p).tokens, 1, width, width)


class WideHeads(Rotary):
    """More heads than eight, wider than 128 channels, at every scale."""

    def sizes(self, p: Params) -> Sizes:
        """See `Rotary.sizes`."""
        return Sizes(5, 17, 136, 136)


class ManyPositions(Rotary):
    """Many tokens of three narrow heads, of which a half is rotated."""

    POSITIONS = {"tiny": 4129, "small": 32771, "full": 32771}  # noqa: RUF012  primes beyond 2^12 and 2^15

    def sizes(self, p: Params) -> Sizes:
        """See `Rotary.sizes`."""
        return Sizes(self.POSITIONS[p.scale], 3, 8, 4)


class NoTokens(Rotary):
    """Zero tokens."""

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`."""
        return {name: array[:0] for name, array in super().inputs(p).items()}


def _both(half: F64) -> Array:
    """Return a table whose halves are alike, in float32."""
    return make.store(np.concatenate((half, half), axis=1), "float32")


_NEEDS = ("rotary",)
RANDOM = Rotary(
    "rotary.random", "rotary", _NEEDS,
    "Activations with heavy tails, turned by random angles, and the gradient turned back. The float32 table is an "
    "input, so the bound is local: 2 u (|x1 cos| + |x2 sin|) and half an ulp of storage; a table that was rounded to "
    "16 bits, and products that were, are far outside. Bias of signed errors.",
)  # fmt: skip
ONE_TOKEN = OneToken("rotary.one_token", "rotary", _NEEDS, "As rotary.random with one token, as in decoding.")
CASES = (
    RANDOM,
    QuarterTurns(
        "rotary.quarter_turns", "rotary", _NEEDS,
        "Angles 0, 90, 180 and 270 degrees on the first half of the channels: results and gradients are inputs, moved "
        "and negated, bit by bit. The other pairing (2i with 2i+1), a wrong sign, forward or backward, and channels "
        "that should pass unchanged show; a token of NaN stays alone.",
    ),
    Overflow(
        "rotary.overflow", "rotary", _NEEDS,
        "As rotary.random in float16, with numbers that a rotation carries beyond it: infinite, not the largest one.",
    ),
    ONE_TOKEN,
    OneHead("rotary.one_head", "rotary", _NEEDS, "As rotary.random with one head, as latent attention's keys have."),
    ManyPositions(
        "rotary.many_positions", "rotary", _NEEDS,
        "As rotary.random with more than 4,096 positions (32,768 beyond tiny), three heads, and random angles on half "
        "of eight channels: a table of which rows are lost, and one that is rounded where a part is rotated, show.",
    ),
    WideHeads(
        "rotary.wide_heads", "rotary", _NEEDS, "As rotary.random with five tokens of seventeen heads of 136 channels."
    ),
    NoTokens("rotary.no_tokens", "rotary", _NEEDS, "Zero tokens."),
    Tails("rotary.tails", RANDOM),
    KeptResults("rotary.kept", RANDOM),
    Untrained("rotary.untrained", RANDOM, ("y_THd",)),
    Untrained("rotary.one_token_untrained", ONE_TOKEN, ("y_THd",), modes=IN_SERVICE),
    TokenCounts("rotary.token_counts", RANDOM),
    Strided("rotary.strided", RANDOM), Sliced("rotary.sliced", RANDOM), Shifted("rotary.shifted", RANDOM),
)  # fmt: skip
