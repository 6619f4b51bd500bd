# SPDX-License-Identifier: Apache-2.0
"""The router's losses, value and gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from hal.contract import Contract
from hal.moe.presets import preset
from hal_conformance import inputs as make
from hal_conformance.case import Arrays, Params
from hal_conformance.cases.base import At, Base, gate_storage, leaf, loss_backward, observed, shape, wide
from hal_conformance.cases.kept_results import KeptResults
from hal_conformance.cases.sized import FEW_EXPERTS, Aligned, Long
from hal_conformance.cases.tails import Tails
from hal_conformance.detectors import exact, judge, merge, structure
from hal_conformance.oracle.losses import aux_loss, z_loss
from hal_conformance.verdicts import Judgement

if TYPE_CHECKING:
    import torch


UPSTREAM = 4.0
"""Gradient of each loss, as a coefficient or a scaled loss gives it: code that takes it for 1 is wrong."""


def tokens_of(p: Params) -> int:
    """Return more tokens than elsewhere: losses are cheap, and those that are summed in chunks need some."""
    if isinstance(p, At):
        return shape(p).tokens
    return 4 * shape(p).tokens + 1


VANISHING = 1e-20
"""Sum of the scores of a token that the epsilon beside it halves."""


class Aux(Base):
    """The balance loss."""

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`: scores that look like softmax or sigmoid outputs, made without a device.

        Of sigmoids, one token has scores of zero throughout, and another all but one.
        """
        # More than 1,024, of which the hot expert has half: its count has more bits than bfloat16.
        spec, tokens = preset(p.preset).router, 1024 + tokens_of(p)
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

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """See `Case.run`."""
        scores = leaf(tensors["scores_TE"])
        loss = ops.aux_loss(scores, tensors["experts_TK"], preset(p.preset).router)
        loss_backward(loss, UPSTREAM, scores)
        return observed({"loss": loss, "dscores_TE": scores.grad})

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`."""
        spec = preset(p.preset).router
        scores = wide(inputs["scores_TE"])
        wrong = structure(outputs, {"loss": ((), "float32"), "dscores_TE": (scores.shape, "float32")})
        if wrong is not None:
            return wrong
        value, dscores = aux_loss(scores, inputs["experts_TK"], spec)
        dscores = dscores.scaled(UPSTREAM)
        return merge([judge("loss", outputs["loss"], value), judge("dscores", outputs["dscores_TE"], dscores)])


BEYOND_EXP = 200.0
"""exp(200) is infinite and exp(-200) zero in float32: the maximum has to be subtracted first, in both passes."""


class Z(Base):
    """The z-loss."""

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`: logits as they occur, as before a spike, and beyond what exp can take."""
        spec = preset(p.preset).router
        logits = make.normal(p.seed, "z/logits", tokens_of(p), spec.num_experts) * 3.0
        logits[::7] += 20.0  # as before a spike
        logits[1] += BEYOND_EXP
        logits[2] -= BEYOND_EXP
        return {"logits_TE": make.store(logits, gate_storage(spec, p))}

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """See `Case.run`."""
        logits = leaf(tensors["logits_TE"])
        loss = ops.z_loss(logits)
        loss_backward(loss, UPSTREAM, logits)
        return observed({"loss": loss, "dlogits_TE": logits.grad})

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`."""
        x, storage = inputs["logits_TE"], gate_storage(preset(p.preset).router, p)
        wrong = structure(outputs, {"loss": ((), "float32"), "dlogits_TE": (x.shape, storage)})
        if wrong is not None:
            return wrong
        value, dlogits = z_loss(x)
        dlogits = dlogits.scaled(UPSTREAM).stored(storage)
        return merge([judge("loss", outputs["loss"], value), judge("dlogits", outputs["dlogits_TE"], dlogits)])


class NoTokens(Base):
    """Both losses of zero tokens."""

    def presets(self) -> tuple[str, ...]:
        """See `Case.presets`: one softmax, one sigmoid."""
        return ("ling-lite", "ling-2.0-mini")

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
CASES = (
    AUX,
    Z_LOSS,
    NoTokens(
        "losses.no_tokens", "losses", ("aux_loss", "z_loss"),
        "Zero tokens: both losses are 0, not 0 / 0, and a backward pass from them does not fail.",
    ),
    Aligned("losses.aligned_aux", AUX, only=("ling-lite", "ling-2.0-mini")),
    Aligned("losses.aligned_z", Z_LOSS),
    Long("losses.long_aux", AUX, only=FEW_EXPERTS),
    Long("losses.long_z", Z_LOSS, only=FEW_EXPERTS),
    Tails("losses.aux_tails", AUX, only=FEW_EXPERTS),
    Tails("losses.z_tails", Z_LOSS, only=FEW_EXPERTS),
    KeptResults("losses.aux_kept", AUX, only=FEW_EXPERTS),
    KeptResults("losses.z_kept", Z_LOSS, only=FEW_EXPERTS),
)  # fmt: skip
