# SPDX-License-Identifier: Apache-2.0
"""Faults of operators at particular numbers of tokens: whole tiles, and beyond what a block holds."""

from __future__ import annotations

import torch
from torch import Tensor

from hal.moe.ops import Dispatch, Routing
from hal.moe.router_spec import RouterSpec
from hal_conformance.faults.catalogue import fault
from hal_conformance.faults.parts import Alone, Parts

TILE = 64
BLOCK = 2048


def _tiles(tokens: int) -> bool:
    return tokens > 0 and tokens % TILE == 0


def _first(rows: Tensor, count: int) -> Tensor:
    """Return the rows, zero beyond the first."""
    keep = torch.arange(len(rows), device=rows.device) < count
    return rows * keep[:, None].to(rows.dtype)


@fault()
class RoutesNoWholeTiles(Parts):
    """Where 64 divides the number of tokens, the weights of the last are zero."""

    def route(
        self, x_TD: Tensor, gate_ED: Tensor, spec: RouterSpec, bias_E: Tensor | None = None, *,
        experts_TK: Tensor | None = None,
    ) -> Routing:  # fmt: skip
        """See `MoEOps.route`."""
        out = super().route(x_TD, gate_ED, spec, bias_E, experts_TK=experts_TK)
        return out._replace(weights_TK=_first(out.weights_TK, len(x_TD) - 1)) if _tiles(len(x_TD)) else out


@fault()
class DispatchesNoWholeTiles(Parts):
    """Where 64 divides the number of tokens, the last dispatched row is zero."""

    def dispatch(self, x_TD: Tensor, experts_TK: Tensor, num_experts: int, *, capacity: int | None = None) -> Dispatch:
        """See `MoEOps.dispatch`."""
        out = super().dispatch(x_TD, experts_TK, num_experts, capacity=capacity)
        return out._replace(x_RD=_first(out.x_RD, len(out.x_RD) - 1)) if _tiles(len(x_TD)) else out


@fault()
class CombinesNoWholeTiles(Parts):
    """Where 64 divides the number of tokens, the last combined token is zero."""

    def combine(self, y_RD: Tensor, weights_TK: Tensor, slot_R: Tensor, num_tokens: int) -> Tensor:
        """See `MoEOps.combine`."""
        y_TD = super().combine(y_RD, weights_TK, slot_R, num_tokens)
        return _first(y_TD, num_tokens - 1) if _tiles(num_tokens) else y_TD


@fault()
class BalancesNoWholeTiles(Alone):
    """Where 64 divides the number of tokens, the balance loss misses the last."""

    def aux_loss(self, scores_TE: Tensor, experts_TK: Tensor, spec: RouterSpec) -> Tensor:
        """See `MoEOps.aux_loss`."""
        less = len(scores_TE) - 1 if _tiles(len(scores_TE)) else len(scores_TE)
        return super().aux_loss(scores_TE[:less], experts_TK[:less], spec)


@fault()
class LosesATileOfZ(Alone):
    """Where 64 divides the number of tokens, the z-loss misses the last."""

    def z_loss(self, logits_TE: Tensor) -> Tensor:
        """See `MoEOps.z_loss`."""
        return super().z_loss(logits_TE[: len(logits_TE) - 1 if _tiles(len(logits_TE)) else None])


@fault()
class RoutesABlock(Parts):
    """Tokens beyond the 2,048th have weights of zero."""

    def route(
        self, x_TD: Tensor, gate_ED: Tensor, spec: RouterSpec, bias_E: Tensor | None = None, *,
        experts_TK: Tensor | None = None,
    ) -> Routing:  # fmt: skip
        """See `MoEOps.route`."""
        out = super().route(x_TD, gate_ED, spec, bias_E, experts_TK=experts_TK)
        return out._replace(weights_TK=_first(out.weights_TK, BLOCK))


@fault()
class DispatchesABlock(Parts):
    """With more than 2,048 tokens the last dispatched row is zero."""

    def dispatch(self, x_TD: Tensor, experts_TK: Tensor, num_experts: int, *, capacity: int | None = None) -> Dispatch:
        """See `MoEOps.dispatch`."""
        out = super().dispatch(x_TD, experts_TK, num_experts, capacity=capacity)
        return out._replace(x_RD=_first(out.x_RD, len(out.x_RD) - 1)) if len(x_TD) > BLOCK else out


@fault()
class CombinesABlock(Parts):
    """Combined tokens beyond the 2,048th are zero."""

    def combine(self, y_RD: Tensor, weights_TK: Tensor, slot_R: Tensor, num_tokens: int) -> Tensor:
        """See `MoEOps.combine`."""
        return _first(super().combine(y_RD, weights_TK, slot_R, num_tokens), BLOCK)


@fault()
class BalancesABlock(Alone):
    """The balance loss is that of the first 2,048 tokens."""

    def aux_loss(self, scores_TE: Tensor, experts_TK: Tensor, spec: RouterSpec) -> Tensor:
        """See `MoEOps.aux_loss`."""
        return super().aux_loss(scores_TE[:BLOCK], experts_TK[:BLOCK], spec)


@fault()
class ABlockOfZ(Alone):
    """The z-loss is that of the first 2,048 tokens."""

    def z_loss(self, logits_TE: Tensor) -> Tensor:
        """See `MoEOps.z_loss`."""
        return super().z_loss(logits_TE[:BLOCK])


def _few(tokens: int) -> bool:
    return 2 <= tokens <= 8


@fault()
class RoutesNoFew(Parts):
    """Of two to eight tokens, as in decoding, the weights of the last are zero."""

    def route(
        self, x_TD: Tensor, gate_ED: Tensor, spec: RouterSpec, bias_E: Tensor | None = None, *,
        experts_TK: Tensor | None = None,
    ) -> Routing:  # fmt: skip
        """See `MoEOps.route`."""
        out = super().route(x_TD, gate_ED, spec, bias_E, experts_TK=experts_TK)
        return out._replace(weights_TK=_first(out.weights_TK, len(x_TD) - 1)) if _few(len(x_TD)) else out


@fault()
class DispatchesNoFew(Alone):
    """Of two to eight tokens, as in decoding, the last dispatched row is zero."""

    def dispatch(self, x_TD: Tensor, experts_TK: Tensor, num_experts: int, *, capacity: int | None = None) -> Dispatch:
        """See `MoEOps.dispatch`."""
        out = super().dispatch(x_TD, experts_TK, num_experts, capacity=capacity)
        return out._replace(x_RD=_first(out.x_RD, len(out.x_RD) - 1)) if _few(len(x_TD)) else out


@fault()
class CombinesNoFew(Alone):
    """Of two to eight tokens, as in decoding, the last is zero."""

    def combine(self, y_RD: Tensor, weights_TK: Tensor, slot_R: Tensor, num_tokens: int) -> Tensor:
        """See `MoEOps.combine`."""
        y_TD = super().combine(y_RD, weights_TK, slot_R, num_tokens)
        return _first(y_TD, num_tokens - 1) if _few(num_tokens) else y_TD


@fault()
class SharesWithNoFew(Parts):
    """A layer of two to eight tokens, as in decoding, leaves out the shared experts."""

    def output(
        self, y_RD: Tensor, weights_TK: Tensor, slot_R: Tensor, shared_TD: Tensor | None, num_tokens: int
    ) -> Tensor:
        """See `Parts.output`."""
        return super().output(y_RD, weights_TK, slot_R, None if _few(num_tokens) else shared_TD, num_tokens)


def _small(tokens: int) -> bool:
    return 9 <= tokens <= 30


@fault()
class RoutesNoSmallBatch(Alone):
    """Of nine to thirty tokens the weights of the last are zero."""

    def route(
        self, x_TD: Tensor, gate_ED: Tensor, spec: RouterSpec, bias_E: Tensor | None = None, *,
        experts_TK: Tensor | None = None,
    ) -> Routing:  # fmt: skip
        """See `MoEOps.route`."""
        out = super().route(x_TD, gate_ED, spec, bias_E, experts_TK=experts_TK)
        return out._replace(weights_TK=_first(out.weights_TK, len(x_TD) - 1)) if _small(len(x_TD)) else out


@fault()
class DispatchesNoSmallBatch(Alone):
    """Of nine to thirty tokens the last dispatched row is zero."""

    def dispatch(self, x_TD: Tensor, experts_TK: Tensor, num_experts: int, *, capacity: int | None = None) -> Dispatch:
        """See `MoEOps.dispatch`."""
        out = super().dispatch(x_TD, experts_TK, num_experts, capacity=capacity)
        return out._replace(x_RD=_first(out.x_RD, len(out.x_RD) - 1)) if _small(len(x_TD)) else out


@fault()
class CombinesNoSmallBatch(Alone):
    """Of nine to thirty tokens the last is zero."""

    def combine(self, y_RD: Tensor, weights_TK: Tensor, slot_R: Tensor, num_tokens: int) -> Tensor:
        """See `MoEOps.combine`."""
        y_TD = super().combine(y_RD, weights_TK, slot_R, num_tokens)
        return _first(y_TD, num_tokens - 1) if _small(num_tokens) else y_TD


@fault()
class CombinesNoSmallTile(Alone):
    """Of sixteen tokens the last is zero."""

    def combine(self, y_RD: Tensor, weights_TK: Tensor, slot_R: Tensor, num_tokens: int) -> Tensor:
        """See `MoEOps.combine`."""
        y_TD = super().combine(y_RD, weights_TK, slot_R, num_tokens)
        return _first(y_TD, num_tokens - 1) if num_tokens == 16 else y_TD


@fault()
class ZOfNoSmallBatch(Alone):
    """Of 17 to 30 tokens the z-loss misses the last."""

    def z_loss(self, logits_TE: Tensor) -> Tensor:
        """See `MoEOps.z_loss`."""
        tokens = len(logits_TE)
        return super().z_loss(logits_TE) if not 17 <= tokens <= 30 else super().z_loss(logits_TE[:-1])


class LosesLast(Parts):
    """A layer that loses its last token at some numbers of tokens; its operators, called alone, do not."""

    families = ("layer",)

    def hit(self, tokens: int) -> bool:
        """Return whether the last token is lost."""
        raise NotImplementedError

    def output(
        self, y_RD: Tensor, weights_TK: Tensor, slot_R: Tensor, shared_TD: Tensor | None, num_tokens: int
    ) -> Tensor:
        """See `Parts.output`."""
        y_TD = super().output(y_RD, weights_TK, slot_R, shared_TD, num_tokens)
        return _first(y_TD, num_tokens - 1) if self.hit(num_tokens) else y_TD


@fault()
class LayersOfNoSmallBatch(LosesLast):
    """A layer of nine to thirty tokens returns zero for the last."""

    def hit(self, tokens: int) -> bool:
        """See `LosesLast.hit`."""
        return _small(tokens)


@fault()
class LayersOfNoneLacking(LosesLast):
    """A layer returns zero for the last token where one more would fill tiles of 16."""

    def hit(self, tokens: int) -> bool:
        """See `LosesLast.hit`."""
        return tokens % 16 == 15


@fault()
class LayersOfNoneOver(LosesLast):
    """A layer of more than one token returns zero for the last where one less would fill tiles of 64."""

    def hit(self, tokens: int) -> bool:
        """See `LosesLast.hit`."""
        return tokens > 1 and tokens % TILE == 1


@fault()
class LayersOfNoMany(LosesLast):
    """A layer of more than 1,024 tokens returns zero for the last."""

    def hit(self, tokens: int) -> bool:
        """See `LosesLast.hit`."""
        return tokens > 1024
