# SPDX-License-Identifier: Apache-2.0
"""The router's losses, value and gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from hal.contract import Contract
from hal.moe.presets import preset
from hal_conformance import inputs as make
from hal_conformance.bounds import EXP, U32, Bounded, positive_sum
from hal_conformance.budget import level
from hal_conformance.case import Arrays, Params
from hal_conformance.cases.base import Base, shape, wide
from hal_conformance.detectors import judge, merge, structure
from hal_conformance.verdicts import Judgement

if TYPE_CHECKING:
    import torch

MEGATRON_EPSILON = 1e-20


class Aux(Base):
    """The balance loss."""

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`: scores that look like softmax or sigmoid outputs, made without a device."""
        spec, s = preset(p.preset).router, shape(p)
        raw = make.normal(p.seed, "aux/scores", s.tokens, spec.num_experts)
        scores = 1.0 / (1.0 + raw**2 * 4.0)  # in (0, 1], skewed; rounded to float32 below, so exact bits are kept
        if spec.score == "softmax":
            total = np.zeros((s.tokens, 1))
            for e in range(spec.num_experts):  # in order: numpy's own sum depends on the host
                total += scores[:, e : e + 1]
            scores = scores / total
        experts = make.choices(p.seed, "aux", s.tokens, spec.num_experts, spec.top_k)
        return {"scores_TE": make.store(scores, "float32"), "experts_TK": experts}

    def dtypes(self) -> tuple[str, ...]:
        """See `Case.dtypes`: scores are float32 whatever the model's dtype."""
        return ("float32",)

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """See `Case.run`."""
        scores = tensors["scores_TE"].clone().requires_grad_()
        loss = ops.aux_loss(scores, tensors["experts_TK"], preset(p.preset).router)
        loss.backward()
        assert scores.grad is not None
        return {"loss": loss.detach(), "dscores_TE": scores.grad}

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`.

        Value: every term is positive, so relative errors add: normalising (a sum over E, a division), the mean
        over T, the
        product, the sum over E. Gradient: c_e / T for softmax; through the normalisation (c_e - sum_j c_j p_j) /
        (T S), whose
        rounding errors are relative to c_e + sum_j c_j p_j because the difference cancels.
        """
        spec = preset(p.preset).router
        scores = wide(inputs["scores_TE"])
        wrong = structure(outputs, {"loss": ((), "float32"), "dscores_TE": (scores.shape, "float32")})
        if wrong is not None:
            return wrong
        tokens, experts = scores.shape
        at = level(scores.size)
        counts = np.bincount(inputs["experts_TK"].reshape(-1), minlength=experts)
        share = counts * (experts / (spec.top_k * tokens))
        relative, normal, p_TE = 4 * U32, np.ones((tokens, 1)), scores
        if spec.score == "sigmoid":
            normal = scores.sum(1, keepdims=True) + MEGATRON_EPSILON
            p_TE = scores / normal
            relative = relative + 4 * U32 + float(positive_sum(normal[:, 0], scores, 1, at).max())
        columns = p_TE.mean(0)
        relative = relative + float(positive_sum(p_TE.sum(0), p_TE, 0, at).max())
        loss = np.asarray(float(share @ columns))
        summed = float(positive_sum(loss, share * columns, 0, at))
        value = Bounded.deterministic(loss, np.abs(loss) * (relative + summed)).stored("float32")
        if spec.score == "softmax":
            gradient = np.broadcast_to(share / tokens, scores.shape)
            size = gradient
        else:
            mean = (share * p_TE).sum(1, keepdims=True)
            gradient = (share - mean) / (tokens * normal)
            size = (share + mean) / (tokens * normal)
            relative = relative + float(positive_sum(mean[:, 0], share * p_TE, 1, at).max())
        dscores = Bounded.deterministic(gradient, size * (relative + 4 * U32)).stored("float32")
        return merge([judge("loss", outputs["loss"], value), judge("dscores", outputs["dscores_TE"], dscores)])


class Z(Base):
    """The z-loss."""

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`."""
        spec, s = preset(p.preset).router, shape(p)
        logits = make.normal(p.seed, "z/logits", s.tokens, spec.num_experts) * 3.0
        logits[::7] += 20.0  # as before a spike
        return {"logits_TE": make.store(logits, "float32")}

    def dtypes(self) -> tuple[str, ...]:
        """See `Case.dtypes`: computed in float32."""
        return ("float32",)

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """See `Case.run`."""
        logits = tensors["logits_TE"].clone().requires_grad_()
        loss = ops.z_loss(logits)
        loss.backward()
        assert logits.grad is not None
        return {"loss": loss.detach(), "dlogits_TE": logits.grad}

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`.

        L = m + log sum exp(x - m) has the absolute error e = the p-weighted relative errors of exp, the
        summation's, 2 ulp of log,
        and a rounding of L. L^2 has 2 |L| e + u L^2; the mean adds a sum of positive terms. The gradient 2 L p /
        T has e / |L|,
        p's own error twice over (its own and the sum's), and four roundings.
        """
        x = wide(inputs["logits_TE"])
        wrong = structure(outputs, {"loss": ((), "float32"), "dlogits_TE": (x.shape, "float32")})
        if wrong is not None:
            return wrong
        tokens, at = len(x), level(x.size)
        top = x.max(1, keepdims=True)
        d = top - x
        e = np.exp(-d)
        total = e.sum(1, keepdims=True)
        p_TE = e / total
        log = np.log(total)
        lse = top + log
        eps = EXP + 3.0 * U32 * d
        common = (p_TE * eps).sum(1, keepdims=True) + positive_sum(total[:, 0], e, 1, at)[:, None]
        error = common + 4.0 * U32 * np.abs(log) + U32 * np.abs(lse)
        squares = lse[:, 0] ** 2
        loss = np.asarray(squares.mean())
        own = (2.0 * np.abs(lse[:, 0]) * error[:, 0] + 2.0 * U32 * squares).mean()
        summed = float(positive_sum(squares.sum(), squares, 0, at)) + 2.0 * U32
        value = Bounded.deterministic(loss, own + loss * summed).stored("float32")
        gradient = 2.0 * lse * p_TE / tokens
        bound = 2.0 * p_TE / tokens * (error + np.abs(lse) * (eps + common + error + 6.0 * U32 + U32 * np.abs(lse)))
        dlogits = Bounded.deterministic(gradient, bound).stored("float32")
        return merge([judge("loss", outputs["loss"], value), judge("dlogits", outputs["dlogits_TE"], dlogits)])


CASES = (
    Aux(
        "losses.aux", "losses", ("aux_loss",),
        "The balance loss E / (K T) sum_e count_e mean_t p_te and its gradient; the coefficient is not applied.",
    ),
    Z(
        "losses.z", "losses", ("z_loss",),
        "mean_t logsumexp(logits_t)^2 and its gradient, a fifth of the rows as large as before a spike.",
    ),
)  # fmt: skip
