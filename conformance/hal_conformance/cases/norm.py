# SPDX-License-Identifier: Apache-2.0
"""RMSNorm and LayerNorm, forward and backward.

Legend: T tokens, D model dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from hal.contract import Contract
from hal_conformance import inputs as make
from hal_conformance.case import Arrays, Params
from hal_conformance.cases.base import Base, Shape, backward, keeps_nonfinite, leaf, observed, shape, wide
from hal_conformance.cases.frozen import Frozen
from hal_conformance.cases.kept_results import KeptResults
from hal_conformance.cases.sized import Aligned, Long, Many, TokenCounts, Unaligned, Whole, Wide
from hal_conformance.cases.strided import Shifted, Sliced, Strided
from hal_conformance.cases.tails import Tails
from hal_conformance.cases.untrained import Untrained
from hal_conformance.numerics.detectors import exact, judge, merge, structure
from hal_conformance.oracle.norms import Normed, layer_norm, rms_norm
from hal_conformance.verdicts import Judgement

if TYPE_CHECKING:
    import torch

EPSILON = 1e-5
"""Of Ling-Lite, and of torch's LayerNorm."""

SMALL_ROW, ZERO_ROW, LARGE_ROW = 3, 5, 7
"""A token whose mean square is about `EPSILON`, one of zeros, one as large as float16 has room for."""

OFFSET_ROWS = slice(1, None, 6)
"""Tokens with a mean of about 50 deviations, where mean(x^2) - mean^2 cancels; for LayerNorm only."""


@dataclass(frozen=True)
class Norm(Base):
    """A norm's result and gradients.

    Attributes:
        kind: which norm.
        eps: the epsilon.
        outliers: whether a few channels are far larger than the others. Of eight channels such a one has the same
            normalised value in most rows, and so one and the same error: many rows would not be independent.
    """

    kind: Literal["rms", "layer"] = "rms"
    eps: float = EPSILON
    outliers: bool = True

    def presets(self) -> tuple[str, ...]:
        """See `Case.presets`: only sizes depend on it."""
        return ("ling-lite", "ling-2.0-mini")

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`."""
        s, name = shape(p), f"norm/{self.kind}"
        made = make.activations if self.outliers else make.normal
        x = made(p.seed, f"{name}/x", s.tokens, s.width)
        x[SMALL_ROW] *= 2.0**-10
        x[ZERO_ROW] = 0.0
        x[LARGE_ROW] *= 2.0**8
        if self.kind == "layer":
            x[OFFSET_ROWS] += 256.0
        arrays = {
            "x_TD": make.store(x, p.dtype),
            "weight_D": make.store(1.0 + make.normal(p.seed, f"{name}/weight", s.width) / 4.0, p.dtype),
            "dy_TD": make.store(make.normal(p.seed, f"{name}/dy", s.tokens, s.width), p.dtype),
        }
        if self.kind == "layer":
            arrays["bias_D"] = make.store(make.normal(p.seed, f"{name}/bias", s.width), p.dtype)
        return arrays

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """See `Case.run`."""
        leaves = {name: leaf(tensors[name]) for name in self.names(tensors)}
        found = self.there_and_back(ops, {**tensors, **leaves}, p)
        return observed({**found, **{f"d{name}": tensor.grad for name, tensor in leaves.items()}})

    def names(self, inputs: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the inputs that have gradients."""
        return tuple(name for name in inputs if name != "dy_TD")

    def there_and_back(
        self, ops: Any, tensors: Mapping[str, torch.Tensor], p: Params, factor: float = 1.0
    ) -> dict[str, torch.Tensor]:
        """Call the norm and its backward, the upstream gradient times a factor; return the result."""
        y = self.call(ops, tensors)
        backward(y, tensors["dy_TD"] if factor == 1.0 else tensors["dy_TD"] * factor)
        return {"y_TD": y}

    def call(self, ops: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
        """Call the norm."""
        if self.kind == "rms":
            return ops.rms_norm(tensors["x_TD"], tensors["weight_D"], self.eps)
        return ops.layer_norm(tensors["x_TD"], tensors["weight_D"], tensors["bias_D"], self.eps)

    def expected(self, inputs: Arrays) -> Normed:
        """Return the exact result and gradients."""
        x, w = inputs["x_TD"], inputs["weight_D"]
        dy = inputs.get("dy_TD", x)
        return rms_norm(x, w, dy, self.eps) if self.kind == "rms" else layer_norm(x, w, inputs["bias_D"], dy, self.eps)

    def structure(self, inputs: Arrays, outputs: Arrays, p: Params) -> Judgement | None:
        """Return a verdict on shape and dtype."""
        shapes = {f"d{name}": (array.shape, p.dtype) for name, array in inputs.items() if name != "dy_TD"}
        return structure(outputs, {"y_TD": (inputs["x_TD"].shape, p.dtype), **shapes})

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`."""
        wrong = self.structure(inputs, outputs, p)
        if wrong is not None:
            return wrong
        want, rows = self.expected(inputs), len(inputs["x_TD"])
        pairs = {"y_TD": (want.y, rows), "dx_TD": (want.dx, rows), "dweight_D": (want.dweight, 1)}
        if want.dbias is not None:
            pairs["dbias_D"] = (want.dbias, 1)
        return merge(
            judge(name, outputs[name], bounded.stored(p.dtype), independent=independent)
            for name, (bounded, independent) in pairs.items()
        )


class Forward(Norm):
    """The result alone."""

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """See `Case.run`."""
        return {"y_TD": self.call(ops, tensors)}

    def structure(self, inputs: Arrays, outputs: Arrays, p: Params) -> Judgement | None:
        """See `Norm.structure`."""
        return structure(outputs, {"y_TD": (inputs["x_TD"].shape, p.dtype)})


class Powers(Forward):
    """Rows whose norm is a power of two."""

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`: entries +-2^k, as many of either sign, so that the mean is 0; odd eighths as weights."""
        s, name = shape(p), f"norm/powers/{self.kind}"
        order = np.argsort(make.words(p.seed, f"{name}/signs", s.tokens, s.width), axis=1, kind="stable")
        signs = np.where(order < s.width // 2, 1.0, -1.0)
        size = 2.0 ** make.integers(p.seed, f"{name}/size", -6, 6, s.tokens, 1)
        weight = (2 * make.integers(p.seed, f"{name}/weight", -8, 7, s.width) + 1) / 8.0
        arrays = {"x_TD": make.store(signs * size, p.dtype), "weight_D": make.store(weight, p.dtype)}
        if self.kind == "layer":
            arrays["bias_D"] = make.store(make.integers(p.seed, f"{name}/bias", -4, 4, s.width), p.dtype)
        return arrays

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`: a root may be off by 2 ulp of float32, which 16 bits do not show."""
        wrong = self.structure(inputs, outputs, p)
        if wrong is not None:
            return wrong
        y = self.expected(inputs).y
        if p.dtype == "float32":
            return merge([judge("y", outputs["y_TD"], y.stored(p.dtype), independent=len(y.value))])
        return merge([exact("y", outputs["y_TD"], make.store(y.value, p.dtype))])


class NanToken(Norm):
    """One token that is NaN, and a NaN in the upstream gradient of another."""

    def presets(self) -> tuple[str, ...]:
        """See `Case.presets`."""
        return ("ling-lite",)

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`."""
        arrays = super().inputs(p)
        x, dy = arrays["x_TD"].copy(), arrays["dy_TD"].copy()
        x[len(x) // 2] = np.nan
        dy[len(x) // 3, 3] = np.nan
        return {**arrays, "x_TD": x, "dy_TD": dy}

    @np.errstate(invalid="ignore")
    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`: the oracle's own NaN are the expected ones."""
        return super().judge(inputs, outputs, p, contract)


class InfiniteToken(Norm):
    """One token that holds an infinity."""

    def presets(self) -> tuple[str, ...]:
        """See `Case.presets`."""
        return ("ling-lite",)

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`."""
        arrays = super().inputs(p)
        at = len(arrays["x_TD"]) // 2
        bad = np.inf if p.seed % 2 else -np.inf
        return {**arrays, "x_TD": make.with_one(arrays["x_TD"], bad, p.seed, "norm/infinite", at)}

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`: what is infinite has no norm; what is beside it is 0 or NaN; other tokens are as ever.

        RMSNorm gives x 0, which is 0 where x is finite; a root by Newton's method is NaN for an infinity. LayerNorm's
        mean is infinite, and the whole row is not a number. The token's own gradient, and those of the parameters,
        may be anything.
        """
        keeps_nonfinite(contract)
        wrong = self.structure(inputs, outputs, p)
        if wrong is not None:
            return wrong
        at = len(inputs["x_TD"]) // 2
        others = np.arange(len(inputs["x_TD"])) != at
        clean = {name: array[others] if name.endswith("_TD") else array for name, array in inputs.items()}
        want, row = self.expected(clean), wide(outputs["y_TD"][at])
        lost = np.isinf(wide(inputs["x_TD"][at])) | (self.kind == "layer")
        admitted = np.where(lost & np.isfinite(row), np.nan, np.where(lost | np.isnan(row), row, 0.0))
        found = [exact("y of the infinite token", outputs["y_TD"][at], admitted)]
        for name, bounded in (("y_TD", want.y), ("dx_TD", want.dx)):
            rows = len(bounded.value)
            found.append(judge(name, outputs[name][others], bounded.stored(p.dtype), independent=rows))
        return merge(found)


class OneToken(Norm):
    """One token."""

    def presets(self) -> tuple[str, ...]:
        """See `Case.presets`."""
        return ("ling-lite",)

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`."""
        return {name: array[:1] if name.endswith("_TD") else array for name, array in super().inputs(p).items()}


class NoTokens(Norm):
    """Zero tokens."""

    def presets(self) -> tuple[str, ...]:
        """See `Case.presets`."""
        return ("ling-lite",)

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`."""
        return {name: array[:0] if name.endswith("_TD") else array for name, array in super().inputs(p).items()}

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`: empty results, and gradients of the parameters that are exactly zero."""
        wrong = self.structure(inputs, outputs, p)
        if wrong is not None:
            return wrong
        return merge(exact(name, array, np.zeros_like(array)) for name, array in sorted(outputs.items()))


class Overflow(Norm):
    """Results and gradients beyond float16."""

    def presets(self) -> tuple[str, ...]:
        """See `Case.presets`."""
        return ("ling-lite",)

    def dtypes(self) -> tuple[str, ...]:
        """See `Case.dtypes`: where a loss is scaled, and the scale is found by what overflows."""
        return ("float16",)

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`: weights of some 16,384; tokens with heavy tails, and one with a small mean square."""
        arrays = super().inputs(p)
        arrays["weight_D"] = make.store(np.asarray(arrays["weight_D"], np.float64) * 2.0**14, p.dtype)
        return arrays

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`: infinite where the bound reaches beyond the dtype, and certainly so beyond it."""
        keeps_nonfinite(contract)
        return super().judge(inputs, outputs, p, contract)


WIDE = Shape(9, 8200, 8)
"""Wider than what 1,024 threads read at a time, and than any published model here (7,168)."""
WHOLE = Shape(9, 4096, 128)
"""As wide as a real model's rows: whole vectors and whole blocks, and nothing beside them."""
_RMS, _LAYER = ("rms_norm",), ("layer_norm",)
_INPUTS = (
    "Heavy tails and outlier channels; one token whose mean square is about epsilon, one of zeros, one near float16's "
    "largest number. "
)
RMS = Norm(
    "norm.rms", "norm", _RMS,
    "RMSNorm and its three gradients. " + _INPUTS + "Local bound (oracle.norms): half the error of a sum of squares, "
    "2 ulp of the root, two products, and half an ulp of storage; the sum in dx is bounded as a product of matrices "
    "is.",
)  # fmt: skip
LAYER = Norm(
    "norm.layer", "norm", _LAYER,
    "LayerNorm and its four gradients. " + _INPUTS + "Every sixth token has a mean of about 50 deviations, where a "
    "variance from mean(x^2) - mean^2 has no digits left. Bound: oracle.norms.layer_norm, which admits two passes and "
    "Welford's update.",
    kind="layer",
)  # fmt: skip
_POWERS = (
    " of rows +-2^k, as many of either sign, epsilon 0: mean and mean square are exact in any order, so the result is "
    "the weight{0}, bit by bit in 16 bits and within 2 ulp of the root in float32."
)
_NAN = (
    "with one token of NaN and one NaN in the upstream gradient of another token: NaN are the results and gradients of "
    "these tokens and the sums over tokens that hold them, and nothing else."
)
_LARGE = "Epsilon is 1e-3, beyond the mean square of a token."
CASES = (
    RMS, LAYER,
    Powers("norm.rms_powers", "norm", _RMS, "RMSNorm" + _POWERS.format(""), eps=0.0),
    Powers("norm.layer_powers", "norm", _LAYER, "LayerNorm" + _POWERS.format(" and the bias"), "layer", 0.0),
    NanToken("norm.rms_nan_token", "norm", _RMS, "As norm.rms, epsilon 1e-6, " + _NAN, eps=1e-6),
    NanToken("norm.layer_nan_token", "norm", _LAYER, "As norm.layer, epsilon 1e-6, " + _NAN, "layer", 1e-6),
    InfiniteToken(
        "norm.rms_infinite", "norm", _RMS,
        "As norm.rms, with an infinity in one token: its own result is NaN, those beside it are 0 or NaN, and no other "
        "token's result or gradient changes.",
    ),
    InfiniteToken(
        "norm.layer_infinite", "norm", _LAYER,
        "As norm.layer, with an infinity in one token, whose whole result is NaN; no other token's result or gradient "
        "changes.", "layer",
    ),
    OneToken("norm.rms_one_token", "norm", _RMS, "As norm.rms with one token, as in decoding."),
    OneToken("norm.layer_one_token", "norm", _LAYER, "As norm.layer with one token, as in decoding.", "layer"),
    Overflow(
        "norm.rms_overflow", "norm", _RMS,
        "RMSNorm with large weights in float16: results and gradients that are too large are infinite, as a loss scale "
        "relies on; the largest number in their place is wrong.",
    ),
    NoTokens("norm.rms_no_tokens", "norm", _RMS, "Zero tokens: gradients of the weight that are exactly zero."),
    NoTokens("norm.layer_no_tokens", "norm", _LAYER, "Zero tokens: zero gradients of weight and bias.", "layer"),
    Strided("norm.rms_strided", Norm("norm.rms", "norm", _RMS, _LARGE, eps=1e-3)),
    Strided("norm.layer_strided", Norm("norm.layer", "norm", _LAYER, _LARGE, "layer", 1e-3)),
    TokenCounts("norm.rms_token_counts", RMS), TokenCounts("norm.layer_token_counts", LAYER),
    Sliced("norm.rms_sliced", RMS), Sliced("norm.layer_sliced", LAYER),
    Shifted("norm.rms_shifted", RMS), Shifted("norm.layer_shifted", LAYER),
    Aligned("norm.rms_aligned", RMS), Aligned("norm.layer_aligned", LAYER),
    Unaligned("norm.rms_unaligned", RMS), Unaligned("norm.layer_unaligned", LAYER),
    Tails("norm.rms_tails", RMS), Tails("norm.layer_tails", LAYER),
    KeptResults("norm.rms_kept", RMS), KeptResults("norm.layer_kept", LAYER),
    Untrained("norm.rms_untrained", RMS, ("y_TD",)), Untrained("norm.layer_untrained", LAYER, ("y_TD",)),
    Many("norm.rms_many", replace(RMS, outliers=False)), Many("norm.layer_many", replace(LAYER, outliers=False)),
    Whole("norm.rms_whole", RMS, of=WHOLE), Whole("norm.layer_whole", LAYER, of=WHOLE),
    Long("norm.rms_long", RMS), Long("norm.layer_long", LAYER),
    Wide("norm.rms_wide", RMS, of=WIDE), Wide("norm.layer_wide", LAYER, of=WIDE),
    Frozen("norm.rms_frozen", RMS),
    Frozen("norm.layer_frozen", LAYER),
)  # fmt: skip
