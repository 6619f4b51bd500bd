# SPDX-License-Identifier: Apache-2.0
"""Gradients between backward and step: clipping by one norm for all, and accumulation over micro-batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hal.contract import Contract
from hal.moe.ops import ExpertWeights
from hal.moe.presets import preset
from hal_conformance import inputs as make
from hal_conformance.case import F64, Arrays, Footprint, Params, arithmetic
from hal_conformance.cases import parameters
from hal_conformance.cases.base import backward, keeps_nonfinite, leaf, observed, shape, wide
from hal_conformance.cases.kept_results import KeptResults
from hal_conformance.cases.parameters import nonfinite
from hal_conformance.cases.strided import Strided
from hal_conformance.cases.tensor_lists import ManyTensors, MixedTensors
from hal_conformance.numerics.chained import Chained
from hal_conformance.numerics.detectors import Finding, exact, judge, merge, structure
from hal_conformance.oracle.accumulation import accumulate, accumulate_chained
from hal_conformance.oracle.clipping import clip_grad_norm
from hal_conformance.oracle.experts import each
from hal_conformance.oracle.layer import ROUTED
from hal_conformance.verdicts import Judgement

if TYPE_CHECKING:
    import torch


class GradientCase(parameters.ParameterCase):
    """Gradients of the parameters."""

    def footprint(self, p: Params) -> Footprint:
        """See `Case.footprint`."""
        size = 4 * parameters.elements(p)
        return Footprint(size, size)


@dataclass(frozen=True)
class Clip(GradientCase):
    """Gradients clipped to a limit.

    Attributes:
        max_norm: the limit.
        scale: of all gradients.
        bad: what one element of the dense gradient is replaced by.
        experts: what the experts' gradients are multiplied by.
    """

    max_norm: float = 1.0
    scale: float = 1.0
    bad: float | None = None
    experts: float = 1.0

    def limit(self, given: Mapping[str, Any]) -> float:
        """Return the limit, from the inputs on either side."""
        return self.max_norm

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`."""
        made = parameters.gradients(p, "clip")
        scales = {name: self.scale * (1.0 if name in parameters.DENSE else self.experts) for name in made}
        scaled = {name: g * scales[name] for name, g in made.items()}
        arrays = parameters.stored("g", scaled, parameters.dtypes(p, "g"))
        if self.bad is not None:
            dense = arrays["g/dense"].copy()
            dense.reshape(-1)[make.integers(p.seed, "clip/bad", 0, dense.size - 1, 1)] = self.bad
            arrays["g/dense"] = dense
        return arrays

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """See `Case.run`."""
        clipped, norm = ops.clip_grad_norm(parameters.listed(tensors, "g", p), self.limit(tensors))
        return observed({"norm": norm, **{f"g/{n}": g for n, g in zip(parameters.shapes(p), clipped, strict=True)}})

    @nonfinite
    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`."""
        if self.bad is not None:
            keeps_nonfinite(contract)
        expected = {"norm": ((), "float32"), **parameters.expected_structure("g", p)}
        wrong = structure(outputs, expected)
        if wrong is not None:
            return wrong
        names = list(parameters.shapes(p))
        norm, clipped = clip_grad_norm(
            [wide(inputs[f"g/{name}"]) for name in names], self.limit(inputs), list(parameters.dtypes(p, "g").values()),
            tensors=parameters.tensors(p),
        )  # fmt: skip
        found = [judge("norm", outputs["norm"], norm)]
        for name, bounded in zip(names, clipped, strict=True):
            got = outputs[f"g/{name}"]
            certain = not bounded.bound.any()
            what = f"gradient of {name}"
            # All are multiplied by one factor: what is rounded depends on the significand alone.
            significands = parameters.distinct(np.frexp(np.abs(wide(inputs[f"g/{name}"])))[0])
            if certain:
                found.append(exact(what, got, bounded.value))
            else:
                found.append(judge(what, got, bounded, independent=significands))
        return merge(found)


@dataclass(frozen=True)
class ClipNear(Clip):
    """A limit beside the norm, so near that only the comparison decides.

    Attributes:
        below: whether the norm lies below the limit.
    """

    below: bool = True

    def limit(self, given: Mapping[str, Any]) -> float:
        """See `Clip.limit`."""
        return float(given["max_norm"])

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`: the limit is a 1024th off the norm, or as much as a product in bfloat16 shows."""
        arrays = super().inputs(p)
        norm = float(np.sqrt((parameters.flat(arrays, "g", p) ** 2).sum()))
        off = 2.0**-10 if self.below else -(2.0**-10 if p.dtype == "float32" else 2.0**-6)
        return {**arrays, "max_norm": np.asarray(norm * (1.0 + off), np.float32)}


TOKENS = (7, 0, 64, 19, 1)
"""Tokens of the micro-batches; one has none, as when all of its labels are masked."""


@dataclass(frozen=True)
class Accumulate(GradientCase):
    """Gradients of micro-batches of different sizes.

    Attributes:
        tokens: of each micro-batch.
    """

    tokens: tuple[int, ...] = TOKENS

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`."""
        arrays: Arrays = {}
        for at in range(len(self.tokens)):
            made = parameters.gradients(p, f"accumulate/{at}")
            arrays |= parameters.stored(f"g{at}", made, parameters.dtypes(p, "g"))
        return arrays

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """See `Case.run`."""
        parts = [parameters.listed(tensors, f"g{at}", p) for at in range(len(self.tokens))]
        total = ops.accumulate_gradients(parts, list(self.tokens))
        return observed({f"total/{name}": g for name, g in zip(parameters.shapes(p), total, strict=True)})

    @nonfinite
    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`."""
        wrong = structure(outputs, parameters.expected_structure(("total",), p))
        if wrong is not None:
            return wrong
        found = []
        for name in parameters.shapes(p):
            parts = [wide(inputs[f"g{at}/{name}"]) for at in range(len(self.tokens))]
            expected = accumulate(parts, self.tokens).stored("float32")
            found.append(judge(f"sum of {name}", outputs[f"total/{name}"], expected))
        return merge(found)


class AccumulateNonfinite(Accumulate):
    """A NaN in the gradients of one micro-batch, and an infinity in those of another."""

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`: in micro-batches that have tokens."""
        arrays = super().inputs(p)
        for name, bad in (("g2/dense", np.nan), ("g0/expert0", np.inf)):
            arrays[name] = make.with_one(arrays[name], bad, p.seed, f"accumulate/{name}/bad")
        return arrays

    @nonfinite
    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`."""
        keeps_nonfinite(contract)
        return super().judge(inputs, outputs, p, contract)


class AccumulateEmpty(Accumulate):
    """A micro-batch without tokens, whose mean loss and gradients are NaN: 0 / 0."""

    def _with(self, arrays: Arrays, value: float) -> Arrays:
        """Return the arrays, those of the micro-batch without tokens full of one number."""
        empty = f"g{self.tokens.index(0)}/"
        return {n: np.full_like(array, value) if n.startswith(empty) else array for n, array in arrays.items()}

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`."""
        return self._with(super().inputs(p), np.nan)

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`: it counts for nothing."""
        return super().judge(self._with(inputs, 0.0), outputs, p, contract)


class MicroBatches(GradientCase):
    """The weight gradients of the experts, from the whole batch and from its micro-batches."""

    SIZES = (64, 32, 16, 16)
    """Rows of the micro-batches. Powers of two, so that the mean over each divides exactly."""

    def presets(self) -> tuple[str, ...]:
        """See `Case.presets`: the one with the fewest experts."""
        return ("mixtral-8x7b",)

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`: rows sorted by expert, and the micro-batch of each; most lack some expert."""
        s, experts, rows = shape(p), preset(p.preset).router.num_experts, sum(self.SIZES)
        expert_R = np.sort(make.integers(p.seed, "micro/expert", 0, experts - 1, rows) ** 2 // experts)
        micro_R = np.repeat(np.arange(len(self.SIZES)), self.SIZES)[make.permutation(p.seed, "micro/batch", rows)]
        x = make.activations(p.seed, "micro/x", rows, s.width) * (np.sqrt(s.width) / make.typical_norm(s.width))
        up, down = (experts, s.hidden, s.width), (experts, s.width, s.hidden)
        return {
            "x_RD": make.store(x, p.dtype),
            "dy_RD": make.store(make.normal(p.seed, "micro/dy", rows, s.width), p.dtype),
            "expert_R": expert_R.astype(np.int64),
            "micro_R": micro_R.astype(np.int64),
            "w1_EFD": make.expert_weights(p.seed, "micro/w1", p.dtype, *up),
            "w3_EFD": make.expert_weights(p.seed, "micro/w3", p.dtype, *up),
            "w2_EDF": make.expert_weights(p.seed, "micro/w2", p.dtype, *down),
        }

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """See `Case.run`."""
        import torch

        experts = preset(p.preset).router.num_experts

        def gradients(rows: torch.Tensor) -> list[torch.Tensor | None]:
            weights = [leaf(tensors[name]) for name in ROUTED]
            counts = torch.bincount(tensors["expert_R"][rows].cpu(), minlength=experts).to(rows.device)
            y = ops.experts(tensors["x_RD"][rows], counts, ExpertWeights(*weights))
            backward(y, tensors["dy_RD"][rows] / len(rows))
            return [w.grad for w in weights]

        micro = tensors["micro_R"]
        parts = [gradients((micro == at).nonzero()[:, 0]) for at in range(len(self.SIZES))]
        whole = gradients(torch.arange(len(micro), device=micro.device))
        total = ops.accumulate_gradients(parts, list(self.SIZES))
        found: dict[str, torch.Tensor | None] = {}
        for at, name in enumerate(ROUTED):
            found |= {f"whole/{name}": whole[at], f"total/{name}": total[at]}
        return observed(found)

    @nonfinite
    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`."""
        kinds = {"whole": p.dtype, "total": "float32"}
        wrong = structure(
            outputs, {f"{kind}/{n}": (inputs[n].shape, dtype) for kind, dtype in kinds.items() for n in ROUTED}
        )
        if wrong is not None:
            return wrong
        micro, everything = inputs["micro_R"], np.arange(sum(self.SIZES))
        parts = [self._gradients(inputs, np.flatnonzero(micro == at), p, contract) for at in range(len(self.SIZES))]
        total = [accumulate_chained([part[at] for part in parts], self.SIZES) for at in range(len(ROUTED))]
        whole = self._gradients(inputs, everything, p, contract)
        # As in `experts.backward`: errors of one expert's gradient share its rows.
        used = len(np.unique(inputs["expert_R"]))
        found: list[Finding] = []
        for name, once, summed in zip(ROUTED, whole, total, strict=True):
            pairs = {
                f"d{name} of the batch": (outputs[f"whole/{name}"], once.bounded(p.dtype)),
                f"d{name} over micro-batches": (outputs[f"total/{name}"], summed.bounded("float32")),
            }
            found += [judge(what, got, expected, independent=used) for what, (got, expected) in pairs.items()]
        return merge(found)

    def _gradients(self, inputs: Arrays, rows: Any, p: Params, contract: Contract) -> list[Chained]:
        """Return the oracle's weight gradients of some rows."""
        experts = preset(p.preset).router.num_experts
        counts = np.bincount(inputs["expert_R"][rows], minlength=experts).astype(np.int64)
        w1, w3, w2 = (inputs[name] for name in ROUTED)
        made = [Chained(np.zeros(w.shape), np.zeros(w.shape)) for w in (w1, w3, w2)]
        dy: F64 = wide(inputs["dy_RD"][rows]) / len(rows)
        for part in each(inputs["x_RD"][rows], counts, (w1, w3, w2), p.dtype, arithmetic(contract, p.dtype)):
            gradients = part.inside.backward(Chained.exact(dy[part.rows])).weights
            for whole, gradient in zip(made, gradients, strict=True):
                whole[part.experts] = gradient
        return made


_CLIP = ("clip_grad_norm",)
CLIP = Clip(
    "gradients.clip_above", "gradients", _CLIP,
    "Clipping to a norm far below the gradients': min(1, limit / (norm + 1e-6)) with one norm over dense and "
    "expert gradients together, though the experts' are 64 times larger (Megatron-LM PR#5916 left them out). "
    "Bound: the sum of positive squares in any order, halved by the root, and the roundings of factor and "
    "product (oracle.clipping).",
)  # fmt: skip
ACCUMULATE = Accumulate(
    "gradients.accumulate", "gradients", ("accumulate_gradients",),
    "Gradients of micro-batches with 7, 0, 64, 19 and 1 tokens, weighted by their tokens, added up in float32. A "
    "mean over micro-batches, or a sum in bfloat16, is another number. Bound: (k + 2) u sum |w g|.",
)  # fmt: skip
CASES = (
    CLIP,
    Clip(
        "gradients.clip_dense", "gradients", _CLIP,
        "As gradients.clip_above, with experts' gradients so small that the norm is that of the dense ones alone: an "
        "experts' of 64 times their size hides that theirs is rounded.",
        experts=2.0**-12,
    ),
    Clip(
        "gradients.clip_small", "gradients", _CLIP,
        "As gradients.clip_above, with gradients and a limit so small that the epsilon of 1e-6 counts.",
        scale=2.0**-20, max_norm=1e-5,
    ),
    Clip(
        "gradients.clip_below", "gradients", _CLIP,
        "A limit above the norm: the factor is exactly 1 and every gradient comes back bit by bit.",
        max_norm=1e6,
    ),
    Clip(
        "gradients.clip_unlimited", "gradients", _CLIP,
        "A limit of infinity, as where only the norm is asked for: every gradient comes back bit by bit.",
        max_norm=np.inf,
    ),
    MixedTensors("gradients.clip_mixed", CLIP),
    Clip(
        "gradients.clip_zero", "gradients", _CLIP,
        "All gradients zero: the norm is 0, nothing is divided by it, and zeros come back.", scale=0.0,
    ),
    Clip(
        "gradients.clip_to_nothing", "gradients", _CLIP,
        "A limit of zero, which is a limit: every gradient becomes zero.", max_norm=0.0,
    ),
    Clip(
        "gradients.clip_nan", "gradients", _CLIP,
        "One NaN among the gradients: the norm is NaN and so is every clipped gradient, as torch does it; a NaN that "
        "is dropped would hide a broken step.", bad=np.nan,
    ),
    Clip(
        "gradients.clip_infinite", "gradients", _CLIP,
        "One infinity among the gradients: the norm is infinite and the factor 0, so that finite gradients become 0 "
        "and the infinite one NaN, as torch does it.", bad=np.inf,
    ),
    ClipNear(
        "gradients.clip_just_below", "gradients", _CLIP,
        "A limit 0.1 % above the norm: every gradient comes back bit by bit, all the same.",
    ),
    ClipNear(
        "gradients.clip_just_above", "gradients", _CLIP,
        "A limit 0.1 % below the norm (1.6 % in bfloat16, so that products show it): every gradient is scaled.",
        below=False,
    ),
    ManyTensors("gradients.clip_many", CLIP),
    Strided("gradients.clip_strided", CLIP),
    KeptResults("gradients.clip_kept", CLIP),
    ACCUMULATE,
    Accumulate(
        "gradients.accumulate_one", "gradients", ("accumulate_gradients",),
        "One micro-batch, which is the whole batch.", (7,),
    ),
    Accumulate(
        "gradients.accumulate_17", "gradients", ("accumulate_gradients",),
        "As gradients.accumulate with 17 micro-batches, each of which has a share that shows; the larger ones have "
        "more tokens than an integer of 15 or 16 bits counts.",
        tuple(range(17 * 4099, 0, -4099)),
    ),
    MixedTensors("gradients.accumulate_mixed", ACCUMULATE),
    ManyTensors("gradients.accumulate_many", ACCUMULATE),
    Strided("gradients.accumulate_strided", ACCUMULATE),
    KeptResults("gradients.accumulate_kept", ACCUMULATE),
    AccumulateNonfinite(
        "gradients.accumulate_nonfinite", "gradients", ("accumulate_gradients",),
        "As gradients.accumulate with one NaN in one micro-batch and one infinity in another: their elements of the "
        "sum are NaN and infinite, and no other. What is dropped would hide a broken micro-batch.",
    ),
    AccumulateEmpty(
        "gradients.accumulate_empty", "gradients", ("accumulate_gradients",),
        "As gradients.accumulate, where the gradients of the micro-batch without tokens are NaN, as a mean over no "
        "tokens is: they are not multiplied by 0, but left out.",
    ),
    MicroBatches(
        "gradients.micro_batches", "gradients", ("experts", "accumulate_gradients"),
        "Weight gradients of the experts from the whole batch, and the sum over four micro-batches of different "
        "sizes in which some experts have no rows: both around one oracle, each within its own chained bound "
        "(oracle.experts, oracle.accumulation).",
    ),
)  # fmt: skip
