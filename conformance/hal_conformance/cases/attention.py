# SPDX-License-Identifier: Apache-2.0
"""Attention: grouped heads, causal masks, prefixes, multi-head latent; forward and backward.

Legend: T queries, S keys, H query heads, G key heads, d width of a head, e width of a value, R rotated channels, L
width of the latent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from hal.contract import Contract
from hal_conformance import inputs as make
from hal_conformance.case import DTYPES, Arrays, Footprint, Params, arithmetic
from hal_conformance.cases.base import Base, backward, keeps_nonfinite, leaf, observed, shape, wide
from hal_conformance.cases.frozen import Frozen
from hal_conformance.cases.kept_results import KeptResults
from hal_conformance.cases.sized import TokenCounts
from hal_conformance.cases.strided import Shifted, Sliced, Strided
from hal_conformance.cases.tails import Tails
from hal_conformance.cases.untrained import IN_SERVICE, Untrained
from hal_conformance.numerics.chained import Chained
from hal_conformance.numerics.detectors import Finding, exact, judge, merge, structure
from hal_conformance.oracle.attention import LATENT, attention, attention_backward, latent_attention, latent_backward
from hal_conformance.verdicts import Judgement

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Sizes:
    """Of one instance."""

    queries: int
    keys: int
    heads: int
    groups: int
    width: int


_WIDTHS = {"tiny": 16, "small": 40, "full": 128}
_FULL_HEADS = 4


@dataclass(frozen=True)
class Attention(Base):
    """Result and gradients.

    Attributes:
        causal: whether a query sees only what is not after it.
        before: how many more keys than queries there are; with a mask, all before the first query.
        share: query heads of each key head.
        width: of a head; None: by scale.
        queries: how many; None: by scale.
        heads: of queries; None: as many as two key heads have, and at least four.
        storage: dtypes; fewer where they cost time and sizes are what is asked about.
    """

    causal: bool = True
    before: int = 0
    share: int = 2
    width: int | None = None
    queries: int | None = None
    heads: int | None = None
    storage: tuple[str, ...] = DTYPES

    def presets(self) -> tuple[str, ...]:
        """See `Case.presets`: only sizes depend on it."""
        return ("ling-lite",)

    def dtypes(self) -> tuple[str, ...]:
        """See `Case.dtypes`."""
        return self.storage

    def sizes(self, p: Params) -> Sizes:
        """Return the sizes."""
        heads, queries = self.heads or 2 * max(2, self.share), self.queries or shape(p).tokens
        return Sizes(queries, queries + self.before, heads, heads // self.share, self.width or _WIDTHS[p.scale])

    def footprint(self, p: Params) -> Footprint:
        """See `Case.footprint`: of the variances of one head, which are float64 and about 20."""
        s = self.sizes(p)
        return Footprint(20 * 8 * s.queries * s.keys // 3, 0)

    def scale(self, p: Params) -> float:
        """Return the factor of the logits, in float32: 1 / sqrt(d), or near it where that has few bits."""
        scales = {
            16: 0.2509999871253967, 40: 0.15811388194561005, 64: 0.12549999356269836, 128: 0.0883883461356163,
            192: 0.07216878235340118, 256: 0.06279999762773514,
        }  # fmt: skip
        return scales[self.width or _WIDTHS[p.scale]]

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`: the first key is a sink, an outlier channel is in every key, one query has huge logits.

        The sink's logits are near 8 whatever the width, and its probability near 0.97: nearer to 1, the other keys
        would hardly be seen, and their gradients would be zero in float16.
        """
        s, name = self.sizes(p), f"attention/{self.share}/{self.before}"
        common = make.normal(p.seed, f"{name}/common", s.groups, s.width)
        q = make.normal(p.seed, f"{name}/q", s.queries, s.heads, s.width)
        q += np.repeat(common, s.heads // s.groups, axis=0)
        k = make.normal(p.seed, f"{name}/k", s.keys, s.groups, s.width)
        k[0] = common * (8.0 / np.sqrt(s.width))
        k[:, :, 3] += 8.0
        q[s.queries // 3] *= 16.0
        u = (make.words(p.seed, f"{name}/tail", s.keys, s.groups, s.width) + 2**26) / 2.0**32
        v = make.normal(p.seed, f"{name}/v", s.keys, s.groups, s.width) / np.sqrt(u)
        dy = make.normal(p.seed, f"{name}/dy", s.queries, s.heads, s.width)
        arrays = {"q_THd": q, "k_SGd": k, "v_SGe": v, "dy_THe": dy}
        return {name: make.store(array, p.dtype) for name, array in arrays.items()}

    def names(self, inputs: Mapping[str, Any]) -> tuple[str, ...]:
        """See `frozen.Trainable`."""
        return ("q_THd", "k_SGd", "v_SGe")

    def there_and_back(
        self, ops: Any, tensors: Mapping[str, torch.Tensor], p: Params, factor: float = 1.0
    ) -> dict[str, torch.Tensor]:
        """See `frozen.Trainable`."""
        y = ops.attention(*(tensors[name] for name in self.names(tensors)), self.scale(p), causal=self.causal)
        backward(y, tensors["dy_THe"] if factor == 1.0 else tensors["dy_THe"] * factor)
        return {"y_THe": y}

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """See `Case.run`."""
        leaves = {name: leaf(tensors[name]) for name in self.names(tensors)}
        found = self.there_and_back(ops, {**tensors, **leaves}, p)
        return observed({**found, **{f"d{name}": tensor.grad for name, tensor in leaves.items()}})

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`: a query's errors are correlated, and those of a key."""
        wrong = self.structure(inputs, outputs, p)
        if wrong is not None:
            return wrong
        q, k, v, dy = (inputs[name] for name in ("q_THd", "k_SGd", "v_SGe", "dy_THe"))
        rule = arithmetic(contract, p.dtype)
        want = attention_backward(q, k, v, dy, self.scale(p), self.causal, p.dtype, rule)
        pairs = {"y_THe": want.y, "dq_THd": want.dq, "dk_SGd": want.dk, "dv_SGe": want.dv}
        queries = q.shape[0] * q.shape[1]
        return merge(_judge(name, outputs, chained, p, queries) for name, chained in pairs.items())

    def structure(self, inputs: Arrays, outputs: Arrays, p: Params) -> Judgement | None:
        """Return a verdict on shapes and dtypes."""
        made = {"y_THe": "dy_THe", "dq_THd": "q_THd", "dk_SGd": "k_SGd", "dv_SGe": "v_SGe"}
        return structure(outputs, {name: (inputs[of].shape, p.dtype) for name, of in made.items()})


class OneHead(Attention):
    """One query head, and so one key head."""

    def sizes(self, p: Params) -> Sizes:
        """See `Attention.sizes`."""
        return replace(super().sizes(p), heads=1, groups=1)


class Forward(Attention):
    """The result alone."""

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """See `Case.run`."""
        given = (tensors[name] for name in ("q_THd", "k_SGd", "v_SGe"))
        return {"y_THe": ops.attention(*given, self.scale(p), causal=self.causal)}

    def result(self, inputs: Arrays, p: Params, contract: Contract) -> Chained:
        """Return the result."""
        q, k, v = (inputs[name] for name in ("q_THd", "k_SGd", "v_SGe"))
        return attention(q, k, v, self.scale(p), self.causal, p.dtype, arithmetic(contract, p.dtype))

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`."""
        wrong = self.structure(inputs, outputs, p)
        return wrong or merge([_judge("y_THe", outputs, self.result(inputs, p, contract), p)])

    def structure(self, inputs: Arrays, outputs: Arrays, p: Params) -> Judgement | None:
        """See `Attention.structure`."""
        shape = (*inputs["q_THd"].shape[:2], inputs["v_SGe"].shape[2])
        return structure(outputs, {"y_THe": (shape, p.dtype)})


class NanQuery(Forward):
    """One head of one query is not a number."""

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`: the third query, in its last head."""
        arrays = {name: array.copy() for name, array in super().inputs(p).items() if name != "dy_THe"}
        arrays["q_THd"][2, -1] = np.nan
        return arrays

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`: that result is NaN, and the others as they are where nothing is."""
        keeps_nonfinite(contract)
        wrong = self.structure(inputs, outputs, p)
        if wrong is not None:
            return wrong
        q, got = inputs["q_THd"].copy(), outputs["y_THe"].copy()
        own = wide(got[2, -1])
        q[2, -1] = 0
        want = self.result({**inputs, "q_THd": q}, p, contract)
        got[2, -1] = want.value[2, -1].astype(got.dtype)
        others = _judge("y_THe", {"y_THe": got}, want, p)
        return merge([exact("the NaN query's result", own, np.full_like(own, np.nan)), others])


class Pick(Forward):
    """Every query matches one key and nothing else."""

    def scale(self, p: Params) -> float:
        """See `Attention.scale`: with entries of 8, logits of two keys differ by 128 at least, and exp(-128) is 0."""
        return 0.5

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`: keys are the binary digits of their place, as +-8; queries are those of the wanted key."""
        s = self.sizes(p)
        digits = np.arange(s.width) % (s.keys - 1).bit_length()
        codes = np.where((np.arange(s.keys)[:, None] >> digits) & 1, 8.0, -8.0)
        words = make.words(p.seed, "pick/wanted", s.queries, s.heads)
        last = np.arange(s.queries)[:, None] + (s.keys - s.queries)
        wanted = words % (last + 1) if self.causal else words % s.keys
        wanted[::3] = last[::3]  # the query's own place: the first that a mask that is off by one would hide
        values = make.integers(p.seed, "pick/values", -100, 100, s.keys, s.groups, s.width)
        return {
            "q_THd": make.store(codes[wanted], p.dtype),
            "k_SGd": make.store(np.repeat(codes[:, None], s.groups, axis=1), p.dtype),
            "v_SGe": make.store(values, p.dtype),
        }

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """See `Case.run`: before the result is read, the queries are asked again in another order."""
        found = super().run(ops, tensors, p)
        super().run(ops, {**tensors, "q_THd": tensors["q_THd"].flip(0)}, p)
        return found

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`: the result is a value, bit by bit in 16 bits; in float32 the normaliser may be rounded."""
        if p.dtype == "float32":
            return super().judge(inputs, outputs, p, contract)
        want = make.store(self.result(inputs, p, contract).value, p.dtype)
        return self.structure(inputs, outputs, p) or merge([exact("y", outputs["y_THe"], want)])


class Hidden(Forward):
    """The last keys are not numbers, and only the last queries see them."""

    LAST = 3

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`: keys of NaN and of both infinities; values of the dtype's largest number."""
        arrays = {name: array.copy() for name, array in super().inputs(p).items() if name != "dy_THe"}
        arrays["k_SGd"][-3:] = np.array([np.nan, np.inf, -np.inf])[:, None, None]
        arrays["v_SGe"][-3:] = 60000.0 if p.dtype == "float16" else 2.0**127
        return arrays

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`: only queries that see none of them are judged."""
        wrong = self.structure(inputs, outputs, p)
        if wrong is not None:
            return wrong
        clean = {name: array[: -self.LAST] for name, array in inputs.items()}
        want = self.result(clean, p, contract)
        return merge([_judge("y_THe", {"y_THe": outputs["y_THe"][: -self.LAST]}, want, p)])


class HiddenBackward(Attention):
    """The last keys are huge, only the last queries see them, and no gradient comes back through these."""

    LAST = 3

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`: hidden logits are NaN and infinite, though every input is finite.

        A key of NaN would reach every query: dq = dS k, and 0 times NaN is NaN in every kernel. So keys are powers of
        two whose products overflow (but in float16) where a mask must hide them, and the queries that see them are 0:
        their probabilities are alike, and with an upstream gradient of 0 they add nothing to dk and dv. Hidden values
        are large, too, and dy v is not too large for float32.
        """
        arrays = {name: array.copy() for name, array in super().inputs(p).items()}
        large = 2.0**15 if p.dtype == "float16" else 2.0**127
        arrays["k_SGd"][-self.LAST :] = large * np.array([1.0, -1.0, 1.0])[:, None, None]
        arrays["v_SGe"][-self.LAST :] = min(large, 2.0**100)
        for name in ("q_THd", "dy_THe"):
            arrays[name][-self.LAST :] = 0.0
        return arrays


@dataclass(frozen=True)
class Even(Attention):
    """Many keys of similar probability, and sums of numbers of one sign.

    Attributes:
        queries: how many; the last positions.
        keys: how many.
        value: width of a value.
    """

    queries: int = 9
    keys: int = 577
    value: int = 72

    HEADS = 4

    def sizes(self, p: Params) -> Sizes:
        """See `Attention.sizes`."""
        return Sizes(self.queries, self.keys, self.HEADS, self.HEADS // self.share, _WIDTHS[p.scale])

    def scale(self, p: Params) -> float:
        """See `Attention.scale`: no 1 / sqrt(d), and no number of 16 bits."""
        return 0.3

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`: logits of variance 1, values near 5.5, upstream gradients near 1.4.

        A sum of S stored probabilities has the relative error u / sqrt(S), and one of e stored results has u / sqrt(e):
        beside them the rounding of a running sum of either, which is u, is large. Half an ulp of y is small for its
        size (y is below 8), that of D = sum(dy y) large (for e = 72, D is above 512). An error of D is one for all
        keys; the outlier channel of the keys, which dS as a whole does not move, shows it. Values differ by 2, so that
        results differ by several ulp from query to query, and are not all rounded the same way.
        """
        s, name = self.sizes(p), f"attention/even/{self.queries}/{self.keys}"
        q = make.normal(p.seed, f"{name}/q", s.queries, s.heads, s.width) * (3.5 / np.sqrt(s.width))
        k = make.normal(p.seed, f"{name}/k", s.keys, s.groups, s.width)
        k[:, :, 3] += 8.0
        v = 5.5 + make.normal(p.seed, f"{name}/v", s.keys, s.groups, self.value) * 2.0
        dy = 1.4 + make.normal(p.seed, f"{name}/dy", s.queries, s.heads, self.value) / 4.0
        arrays = {"q_THd": q, "k_SGd": k, "v_SGe": v, "dy_THe": dy}
        return {name: make.store(array, p.dtype) for name, array in arrays.items()}


def far_below(arrays: Arrays, queries: str, keys: str) -> Arrays:
    """Give every key the same large entry in channel 0, and three of four queries one that makes all logits negative.

    Logits of a query move by one number, about -200, -2,000 or -20,000 at the smallest scale (scales differ by a factor
    of three), and its probabilities stay what they are. A maximum that starts at 0 or at one of the usual finite
    numbers, -1e3 or -1e4, leaves a sum of exponentials that are all zero.

    Args:
        arrays: inputs; those that are changed are copied.
        queries: name of an array [T, H, d].
        keys: name of an array [S, d] or [S, G, d].
    """
    q_THd, k_Sd = arrays[queries].copy(), arrays[keys].copy()
    k_Sd[..., 0] = FAR
    for first, size in enumerate((4.0, 32.0, 512.0)):
        q_THd[first::4, :, 0] = -size
    return {**arrays, queries: q_THd, keys: k_Sd}


FAR = 512.0
"""A power of two, as the queries' entries are: their product is exact in every dtype."""


class FarBelow(Attention):
    """Queries whose logits are all far below zero."""

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`."""
        return far_below(super().inputs(p), "q_THd", "k_SGd")


class NoTokens(Attention):
    """Zero queries."""

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`."""
        return {name: array if name in ("k_SGd", "v_SGe") else array[:0] for name, array in super().inputs(p).items()}


class Overflow(Attention):
    """Gradients of values beyond float16."""

    def dtypes(self) -> tuple[str, ...]:
        """See `Case.dtypes`: where a loss is scaled, and the scale is found by what overflows."""
        return ("float16",)

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`: values of 0, so that nothing inside overflows; upstream gradients of up to 32,768."""
        arrays = super().inputs(p)
        arrays["v_SGe"] = np.zeros_like(arrays["v_SGe"])
        shape = arrays["dy_THe"].shape
        size = 2.0**15 * make.words(p.seed, "attention/large", *shape) / 2.0**32
        arrays["dy_THe"] = make.store(size, p.dtype)
        return arrays

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`."""
        keeps_nonfinite(contract)
        return super().judge(inputs, outputs, p, contract)


class Latent(Forward):
    """Multi-head latent attention."""

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`."""
        s = self.sizes(p)
        rotated, rank, value = s.width // 2, 2 * s.width, s.width - 8

        def normal(name: str, *shape: int) -> Any:
            return make.normal(p.seed, f"latent/{name}", *shape)

        latent = normal("latent", s.keys, rank)
        latent[0] *= 4.0
        arrays = {
            "q_THd": normal("q", s.queries, s.heads, s.width),
            "q_THR": normal("qr", s.queries, s.heads, rotated),
            "latent_SL": latent,
            "k_SR": normal("kr", s.keys, rotated),
            "up_k_HdL": make.weights(p.seed, "latent/up_k", s.heads, s.width, rank),
            "up_v_HeL": make.weights(p.seed, "latent/up_v", s.heads, value, rank),
        }
        return {name: make.store(array, p.dtype) for name, array in arrays.items()}

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """See `Case.run`."""
        return {"y_THe": ops.latent_attention(*(tensors[n] for n in LATENT), self.scale(p), causal=self.causal)}

    def result(self, inputs: Arrays, p: Params, contract: Contract) -> Chained:
        """See `Forward.result`."""
        return latent_attention(inputs, self.scale(p), self.causal, p.dtype, arithmetic(contract, p.dtype))

    def structure(self, inputs: Arrays, outputs: Arrays, p: Params) -> Judgement | None:
        """See `Attention.structure`."""
        shape = (*inputs["q_THd"].shape[:2], inputs["up_v_HeL"].shape[1])
        return structure(outputs, {"y_THe": (shape, p.dtype)})


@dataclass(frozen=True)
class LatentBackward(Latent):
    """Multi-head latent attention and all of its gradients, where neither order of the projections rounds anything.

    Attributes:
        steep: how much larger the rotated parts are in 16 bits than numbers of variance 1. In float32, where logits are
            stored as they are computed, nothing more would show, and next to a probability of nearly 1 all gradients
            are differences of equal numbers.
        rank: width of the latent; None: twice that of a head.
    """

    steep: float = 1.0
    rank: int | None = None

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`: quarters of small integers, projected by matrices with four ones or minus ones a row.

        So a key or value is an integer of at most 8, and q up_k and dy up_v are quarters far below 2^8: exact in 16
        bits. The rotated parts are as they occur.
        """
        s = self.sizes(p)
        rotated, rank, value = s.width // 2, self.rank or 2 * s.width, s.width - 8
        steep = 1.0 if p.dtype == "float32" else self.steep

        def integers(name: str, most: int, *shape: int) -> Any:
            return make.integers(p.seed, f"latent/exact/{name}", -most, most, *shape)

        arrays = {
            "q_THd": integers("q", 8, s.queries, s.heads, s.width) / 4.0,
            "q_THR": make.normal(p.seed, "latent/qr", s.queries, s.heads, rotated) * steep,
            "latent_SL": integers("latent", 2, s.keys, rank),
            "k_SR": make.normal(p.seed, "latent/kr", s.keys, rotated) * steep,
            "up_k_HdL": make.sparse(p.seed, "latent/exact/up_k", 4, 1, s.heads, s.width, rank),
            "up_v_HeL": make.sparse(p.seed, "latent/exact/up_v", 4, 1, s.heads, value, rank),
            "dy_THe": integers("dy", 8, s.queries, s.heads, value) / 4.0,
        }
        return {name: make.store(array, p.dtype) for name, array in arrays.items()}

    def names(self, inputs: Mapping[str, Any]) -> tuple[str, ...]:
        """See `frozen.Trainable`."""
        return LATENT

    def there_and_back(
        self, ops: Any, tensors: Mapping[str, torch.Tensor], p: Params, factor: float = 1.0
    ) -> dict[str, torch.Tensor]:
        """See `frozen.Trainable`."""
        y = ops.latent_attention(*(tensors[name] for name in LATENT), self.scale(p), causal=self.causal)
        backward(y, tensors["dy_THe"] if factor == 1.0 else tensors["dy_THe"] * factor)
        return {"y_THe": y}

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """See `Case.run`."""
        return Attention.run(self, ops, tensors, p)

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`."""
        shapes = {f"d{name}": (inputs[name].shape, p.dtype) for name in LATENT}
        wrong = structure(outputs, {"y_THe": (inputs["dy_THe"].shape, p.dtype), **shapes})
        if wrong is not None:
            return wrong
        rule = arithmetic(contract, p.dtype)
        want = latent_backward(inputs, inputs["dy_THe"], self.scale(p), self.causal, p.dtype, rule)
        found = [_judge("y_THe", outputs, self.result(inputs, p, contract), p)]
        for name in LATENT:
            chained = want[name]
            # Errors of a query, of a key, or of a head's projection are correlated.
            independent = len(chained.value) * (chained.value.shape[1] if name.startswith("q") else 1)
            bounded = chained.within_deviations().stored(p.dtype)
            found.append(judge(f"d{name}", outputs[f"d{name}"], bounded, independent=independent))
        return merge(found)


class OneLatentHead(LatentBackward):
    """One query head."""

    def sizes(self, p: Params) -> Sizes:
        """See `Attention.sizes`."""
        return replace(super().sizes(p), heads=1, groups=1)


class LatentFarBelow(LatentBackward):
    """As `FarBelow`: the rotated parts, which no projection multiplies, hold what all keys share."""

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`."""
        return far_below(super().inputs(p), "q_THR", "k_SR")


def _judge(name: str, outputs: Arrays, want: Chained, p: Params, queries: int | None = None) -> Finding:
    """Judge an array [rows, heads, width]: as many errors are independent as there are rows of a head.

    For keys and values no more than there are `queries` of a head, if these are said: an error of D is one for a query.
    """
    independent = want.value.shape[0] * want.value.shape[1]
    if queries is not None:
        independent = max(1, min(independent, queries))
    return judge(name, outputs[name], want.within_deviations().stored(p.dtype), independent=independent)


_NEEDS, _LATENT_NEEDS = ("attention",), ("latent_attention",)
_FEW_DTYPES = ("float32", "bfloat16")
BOUND = (
    "Bound: variances chained through logits, softmax, stored probabilities and the product with v, by "
    "FlashAttention's equations (oracle.attention): lambda deviations and half an ulp."
)
CAUSAL = Attention(
    "attention.causal", "attention", _NEEDS,
    "Causal attention with two query heads to a key head, and all three gradients. A sink, an outlier channel, and a "
    "query with huge logits. " + BOUND,
)  # fmt: skip
LATENT_BACKWARD = LatentBackward(
    "attention.latent_backward", "attention", _LATENT_NEEDS,
    "Multi-head latent attention and the gradients of queries, latent, rotated key and both projections, the "
    "queries being the last of S positions. Keys, values, q up_k and dy up_v are integers and quarters that 16 "
    "bits hold exactly, so that both orders of the projections have the same errors. " + BOUND,
    before=7, share=1,
)  # fmt: skip
WHOLE = Attention(
    "attention.whole", "attention", _NEEDS, "Without a mask, as many keys as queries. " + BOUND, causal=False
)  # fmt: skip
"""Of which only the tails are a case: `attention.full` has more keys than queries."""
PREFIX = Attention(
    "attention.prefix", "attention", _NEEDS,
    "As attention.causal, the queries being the last of S positions, all of four heads on one key head. " + BOUND,
    before=7, share=4,
)  # fmt: skip
FULL = Attention(
    "attention.full", "attention", _NEEDS,
    "Without a mask, 11 keys more than queries, as many key heads as query heads. " + BOUND,
    causal=False, before=11, share=1,
)  # fmt: skip
ONE_QUERY = Even(
    "attention.one_query", "attention", _NEEDS,
    "As attention.many_keys: one query over 193 keys, as in decoding, all heads on one key head.",
    share=4, queries=1, keys=193,
)  # fmt: skip
ONE_LATENT_QUERY = LatentBackward(
    "attention.latent_one_query", "attention", _LATENT_NEEDS,
    "As attention.latent_backward: one narrow query over 307 keys at every scale, as in decoding. " + BOUND,
    before=306, share=1, width=16, queries=1, storage=_FEW_DTYPES,
)  # fmt: skip
CASES = (
    CAUSAL, PREFIX, FULL,
    Attention(
        "attention.many_heads", "attention", _NEEDS,
        "As attention.causal with sixteen query heads, eight to a key head. " + BOUND, share=8,
    ),
    Attention(
        "attention.wide_heads", "attention", _NEEDS,
        "As attention.causal with fourteen query heads, seven to a key head, of 128 channels at every scale. " + BOUND,
        share=7, width=128,
    ),
    Pick(
        "attention.pick", "attention", _NEEDS,
        "Every query matches one key so well that the other probabilities are 0: the result is that key's value, bit "
        "by bit in 16 bits. Every third query wants its own place, the last that it may see; query heads of a wrong "
        "key head and masks that are off by one show. Another call follows before the result is read.",
        before=5,
    ),
    Hidden(
        "attention.hidden", "attention", _NEEDS,
        "The last three keys are NaN and infinite, their values the largest that there are: queries before them see "
        "nothing of it. A mask that is added instead of selected lets NaN through. (Values of NaN are not asked about: "
        "every kernel multiplies hidden values by 0.)",
    ),
    Attention(
        "attention.heads_of_192", "attention", _NEEDS,
        "As attention.causal with heads of 192 channels, as latent attention has them, six of queries to one of keys. "
        + BOUND,
        share=6, width=192,
    ),
    Attention(
        "attention.heads_of_64", "attention", _NEEDS,
        "As attention.causal with 37 queries over heads of 64 channels at every scale. " + BOUND, width=64, queries=37,
    ),
    Attention(
        "attention.heads_of_256", "attention", _NEEDS,
        "As attention.causal with 37 queries over heads of 256 channels at every scale. " + BOUND,
        width=256, queries=37,
    ),
    Attention(
        "attention.three_tiles", "attention", _NEEDS,
        "As attention.causal with 293 queries and as many keys at every scale, two narrow heads on one key head: a "
        "mask cuts tiles of 64 or of 128 on the diagonal, hides those beyond it and leaves those before it whole, and "
        "the last is not full. " + BOUND,
        width=16, queries=293, heads=2, storage=_FEW_DTYPES,
    ),
    Attention(
        "attention.fewer_keys", "attention", _NEEDS, "Without a mask, 12 queries more than keys. " + BOUND,
        causal=False, before=-12,
    ),
    Hidden(
        "attention.hidden_prefix", "attention", _NEEDS,
        "As attention.hidden, behind a prefix of seven keys: a kernel that knows no prefix is given a mask, which it "
        "adds.",
        before=7,
    ),
    HiddenBackward(
        "attention.hidden_backward", "attention", _NEEDS,
        "The last three keys are as large as the dtype allows and their values are large; the queries that see them, "
        "and their gradients from above, are 0. What a mask hides is NaN and infinite inside, and the three gradients "
        "show nothing of it. (Keys of NaN are not asked about: every kernel multiplies hidden keys by a dS of 0.) "
        + BOUND,
    ),
    Even(
        "attention.many_keys", "attention", _NEEDS,
        "Nine queries over 577 keys of similar probability, values wider than keys, scale 0.3. Results and "
        "D = sum(dy y) are sums of many numbers of one sign: an accumulator, a normaliser or a D of 16 bits is seen "
        "beside the rounding of single probabilities. " + BOUND,
    ),
    Even(
        "attention.tiles", "attention", _NEEDS,
        "As attention.many_keys: 128 queries over 256 keys, which blocks divide, as many key heads as query heads, and "
        "values narrower than keys. Gradients of keys and values are sums of 128 numbers of one sign.",
        share=1, queries=128, keys=256, value=8,
    ),
    ONE_QUERY,
    OneHead(
        "attention.one_head", "attention", _NEEDS,
        "As attention.prefix with one query head: code that drops axes of length one is wrong here. " + BOUND,
        before=7, share=1,
    ),
    FarBelow(
        "attention.far_below", "attention", _NEEDS,
        "As attention.prefix, with queries whose logits are all far below zero, by 200 to 60,000: an online softmax "
        "whose maximum starts at 0, or at a finite number such as -1e4, divides zero by zero. " + BOUND,
        before=7,
    ),
    Overflow(
        "attention.overflow", "attention", _NEEDS,
        "Values of zero and large upstream gradients in float16: the gradients of values that many queries see are "
        "infinite, not the largest number; those of queries and keys are zero.",
    ),
    NanQuery(
        "attention.nan_query", "attention", _NEEDS,
        "As attention.causal, forward, where one head of one query is NaN: its own result is, and no other.",
    ),
    NoTokens("attention.no_tokens", "attention", _NEEDS, "Zero queries: gradients of keys and values are 0."),
    Latent(
        "attention.latent", "attention", _LATENT_NEEDS,
        "DeepSeek's multi-head latent attention, forward: keys and values projected up from a latent, and one rotated "
        "key for all heads; the absorbed order of the projections is admitted, too. " + BOUND,
        share=1,
    ),
    LATENT_BACKWARD,
    LatentBackward(
        "attention.latent_full", "attention", _LATENT_NEEDS,
        "As attention.latent_backward without a mask, 11 keys more than queries, and in 16 bits with rotated parts "
        "four times as large, whose share of the logits must not be rounded. " + BOUND,
        causal=False, before=11, share=1, steep=4.0,
    ),
    OneLatentHead(
        "attention.latent_one_head", "attention", _LATENT_NEEDS,
        "As attention.latent_backward with one query head. " + BOUND, before=7, share=1,
    ),
    LatentBackward(
        "attention.latent_wide", "attention", _LATENT_NEEDS,
        "As attention.latent_backward with a latent of 520 channels, and nine queries of seventeen narrow heads, at "
        "every scale. " + BOUND,
        before=7, share=1, width=16, queries=9, heads=17, rank=520, storage=("bfloat16",),
    ),
    ONE_LATENT_QUERY,
    LatentFarBelow(
        "attention.latent_far_below", "attention", _LATENT_NEEDS,
        "As attention.latent_backward, with queries whose logits are all far below zero, as in attention.far_below. "
        + BOUND,
        before=7, share=1,
    ),
    Tails("attention.tails", CAUSAL), Tails("attention.full_tails", WHOLE),
    Tails("attention.latent_tails", LATENT_BACKWARD),
    KeptResults("attention.kept", CAUSAL), KeptResults("attention.latent_kept", LATENT_BACKWARD),
    Untrained("attention.untrained", CAUSAL, ("y_THe",)),
    Untrained("attention.latent_untrained", LATENT_BACKWARD, ("y_THe",)),
    Untrained("attention.prefix_untrained", PREFIX, ("y_THe",), modes=IN_SERVICE),
    Untrained("attention.full_untrained", FULL, ("y_THe",), modes=IN_SERVICE),
    Untrained("attention.one_query_untrained", ONE_QUERY, ("y_THe",), modes=IN_SERVICE),
    Untrained("attention.latent_one_query_untrained", ONE_LATENT_QUERY, ("y_THe",), modes=IN_SERVICE),
    Strided("attention.strided", CAUSAL),
    Strided("attention.latent_strided", LATENT_BACKWARD),
    TokenCounts("attention.token_counts", CAUSAL),
    TokenCounts("attention.latent_token_counts", LATENT_BACKWARD),
    Sliced("attention.sliced", CAUSAL), Sliced("attention.latent_sliced", LATENT_BACKWARD),
    Shifted("attention.shifted", CAUSAL),
    Shifted("attention.latent_shifted", LATENT_BACKWARD),
    Frozen("attention.frozen", CAUSAL), Frozen("attention.latent_frozen", LATENT_BACKWARD),
)  # fmt: skip
