# SPDX-License-Identifier: Apache-2.0
"""What the router's losses of a batch have to do with those of its parts: micro-batches, padding, partitions.

What follows from the equations, and what does not:
  - Both are means over tokens of which the order does not matter.
  - The z-loss is one mean: that of a batch is the mean of its micro-batches', weighted by their tokens.
  - The balance loss is the product of two means, E / K sum_e (count_e / T) (sum_t p_te / T): linear in the counts and
    linear in the probabilities, but not additive over micro-batches. With m parts of equal size it is the mean over all
    m * m pairs of the loss of one part's scores under another part's routing.
  - `MoEOps` has no mask: a caller leaves padding out. Tokens that add nothing to the sums still count in T: those whose
    logsumexp is 0, and those whose scores are all 0 and whose routing repeats that of the others.

What the interface cannot express: a mask; counts or sums of probabilities of other ranks (so parts of unequal size have
no balance loss together, nor has a rank that holds some of the experts); the number of tokens of the whole batch. Who
wants these has to gather scores and routing first.

Legend: T tokens, E experts, K choices, m parts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hal.contract import Contract
from hal.moe.presets import preset
from hal_conformance import inputs as make
from hal_conformance.case import F64, I64, Array, Arrays, Params
from hal_conformance.cases.base import (
    At,
    Base,
    Shape,
    gate_storage,
    keeps_nonfinite,
    leaf,
    loss_backward,
    observed,
    wide,
)
from hal_conformance.cases.losses import AUX, UPSTREAM, Z_LOSS
from hal_conformance.numerics.bounds import Bounded
from hal_conformance.numerics.detectors import judge, merge, structure
from hal_conformance.oracle.losses import aux_loss, z_loss
from hal_conformance.verdicts import Judgement

if TYPE_CHECKING:
    import torch

TOKENS = 128
MICRO = (64, 32, 16, 8, 4, 2, 1, 1, 0)
"""Tokens of the micro-batches. Each share of the whole is a power of two, which rounds nothing; one has no token."""

PARTS = 4
"""Parts of equal size, of which every one's scores meet every one's routing."""


Both = tuple[Bounded, Bounded]
"""A loss and its gradient."""


def micro(array: Any) -> list[Any]:
    """Return the rows of each micro-batch."""
    ends = np.cumsum(MICRO)
    return [array[int(end - n) : int(end)] for end, n in zip(ends, MICRO, strict=True)]


def there_and_back(
    loss_of: Callable[[torch.Tensor], torch.Tensor], given: torch.Tensor, upstream: float = UPSTREAM
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss of some tokens and its gradient; zeros, where a loss of no tokens is a constant."""
    x = leaf(given)
    loss = loss_of(x)
    if getattr(loss, "requires_grad", True):
        loss_backward(loss, upstream, x)
    return loss, x.new_zeros(x.shape) if x.grad is None else x.grad


def joined(parts: Sequence[Both]) -> Both:
    """Return the losses of several calls, [calls], and their gradients, one below the other."""

    def join(at: int, how: Callable[..., F64]) -> Bounded:
        return Bounded(*(how([getattr(part[at], name) for part in parts]) for name in ("value", "bound", "var")))

    return join(0, np.stack), join(1, np.concatenate)


def nothing(gradient: Array) -> Both:
    """Return the loss of no tokens."""
    return Bounded.exact(np.zeros(())), Bounded.exact(np.zeros(gradient.shape))


class LossParts(Base):
    """A loss of a whole and of what it is made of."""

    def presets(self) -> tuple[str, ...]:
        """See `Case.presets`: softmax and sigmoid, many experts and few; gates of both dtypes."""
        return ("ling-lite", "ling-2.0-mini", "mixtral-8x7b")


class AuxCase(LossParts):
    """Parts of the balance loss."""

    def dtypes(self) -> tuple[str, ...]:
        """See `Case.dtypes`: scores are float32 whatever the model's dtype."""
        return ("float32",)

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`: the last tokens of losses.aux, and an order in which they are split up."""
        made = AUX.inputs(At(p.preset, p.dtype, p.scale, p.seed, Shape(1, 0, 0)))
        arrays = {name: array[-TOKENS:] for name, array in made.items()}
        return {**arrays, "order_T": make.permutation(p.seed, "loss_parts/order", TOKENS)}


class AuxParts(AuxCase):
    """The balance loss of four parts, each one's scores under each one's routing; and of micro-batches."""

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """See `Case.run`."""
        import torch

        spec = preset(p.preset).router
        mixed, routed = (tensors[name][tensors["order_T"]] for name in ("scores_TE", "experts_TK"))

        def one(scores: torch.Tensor, experts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return there_and_back(lambda x: ops.aux_loss(x, experts, spec), scores)

        whole, dwhole = one(tensors["scores_TE"], tensors["experts_TK"])
        pairs = [one(s, e) for s in mixed.chunk(PARTS) for e in routed.chunk(PARTS)]
        small = [one(s, e) for s, e in zip(micro(mixed), micro(routed), strict=True)]
        return observed({
            "whole": whole, "dwhole_TE": dwhole,
            "pairs": torch.stack([loss for loss, _ in pairs]),
            "dpairs": torch.cat([gradient for _, gradient in pairs]),
            "micro": torch.stack([loss for loss, _ in small]),
            "dmicro_TE": torch.cat([gradient for _, gradient in small]),
        })  # fmt: skip

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`: every call by its own bound, and the mean over all pairs, added up exactly."""
        spec, order, shape = preset(p.preset).router, inputs["order_T"], inputs["scores_TE"].shape
        wrong = structure(outputs, {
            "whole": ((), "float32"), "dwhole_TE": (shape, "float32"),
            "pairs": ((PARTS**2,), "float32"), "dpairs": ((PARTS * TOKENS, shape[1]), "float32"),
            "micro": ((len(MICRO),), "float32"), "dmicro_TE": (shape, "float32"),
        })  # fmt: skip
        if wrong is not None:
            return wrong

        def one(scores: Array, experts: I64) -> Both:
            if not len(scores):
                return nothing(scores)
            loss, gradient = aux_loss(scores, experts, spec)
            return loss, gradient.scaled(UPSTREAM)

        mixed, routed = inputs["scores_TE"][order], inputs["experts_TK"][order]
        whole, dwhole = one(inputs["scores_TE"], inputs["experts_TK"])
        pairs, dpairs = joined([one(s, e) for s in np.split(mixed, PARTS) for e in np.split(routed, PARTS)])
        small, dsmall = joined([one(s, e) for s, e in zip(micro(mixed), micro(routed), strict=True)])

        def over_routings(rows: Array) -> F64:
            each = wide(rows).reshape(PARTS, PARTS, TOKENS // PARTS, shape[1])
            return np.asarray(each.sum(1) / PARTS**2).reshape(shape)

        mean = Bounded.deterministic(whole.value, np.asarray(pairs.bound.mean()))
        dmean = Bounded.deterministic(dwhole.value[order], over_routings(dpairs.bound))
        return merge([
            judge("loss", outputs["whole"], whole),
            judge("dscores", outputs["dwhole_TE"], dwhole),
            judge("loss of one part's scores under another's routing", outputs["pairs"], pairs),
            judge("dscores of one part under another's routing", outputs["dpairs"], dpairs),
            judge("mean loss over all pairs of parts", np.asarray(wide(outputs["pairs"]).mean()), mean),
            judge("mean dscores over the parts' routings", over_routings(outputs["dpairs"]), dmean),
            judge("loss of micro-batches", outputs["micro"], small),
            judge("dscores of micro-batches", outputs["dmicro_TE"], dsmall),
        ])  # fmt: skip


class AuxPadding(AuxCase):
    """As many tokens again, whose scores are zero and whose routing is that of the others: half of the loss."""

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """See `Case.run`: the padding lies among the tokens."""
        import torch

        spec, order = preset(p.preset).router, tensors["order_T"]
        scores, experts = tensors["scores_TE"], tensors["experts_TK"]
        padded = torch.stack((scores, torch.zeros_like(scores)), 1).flatten(0, 1)
        routed = torch.stack((experts, experts[order]), 1).flatten(0, 1)
        loss, gradient = there_and_back(lambda x: ops.aux_loss(x, routed, spec), padded, 2.0 * UPSTREAM)
        return observed({"loss": loss, "dscores_TE": gradient[::2].clone()})

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`: twice the loss, and the tokens' gradients, are those without padding."""
        spec, scores, experts = preset(p.preset).router, inputs["scores_TE"], inputs["experts_TK"]
        wrong = structure(outputs, {"loss": ((), "float32"), "dscores_TE": (scores.shape, "float32")})
        if wrong is not None:
            return wrong
        padded = np.concatenate((scores, np.zeros_like(scores)))
        loss, gradient = aux_loss(padded, np.concatenate((experts, experts)), spec)
        gradient = gradient.scaled(2.0 * UPSTREAM)
        plain, dplain = aux_loss(scores, experts, spec)
        here = Bounded.deterministic(dplain.scaled(UPSTREAM).value, gradient.bound[:TOKENS])
        return merge([
            judge("twice the loss", 2.0 * wide(outputs["loss"]), Bounded.deterministic(plain.value, 2.0 * loss.bound)),
            judge("dscores of the tokens", outputs["dscores_TE"], here),
        ])  # fmt: skip


class ZCase(LossParts):
    """Parts of the z-loss."""

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`: some tokens of losses.z, and an order in which they are split up."""
        made = Z_LOSS.inputs(At(p.preset, p.dtype, p.scale, p.seed, Shape(TOKENS, 0, 0)))
        return {**made, "order_T": make.permutation(p.seed, "loss_parts/order", TOKENS)}


class ZParts(ZCase):
    """The z-loss of micro-batches, weighted by their tokens."""

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """See `Case.run`: the upstream gradient of a micro-batch is its share of the whole's."""
        import torch

        whole, dwhole = there_and_back(ops.z_loss, tensors["logits_TE"])
        parts = zip(micro(tensors["logits_TE"][tensors["order_T"]]), MICRO, strict=True)
        small = [there_and_back(ops.z_loss, x, UPSTREAM * n / TOKENS) for x, n in parts]
        return observed({
            "whole": whole, "dwhole_TE": dwhole,
            "micro": torch.stack([loss for loss, _ in small]),
            "dmicro_TE": torch.cat([gradient for _, gradient in small]),
        })  # fmt: skip

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`: the weighted mean of the losses, added up exactly, and the gradients are the whole's."""
        x, storage, order = inputs["logits_TE"], gate_storage(preset(p.preset).router, p), inputs["order_T"]
        wrong = structure(outputs, {
            "whole": ((), "float32"), "dwhole_TE": (x.shape, storage),
            "micro": ((len(MICRO),), "float32"), "dmicro_TE": (x.shape, storage),
        })  # fmt: skip
        if wrong is not None:
            return wrong
        whole, dwhole = z_loss(x)
        dwhole = dwhole.scaled(UPSTREAM).stored(storage)
        small, _ = joined([z_loss(part) if len(part) else nothing(part) for part in micro(x[order])])
        shares = np.array(MICRO) / TOKENS
        mean = Bounded.deterministic(whole.value, np.asarray(shares @ small.bound))
        mixed = Bounded(dwhole.value[order], dwhole.bound[order], dwhole.var[order])
        return merge([
            judge("loss", outputs["whole"], whole),
            judge("dlogits", outputs["dwhole_TE"], dwhole),
            judge("loss of micro-batches", outputs["micro"], small),
            judge("mean loss of the micro-batches", np.asarray(shares @ wide(outputs["micro"])), mean),
            judge("dlogits of the micro-batches", outputs["dmicro_TE"], mixed),
        ])  # fmt: skip


class ZPadding(ZCase):
    """As many tokens again, and as many experts, that are masked: half of the loss."""

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """See `Case.run`: masked logits are -inf, but for one of 0 in each token of padding, whose logsumexp is 0."""
        import torch

        logits = tensors["logits_TE"]
        padded = torch.full_like(torch.cat((logits, logits), 1), -torch.inf).repeat_interleave(2, 0)
        padded[::2, : logits.shape[1]] = logits
        padded[1::2, 0] = 0.0
        loss, gradient = there_and_back(ops.z_loss, padded, 2.0 * UPSTREAM)
        return observed({"loss": loss, "dlogits_TE": gradient})

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`: twice the loss and the tokens' gradients are those without padding, whose own are 0."""
        keeps_nonfinite(contract)
        x, storage = inputs["logits_TE"], gate_storage(preset(p.preset).router, p)
        (tokens, experts), rows = x.shape, slice(0, None, 2)
        shape = (2 * tokens, 2 * experts)
        wrong = structure(outputs, {"loss": ((), "float32"), "dlogits_TE": (shape, storage)})
        if wrong is not None:
            return wrong
        padded = np.full(shape, -np.inf)
        padded[rows, :experts] = x
        padded[1::2, 0] = 0.0
        loss, gradient = z_loss(padded)
        gradient = gradient.scaled(2.0 * UPSTREAM).stored(storage)
        plain, dplain = z_loss(x)
        value = np.zeros(shape)
        value[rows, :experts] = dplain.scaled(UPSTREAM).value
        unpadded = Bounded.deterministic(plain.value, 2.0 * loss.bound)
        return merge([
            judge("twice the loss", 2.0 * wide(outputs["loss"]), unpadded),
            judge("dlogits", outputs["dlogits_TE"], Bounded(value, gradient.bound, gradient.var)),
        ])  # fmt: skip


CASES = (
    AuxParts(
        "losses.aux_parts", "losses", ("aux_loss",),
        "The balance loss of 128 tokens and of their parts. It is a product of two means, not a mean: over four parts, "
        "in an order that the seed chooses, the mean of the loss of every part's scores under every part's routing is "
        "the loss of the whole, and so are the gradients. That of micro-batches of 64 to 0 tokens is each one's own. "
        "Bound: that of each call (oracle.losses), and their mean for the mean. MoEOps has no counts of other ranks "
        "and no mask.",
    ),
    AuxPadding(
        "losses.aux_padding", "losses", ("aux_loss",),
        "The balance loss among padding that adds nothing to the probabilities, and to the counts as much as the "
        "tokens do: half of the loss without padding, and half of its gradients. Of sigmoids, this is 0 / 1e-20.",
    ),
    ZParts(
        "losses.z_parts", "losses", ("z_loss",),
        "The z-loss of 128 tokens, and the mean over micro-batches of 64 to 0 tokens weighted by their tokens, in an "
        "order that the seed chooses: one value, and one gradient. Bound: that of each call (oracle.losses), weighted "
        "in the same way.",
    ),
    ZPadding(
        "losses.z_padding", "losses", ("z_loss",),
        "The z-loss among padding: experts whose logits are -inf, and tokens with one logit of 0 and all others -inf, "
        "whose logsumexp is 0. Half of the loss without padding, half of its gradients, and zeros; no 0 times inf.",
    ),
)  # fmt: skip
