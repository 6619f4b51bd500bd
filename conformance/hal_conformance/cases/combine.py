# SPDX-License-Identifier: Apache-2.0
"""Combine: the weighted sum of a token's rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hal.contract import Arithmetic, Contract
from hal.moe.presets import preset
from hal_conformance import inputs as make
from hal_conformance.case import F64, Array, Arrays, Params
from hal_conformance.cases.base import (
    ByCounts,
    backward,
    keeps_nonfinite,
    leaf,
    mean_load,
    observed,
    shape,
    weight_storage,
    wide,
)
from hal_conformance.cases.frozen import Frozen
from hal_conformance.cases.kept_graph import KeptGraph
from hal_conformance.cases.kept_results import KeptResults
from hal_conformance.cases.narrow import Int32, SmallIntegers
from hal_conformance.cases.nonfinite import admitted
from hal_conformance.cases.sized import FEW_EXPERTS, Aligned, Long, Many, TokenCounts, Unaligned, Whole, Wide
from hal_conformance.cases.strided import Shifted, Sliced, Strided
from hal_conformance.cases.tails import Tails
from hal_conformance.cases.untrained import Untrained
from hal_conformance.numerics.bounds import U32, Bounded, matmul_bound, matmul_variance
from hal_conformance.numerics.budget import level
from hal_conformance.numerics.detectors import Finding, exact, judge, merge, structure
from hal_conformance.oracle.dispatching import combine, gather_rows, sent
from hal_conformance.verdicts import Judgement

if TYPE_CHECKING:
    import torch


class Random(ByCounts):
    """Rows and weights as they occur."""

    def capacity(self, p: Params) -> int | None:
        """Return the most rows of an expert: some slots then have no row."""
        return None

    def sizes(self, p: Params) -> tuple[int, int]:
        """Return T and K."""
        return shape(p).tokens, preset(p.preset).router.top_k

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`: a quarter of the weights is negative, as with a negative scaling factor all are."""
        spec, (tokens, top_k) = preset(p.preset).router, self.sizes(p)
        experts = make.choices(p.seed, "combine", tokens, spec.num_experts, top_k)
        slot_R, _ = sent(experts, spec.num_experts, self.capacity(p))
        raw = make.words(p.seed, "combine/w", tokens, top_k) / 2.0**32 + 1.0 / 64
        raw[make.integers(p.seed, "combine/negative", 0, 3, tokens, top_k) == 0] *= -1.0
        return {
            "y_RD": make.store(make.activations(p.seed, "combine/y", len(slot_R), shape(p).width), p.dtype),
            "weights_TK": make.store(raw / top_k * spec.scaling_factor, weight_storage(spec, p)),
            "slot_R": slot_R,
        }

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """See `Case.run`."""
        y = ops.combine(tensors["y_RD"], tensors["weights_TK"], tensors["slot_R"], tensors["weights_TK"].shape[0])
        return {"y_TD": y}

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`."""
        weights, y = wide(inputs["weights_TK"]), inputs["y_RD"]
        wrong = structure(outputs, {"y_TD": ((len(weights), y.shape[1]), p.dtype)})
        if wrong is not None:
            return wrong
        rows_TKD = gather_rows(wide(y), inputs["slot_R"], *weights.shape)
        return merge([self.finding(outputs["y_TD"], rows_TKD, weights, p.dtype)])

    def finding(self, y_TD: Array, rows_TKD: F64, weights_TK: F64, dtype: str) -> Finding:
        """Compare the sums with those of the rows and weights.

        What is left of a token may be one product, with one weight in all channels; see `Backward.judge`.
        """
        single = ((weights_TK != 0) & rows_TKD.any(axis=2)).sum(1) == 1
        independent = len(y_TD) if single.any() else None
        return judge("y", y_TD, combine(rows_TKD, weights_TK, dtype), independent=independent, bias=dtype != "float32")


class Exact(Random):
    """Powers of two times integers, whose sum needs at most the bits of the dtype."""

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`: partial sums of hundreds cancel to a few halves, so that a low accumulator shows.

        The first half of the choices holds odd integers up to 127, whose halves sum up to hundreds with a fraction of
        one half; the second half takes them away again but for -1, 0 or 1 each.
        """
        arrays = super().inputs(p)
        tokens, top_k = arrays["weights_TK"].shape
        width, half = arrays["y_RD"].shape[1], top_k // 2
        big = 2 * make.integers(p.seed, "combine/big", 0, 63, tokens, half, width) + 1
        rows = np.zeros((tokens, top_k, width))
        rows[:, :half] = big
        rows[:, half : 2 * half] = make.integers(p.seed, "combine/small", -1, 1, tokens, half, width) - big
        arrays["y_RD"] = make.store(rows.reshape(tokens * top_k, width)[arrays["slot_R"]], p.dtype)
        arrays["weights_TK"] = np.full((tokens, top_k), 0.5, arrays["weights_TK"].dtype)
        return arrays

    def finding(self, y_TD: Array, rows_TKD: F64, weights_TK: F64, dtype: str) -> Finding:
        """Compare bit by bit."""
        return exact("y", y_TD, self.expected(rows_TKD, weights_TK, dtype))

    def expected(self, rows_TKD: F64, weights_TK: F64, dtype: str) -> Array:
        """Return the sums, stored."""
        return make.store((rows_TKD * weights_TK[:, :, None]).sum(1), dtype)


class Nonfinite(Exact):
    """Sums that are not finite."""

    @np.errstate(all="ignore")
    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`."""
        keeps_nonfinite(contract)
        return super().judge(inputs, outputs, p, contract)

    def finding(self, y_TD: Array, rows_TKD: F64, weights_TK: F64, dtype: str) -> Finding:
        """Compare bit by bit; NaN for an infinity is right, too (`nonfinite.admitted`)."""
        return exact("y", y_TD, admitted(self.expected(rows_TKD, weights_TK, dtype), y_TD, Contract()))


class NanRow(Nonfinite):
    """A row that is NaN, and one of infinities."""

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`."""
        arrays = super().inputs(p)
        y, token_R = arrays["y_RD"].copy(), arrays["slot_R"] // arrays["weights_TK"].shape[1]
        nan = len(y) // 2
        infinite = np.flatnonzero(token_R != token_R[nan])[0]
        y[nan], y[infinite], y[infinite, ::2] = np.nan, np.inf, -np.inf
        return {**arrays, "y_RD": y}


class Overflow(Nonfinite):
    """Finite rows whose sum the dtype does not hold."""

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`: of two tokens every row is the largest power of two, of one sign, and every weight is 1.

        The sum of two of them is beyond the dtype, in every order.
        """
        arrays = super().inputs(p)
        weights, y = arrays["weights_TK"].copy(), arrays["y_RD"].copy()
        weights[1:3] = 1
        for token, sign in ((1, 1.0), (2, -1.0)):
            y[arrays["slot_R"] // weights.shape[1] == token] = sign * 2.0 ** (15 if p.dtype == "float16" else 127)
        return {**arrays, "weights_TK": weights, "y_RD": y}


class NoTokens(Random):
    """Zero tokens."""

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`."""
        return {name: array[:0] for name, array in super().inputs(p).items()}


@dataclass(frozen=True)
class Few(Random):
    """One token, or one choice for each: code that drops axes of length one is wrong here.

    Attributes:
        tokens: T; None: as many as ever.
        choices: K; None: the model's.
    """

    tokens: int | None = None
    choices: int | None = None

    def sizes(self, p: Params) -> tuple[int, int]:
        """See `Random.sizes`."""
        tokens, top_k = super().sizes(p)
        return self.tokens or tokens, self.choices or top_k


class ManyChoices(Few):
    """More choices than the models' own."""

    def presets(self) -> tuple[str, ...]:
        """See `Case.presets`: one with more experts than that."""
        return ("ling-lite",)


class Dropped(Random):
    """Slots whose rows a capacity dropped."""

    def capacity(self, p: Params) -> int | None:
        """See `Random.capacity`: the mean load, rounded up."""
        return mean_load(p)


class AllDropped(Dropped):
    """Tokens of which no row is left, some of whose weights are not even finite."""

    def presets(self) -> tuple[str, ...]:
        """See `Case.presets`."""
        return FEW_EXPERTS

    def capacity(self, p: Params) -> int | None:
        """See `Random.capacity`."""
        return 0

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`."""
        arrays = super().inputs(p)
        arrays["weights_TK"][1], arrays["weights_TK"][2, 0] = np.nan, np.inf
        return arrays

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """See `Case.run`."""
        weights = leaf(tensors["weights_TK"])
        y = ops.combine(tensors["y_RD"], weights, tensors["slot_R"], len(weights))
        backward(y, tensors["y_RD"].new_ones(len(weights), tensors["y_RD"].shape[1]))
        return observed({"y_TD": y, "dweights_TK": weights.grad})

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`."""
        weights, width = inputs["weights_TK"], inputs["y_RD"].shape[1]
        zeros = {
            "y_TD": np.zeros((len(weights), width), make.NUMPY_DTYPES[p.dtype]),
            "dweights_TK": np.zeros_like(weights),
        }
        wrong = structure(outputs, {name: (array.shape, str(array.dtype)) for name, array in zeros.items()})
        return wrong or merge(exact(name, outputs[name], array) for name, array in zeros.items())


class Backward(Random):
    """The sums where rows and weights are trained, and their gradients."""

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`: some weights are zero, and have a gradient all the same."""
        arrays = super().inputs(p)
        tokens, width = len(arrays["weights_TK"]), arrays["y_RD"].shape[1]
        arrays["weights_TK"][::7, -1] = 0
        arrays["dy_TD"] = make.store(make.normal(p.seed, "combine/dy", tokens, width), p.dtype)
        return arrays

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """See `Case.run`."""
        leaves = {name: leaf(tensors[name]) for name in self.names(tensors)}
        found = self.there_and_back(ops, {**tensors, **leaves}, p)
        return observed({**found, **{f"d{name}": tensor.grad for name, tensor in leaves.items()}})

    def names(self, inputs: Mapping[str, Any]) -> tuple[str, ...]:
        """See `frozen.Trainable`."""
        return ("y_RD", "weights_TK")

    def there_and_back(
        self, ops: Any, tensors: Mapping[str, torch.Tensor], p: Params, factor: float = 1.0
    ) -> dict[str, torch.Tensor]:
        """See `frozen.Trainable`."""
        weights = tensors["weights_TK"]
        y = ops.combine(tensors["y_RD"], weights, tensors["slot_R"], weights.shape[0])
        backward(y, tensors["dy_TD"] if factor == 1.0 else factor * tensors["dy_TD"])
        return {"y_TD": y}

    def structure(self, inputs: Arrays, outputs: Arrays, p: Params) -> Judgement | None:
        """See `frozen.Trainable`."""
        storage = weight_storage(preset(p.preset).router, p)
        gradients = {"dy_RD": (inputs["y_RD"].shape, p.dtype), "dweights_TK": (inputs["weights_TK"].shape, storage)}
        return structure(outputs, {"y_TD": (inputs["dy_TD"].shape, p.dtype), **gradients})

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`."""
        weights, y, slots = wide(inputs["weights_TK"]), inputs["y_RD"], inputs["slot_R"]
        storage = weight_storage(preset(p.preset).router, p)
        wrong = self.structure(inputs, outputs, p)
        if wrong is not None:
            return wrong
        top_k = weights.shape[1]
        up = wide(inputs["dy_TD"])[slots // top_k]
        dy = up * weights.reshape(-1)[slots, None]
        products = Bounded.deterministic(dy, U32 * np.abs(dy)).stored(p.dtype)
        # A sum over D of products in float32; at least as good as float32 units, whatever the dtype of storage.
        terms = up * wide(y)
        value, squares, width = terms.sum(1), (terms**2).sum(1), terms.shape[1]
        rule, at = Arithmetic(), level(value.size)
        bound = matmul_bound(value, squares, np.abs(terms).sum(1), width, rule, at)
        sums = Bounded(value, bound, matmul_variance(value, squares, width, rule)).stored(storage)
        by_slot = Bounded(*(np.zeros(weights.size) for _ in range(3)))  # exactly zero for a slot without a row
        for part, sum_ in ((by_slot.value, sums.value), (by_slot.bound, sums.bound), (by_slot.var, sums.var)):
            part[slots] = sum_
        rows_TKD = gather_rows(wide(y), slots, *weights.shape)
        return merge(
            [
                self.finding(outputs["y_TD"], rows_TKD, weights, p.dtype),
                # Errors of products with one weight are correlated: next to a power of two, say 1 + d, the result is
                # off the grid of 16 bits by d y, up to half an ulp, and not by anything between with equal odds.
                judge("dy", outputs["dy_RD"], products, independent=len(up)),
                judge("dweights", outputs["dweights_TK"].reshape(-1), by_slot),
            ]
        )


class NanBackward(Backward):
    """A row that is NaN, another token's gradient, and an infinite element in a third one's."""

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`."""
        arrays = super().inputs(p)
        y, dy, last = arrays["y_RD"].copy(), arrays["dy_TD"].copy(), len(arrays["weights_TK"]) - 1
        y[arrays["slot_R"] == 0] = np.nan  # the first token's first choice
        dy[last] = np.nan
        dy[last // 2, 1] = np.inf
        return {**arrays, "y_RD": y, "dy_TD": dy}

    @np.errstate(all="ignore")
    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`."""
        keeps_nonfinite(contract)
        return super().judge(inputs, outputs, p, contract)


class DroppedBackward(Backward, Dropped):
    """Gradients where some slots have no row."""


_NEEDS = ("combine",)
_SUMS = (
    "Weighted sums of K rows with heavy tails, some weights negative. Bound: K u sum |w y| and half an ulp of storage; "
    "also RMS and bias."
)
_GRADIENTS = (
    _SUMS
    + " Gradients: of a row one product, of a weight a sum over D in float32 (bounds.matmul). Some weights are zero; "
    "their gradients are not."
)
_EXACT = "Integers of up to 128 that cancel, weights of one half: exact in float32 in any order, compared bit by bit"
BACKWARD = Backward("combine.backward", "combine", _NEEDS, _GRADIENTS)
EXACT = Exact(
    "combine.exact", "combine", _NEEDS,
    _EXACT + "; a bfloat16 accumulator loses the small remainder (vllm DeepEP#402, TransformerEngine#1336).",
)  # fmt: skip
RANDOM = Random("combine.random", "combine", _NEEDS, _SUMS)
CASES = (
    EXACT,
    NanRow(
        "combine.nan_row", "combine", _NEEDS,
        _EXACT + ". One row is NaN and one of another token infinite, and both reach their own tokens only.",
    ),
    Overflow(
        "combine.overflow", "combine", _NEEDS,
        _EXACT + ". Of two tokens the sum of finite rows is beyond the dtype: infinite, not the largest finite number.",
    ),
    RANDOM,
    Dropped("combine.dropped", "combine", _NEEDS, _SUMS + " A slot whose row was dropped adds nothing."),
    AllDropped(
        "combine.all_dropped", "combine", _NEEDS,
        "Tokens without a single row, as where a capacity of zero drops all: zeros, and gradients of zero for the "
        "weights, NaN and infinite ones, too.",
    ),
    NoTokens("combine.no_tokens", "combine", _NEEDS, "Zero tokens and rows give an empty result."),
    Few("combine.one_token", "combine", _NEEDS, _SUMS + " One token, as in decoding.", tokens=1),
    Few("combine.few_tokens", "combine", _NEEDS, _SUMS + " Five tokens, as in decoding for a few.", tokens=5),
    Few(
        "combine.one_choice", "combine", _NEEDS,
        _SUMS + " K = 1: the weight still counts, since a router need not normalise.", choices=1,
    ),
    ManyChoices(
        "combine.many_choices", "combine", _NEEDS, _SUMS + " K = 12: more than 8, which other kernels are made for.",
        choices=12,
    ),
    BACKWARD,
    NanBackward(
        "combine.nan_backward", "combine", _NEEDS,
        _GRADIENTS + " A row of NaN reaches its own weight's gradient only, and NaN in the gradient of a token its own "
        "rows' and weights' only. So does an infinity, which is kept, for loss scaling to see.",
    ),
    DroppedBackward(
        "combine.dropped_backward", "combine", _NEEDS, _GRADIENTS + " A slot without a row has a gradient of zero."
    ),
    Strided("combine.strided", BACKWARD), Sliced("combine.sliced", BACKWARD, only=FEW_EXPERTS),
    TokenCounts("combine.token_counts", BACKWARD, only=FEW_EXPERTS),
    Frozen("combine.frozen", BACKWARD),
    Aligned("combine.aligned", EXACT),
    Aligned("combine.aligned_backward", BACKWARD),
    Long("combine.long", EXACT, only=FEW_EXPERTS),
    Many("combine.many", BACKWARD, only=FEW_EXPERTS),
    Long("combine.long_backward", BACKWARD, only=FEW_EXPERTS),
    Int32("combine.int32", EXACT, only=FEW_EXPERTS),
    SmallIntegers("combine.small_integers", EXACT, only=FEW_EXPERTS),
    Unaligned("combine.unaligned", EXACT, only=FEW_EXPERTS),
    Unaligned("combine.unaligned_backward", BACKWARD, only=FEW_EXPERTS),
    Wide("combine.wide", EXACT, only=FEW_EXPERTS),
    Wide("combine.wide_backward", BACKWARD, only=FEW_EXPERTS),
    Whole("combine.whole", BACKWARD, only=FEW_EXPERTS),
    Tails("combine.tails", EXACT, only=FEW_EXPERTS),
    Tails("combine.tails_backward", BACKWARD, only=FEW_EXPERTS),
    KeptResults("combine.kept", EXACT, only=FEW_EXPERTS),
    KeptResults("combine.kept_backward", BACKWARD, only=FEW_EXPERTS),
    KeptGraph("combine.kept_graph", BACKWARD, only=FEW_EXPERTS),
    Shifted("combine.shifted", BACKWARD, only=FEW_EXPERTS),
    Untrained("combine.untrained", RANDOM, ("y_TD",), only=FEW_EXPERTS),
)  # fmt: skip
