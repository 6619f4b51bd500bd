# SPDX-License-Identifier: Apache-2.0
"""The router's losses, value and gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from hal.contract import Contract
from hal.moe.presets import preset
from hal.moe.router_spec import RouterSpec
from hal_conformance import inputs as make
from hal_conformance.case import Arrays, Params
from hal_conformance.cases.base import (
    At,
    Base,
    Shape,
    gate_storage,
    keeps_nonfinite,
    leaf,
    loss_backward,
    observed,
    part,
    shape,
)
from hal_conformance.cases.kept_graph import KeptGraph
from hal_conformance.cases.kept_results import KeptResults
from hal_conformance.cases.narrow import Int32, SmallIntegers
from hal_conformance.cases.nonfinite import admitted
from hal_conformance.cases.sized import FEW_EXPERTS, Aligned, Long, Many, TokenCounts
from hal_conformance.cases.strided import Shifted, Sliced, Strided
from hal_conformance.cases.tails import Tails
from hal_conformance.cases.untrained import Untrained
from hal_conformance.cases.wrapped import Wrapped
from hal_conformance.numerics.bounds import Bounded
from hal_conformance.numerics.detectors import exact, joined, judge, merge, structure
from hal_conformance.oracle.losses import aux_loss, z_loss
from hal_conformance.verdicts import Judgement

if TYPE_CHECKING:
    import torch


UPSTREAM = 4.0
"""Gradient of each loss, as a coefficient or a scaled loss gives it: code that takes it for 1 is wrong."""

SMALL = float(np.float32(5.1234567e-5))
"""One of a small coefficient and many micro-batches: 24 bits, and below what float16 has normal numbers for."""


def tokens_of(p: Params) -> int:
    """Return more tokens than elsewhere: losses are cheap, and those that are summed in chunks need some."""
    if isinstance(p, At):
        return shape(p).tokens
    return 4 * shape(p).tokens + 1


KINDS = ("ling-lite", "ling-2.0-mini")
"""One softmax, one sigmoid."""

VANISHING = 1e-20
"""Sum of the scores of a token that the epsilon beside it halves."""


@dataclass(frozen=True)
class Loss(Base):
    """One loss and its gradient.

    Attributes:
        upstream: gradient of the loss.
    """

    upstream: float = UPSTREAM

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`."""
        raise NotImplementedError

    def names(self, inputs: Mapping[str, Any]) -> tuple[str, ...]:
        """See `frozen.Trainable`."""
        raise NotImplementedError

    def call(self, ops: Any, tensors: Mapping[str, torch.Tensor], p: Params) -> torch.Tensor:
        """Return the loss."""
        raise NotImplementedError

    def there_and_back(
        self, ops: Any, tensors: Mapping[str, torch.Tensor], p: Params, factor: float = 1.0
    ) -> dict[str, torch.Tensor]:
        """See `frozen.Trainable`."""
        loss = self.call(ops, tensors, p)
        loss_backward(loss, self.upstream * factor, tensors[self.names(tensors)[0]])
        return {"loss": loss}

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """See `Case.run`."""
        leaves = {name: leaf(tensors[name]) for name in self.names(tensors)}
        found = self.there_and_back(ops, {**tensors, **leaves}, p)
        return observed({**found, **{f"d{name}": tensor.grad for name, tensor in leaves.items()}})

    def expected(self, inputs: Arrays, p: Params) -> tuple[Bounded, Bounded]:
        """Return the loss and its gradient, as they are stored."""
        raise NotImplementedError

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`."""
        wrong = self.structure(inputs, outputs, p)
        if wrong is not None:
            return wrong
        (name,), (value, gradient) = self.names(inputs), self.expected(inputs, p)
        return merge([judge("loss", outputs["loss"], value), judge(f"d{name}", outputs[f"d{name}"], gradient)])

    def structure(self, inputs: Arrays, outputs: Arrays, p: Params) -> Judgement | None:
        """See `frozen.Trainable`."""
        gradients = {f"d{name}": (inputs[name].shape, str(inputs[name].dtype)) for name in self.names(inputs)}
        return structure(outputs, {"loss": ((), "float32"), **gradients})


class Aux(Loss):
    """The balance loss."""

    def router(self, p: Params) -> RouterSpec:
        """Return the router's equations."""
        return preset(p.preset).router

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`: scores that look like softmax or sigmoid outputs, made without a device.

        Of sigmoids, one token has scores of zero throughout, and another all but one.
        """
        # More than 1,024, of which the hot expert has half: its count has more bits than bfloat16.
        spec, tokens = self.router(p), 1024 + tokens_of(p)
        raw = make.normal(p.seed, "aux/scores", tokens, spec.num_experts)
        scores = 1.0 / (1.0 + raw**2 * 4.0)  # in (0, 1], skewed; rounded to float32 below, so exact bits are kept
        if spec.score == "softmax":
            total = np.zeros((tokens, 1))
            for e in range(spec.num_experts):  # in order: numpy's own sum depends on the host
                total += scores[:, e : e + 1]
            scores = scores / total
        else:
            scores[-2:] = 0
            scores[-1, 0] = VANISHING
        experts = make.choices(p.seed, "aux", tokens, spec.num_experts, spec.top_k)
        return {"scores_TE": make.store(scores, "float32"), "experts_TK": experts}

    def dtypes(self) -> tuple[str, ...]:
        """See `Case.dtypes`: scores are float32 whatever the model's dtype."""
        return ("float32",)

    def names(self, inputs: Mapping[str, Any]) -> tuple[str, ...]:
        """See `Loss.names`."""
        return ("scores_TE",)

    def call(self, ops: Any, tensors: Mapping[str, torch.Tensor], p: Params) -> torch.Tensor:
        """See `Loss.call`."""
        loss: torch.Tensor = ops.aux_loss(tensors["scores_TE"], tensors["experts_TK"], self.router(p))
        return loss

    def expected(self, inputs: Arrays, p: Params) -> tuple[Bounded, Bounded]:
        """See `Loss.expected`."""
        value, dscores = aux_loss(inputs["scores_TE"], inputs["experts_TK"], self.router(p))
        return value, dscores.scaled(self.upstream)


class AuxOfOneChoice(Aux):
    """The balance loss of one choice for each token: a division by K is none."""

    def presets(self) -> tuple[str, ...]:
        """See `Case.presets`."""
        return KINDS

    def router(self, p: Params) -> RouterSpec:
        """See `Aux.router`."""
        return replace(super().router(p), top_k=1)


BEYOND_EXP = 200.0
"""exp(200) is infinite and exp(-200) zero in float32: the maximum has to be subtracted first, in both passes."""


class Z(Loss):
    """The z-loss."""

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`: logits as they occur, as before a spike, and beyond what exp can take."""
        spec = preset(p.preset).router
        logits = make.normal(p.seed, "z/logits", tokens_of(p), spec.num_experts) * 3.0
        logits[::7] += 20.0  # as before a spike
        logits[1] += BEYOND_EXP
        logits[2] -= BEYOND_EXP
        return {"logits_TE": make.store(logits, gate_storage(spec, p))}

    def names(self, inputs: Mapping[str, Any]) -> tuple[str, ...]:
        """See `Loss.names`."""
        return ("logits_TE",)

    def call(self, ops: Any, tensors: Mapping[str, torch.Tensor], p: Params) -> torch.Tensor:
        """See `Loss.call`."""
        loss: torch.Tensor = ops.z_loss(tensors["logits_TE"])
        return loss

    def expected(self, inputs: Arrays, p: Params) -> tuple[Bounded, Bounded]:
        """See `Loss.expected`."""
        value, dlogits = z_loss(inputs["logits_TE"])
        return value, dlogits.scaled(self.upstream).stored(gate_storage(preset(p.preset).router, p))


@dataclass(frozen=True)
class Nonfinite(Wrapped):
    """A loss of 64 tokens of which one has a NaN, and of 64 of which one has an infinity."""

    inner: Loss

    BAD = 3
    """The token."""

    @property
    def what(self) -> str:
        """See `Case.what`."""
        return (
            f"As {self.inner.name}, of 64 tokens, twice: with a NaN among one token's numbers, and with an infinity. "
            "The loss is NaN, or infinite (NaN is right, too), so that a training loop sees it. The gradients of all "
            "other tokens, which do not depend on that one, are as ever; its own are not judged."
        )

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`: the number is that of an expert that has tokens."""
        few = At(p.preset, p.dtype, p.scale, p.seed, Shape(64, 0, 0))
        arrays = {name: array[-64:] for name, array in super().inputs(few).items()}
        (name,) = self.inner.names(arrays)
        expert = arrays["experts_TK"][self.BAD, 0] if "experts_TK" in arrays else 1
        for how in ("nan", "inf"):
            arrays[how] = arrays[name].copy()
            arrays[how][self.BAD, expert] = float(how)
        return arrays

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """See `Case.run`."""
        (name,) = self.inner.names(tensors)
        found = {how: self.inner.run(ops, {**tensors, name: tensors[how]}, p) for how in ("nan", "inf")}
        return {f"{how}/{name}": tensor for how, outputs in found.items() for name, tensor in outputs.items()}

    @np.errstate(all="ignore")
    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`."""
        keeps_nonfinite(contract)
        return joined({how: self.judge_one(inputs, part(outputs, how), p, how) for how in ("nan", "inf")})

    def judge_one(self, inputs: Arrays, outputs: Arrays, p: Params, how: str) -> Judgement:
        """Judge one of the two."""
        wrong = self.inner.structure(inputs, outputs, p)
        if wrong is not None:
            return wrong
        (name,), (_, gradient) = self.inner.names(inputs), self.inner.expected(inputs, p)
        loss = admitted(np.asarray(float(how)), outputs["loss"], Contract())
        others = np.arange(len(inputs[name])) != self.BAD
        expected = Bounded(*(side[others] for side in (gradient.value, gradient.bound, gradient.var)))
        return merge([
            exact("loss", outputs["loss"], loss), judge(f"d{name}", outputs[f"d{name}"][others], expected),
        ])  # fmt: skip


class NoTokens(Base):
    """Both losses of zero tokens."""

    def presets(self) -> tuple[str, ...]:
        """See `Case.presets`."""
        return KINDS

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`."""
        spec = preset(p.preset).router
        empty = np.zeros((0, spec.num_experts))
        return {
            "scores_TE": make.store(empty, "float32"),
            "logits_TE": make.store(empty, gate_storage(spec, p)),
            "experts_TK": np.zeros((0, spec.top_k), np.int64),
        }

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """See `Case.run`."""
        scores, logits = leaf(tensors["scores_TE"]), leaf(tensors["logits_TE"])
        aux, z = ops.aux_loss(scores, tensors["experts_TK"], preset(p.preset).router), ops.z_loss(logits)
        for loss in (aux, z):
            if getattr(loss, "requires_grad", True):  # a constant is right, too
                loss_backward(loss, 1.0, logits)
        return observed({"aux_loss": aux, "z_loss": z})

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`."""
        losses = dict.fromkeys(("aux_loss", "z_loss"), ((), "float32"))
        wrong = structure(outputs, losses)
        return wrong or merge(exact(name, outputs[name], np.zeros((), np.float32)) for name in losses)


AUX = Aux(
    "losses.aux", "losses", ("aux_loss",),
    "The balance loss E / (K T) sum_e count_e mean_t p_te and its gradient, for an upstream gradient "
    "that is not 1; the coefficient is not applied. Of sigmoids, one token's scores are all zero, where 1e-20 "
    "beside their sum keeps 0 / 0 away, and another's are of the size of that 1e-20.",
)  # fmt: skip
Z_LOSS = Z(
    "losses.z", "losses", ("z_loss",),
    "mean_t logsumexp(logits_t)^2 in float32 and its gradient, for logits in the gate's dtype; a seventh of the "
    "rows as large as before a spike, one around +200 and one around -200, where exp has no finite result; for an "
    "upstream gradient that is not 1.",
)  # fmt: skip
_SMALL_AUX = "losses", ("aux_loss",), "As losses.aux, for an upstream gradient of 5e-5, which is not rounded."
_SMALL_Z = "losses", ("z_loss",), "As losses.z, for an upstream gradient of 5e-5, which is not rounded."
CASES = (
    AUX,
    Z_LOSS,
    AuxOfOneChoice("losses.aux_one_choice", "losses", ("aux_loss",), "As losses.aux with K = 1."),
    NoTokens(
        "losses.no_tokens", "losses", ("aux_loss", "z_loss"),
        "Zero tokens: both losses are 0, not 0 / 0, and a backward pass from them does not fail.",
    ),
    Wrapped("losses.aux_small_upstream", Aux("losses.aux", *_SMALL_AUX, upstream=SMALL), only=KINDS),
    Wrapped("losses.z_small_upstream", Z("losses.z", *_SMALL_Z, upstream=SMALL), only=FEW_EXPERTS),
    Aligned("losses.aligned_aux", AUX, only=KINDS),
    Aligned("losses.aligned_z", Z_LOSS),
    Long("losses.long_aux", AUX, only=FEW_EXPERTS),
    Many("losses.many_aux", AUX, only=FEW_EXPERTS),
    Many("losses.many_z", Z_LOSS, only=FEW_EXPERTS),
    Long("losses.long_z", Z_LOSS, only=FEW_EXPERTS),
    Tails("losses.aux_tails", AUX, only=FEW_EXPERTS),
    Tails("losses.z_tails", Z_LOSS, only=FEW_EXPERTS),
    KeptResults("losses.aux_kept", AUX, only=FEW_EXPERTS),
    KeptResults("losses.z_kept", Z_LOSS, only=FEW_EXPERTS),
    Untrained("losses.aux_untrained", AUX, ("loss",), only=KINDS),
    Untrained("losses.z_untrained", Z_LOSS, ("loss",), only=FEW_EXPERTS),
    KeptGraph("losses.aux_kept_graph", AUX, only=KINDS),
    KeptGraph("losses.z_kept_graph", Z_LOSS, only=FEW_EXPERTS),
    Int32("losses.aux_int32", AUX, only=FEW_EXPERTS),
    SmallIntegers("losses.aux_small_integers", AUX, only=FEW_EXPERTS),
    Nonfinite("losses.aux_nonfinite", AUX, only=KINDS),
    Nonfinite("losses.z_nonfinite", Z_LOSS, only=FEW_EXPERTS),
    Strided("losses.aux_strided", AUX, only=FEW_EXPERTS),
    Shifted("losses.aux_shifted", AUX, only=FEW_EXPERTS),
    Shifted("losses.z_shifted", Z_LOSS, only=FEW_EXPERTS),
    Sliced("losses.aux_sliced", AUX, only=FEW_EXPERTS),
    Strided("losses.z_strided", Z_LOSS, only=FEW_EXPERTS),
    Sliced("losses.z_sliced", Z_LOSS, only=FEW_EXPERTS),
    TokenCounts("losses.aux_token_counts", AUX, only=FEW_EXPERTS),
    TokenCounts("losses.z_token_counts", Z_LOSS, only=FEW_EXPERTS),
)  # fmt: skip
