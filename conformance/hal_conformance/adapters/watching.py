# SPDX-License-Identifier: Apache-2.0
"""Sees what a router computes on its way, and replays a choice, without a change to its code.

Blocks return weights and experts at best. The scores over all experts, what the choice was made from, and the choice
are results of torch's softmax or sigmoid and of its topk; a torch function mode sees these calls where they are made,
with their graph. It replaces what topk found to replay a routing, and the scores to judge a loss that takes logits.

Legend: T tokens, E routed experts, K choices per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hal.moe.ops import Routing

_SCORES: frozenset[Callable[..., Any]] = frozenset(
    (torch.softmax, F.softmax, Tensor.softmax, torch.sigmoid, F.sigmoid, Tensor.sigmoid)
)
_TOPK: frozenset[Callable[..., Any]] = frozenset((torch.topk, Tensor.topk))


class Watch(TorchFunctionMode):
    """A context in which one router runs.

    Args:
        num_experts: E; what else runs softmax, sigmoid or topk over as many is mistaken for the router's.
        top_k: K.
        experts_TK: a routing to be replayed: what topk returns, with the values that stand there.
        scores_TE: scores to be used instead of those that softmax or sigmoid compute.

    Attributes:
        logits_TE: what the scores were computed of.
        scores_TE: the first softmax or sigmoid over E.
        selection_TE: what the choice was made from: scores with a bias, masked.
        chosen_TK: the choice.
        is_ordered: False where the router did not ask topk for an order.
    """

    def __init__(
        self, num_experts: int, top_k: int, *, experts_TK: Tensor | None = None, scores_TE: Tensor | None = None
    ) -> None:
        super().__init__()
        self._num_experts = num_experts
        self._top_k = top_k
        self._replayed_TK = None if experts_TK is None else experts_TK.long()  # as topk's are
        self._given_TE = scores_TE
        self.logits_TE: Tensor | None = None
        self.scores_TE: Tensor | None = None
        self.selection_TE: Tensor | None = None
        self.chosen_TK: Tensor | None = None
        self.is_ordered = True

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _SCORES:
            return self._score(func, args, kwargs)
        if func in _TOPK:
            return self._choose(func, args, kwargs)
        return func(*args, **kwargs)

    def _score(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        found = func(*args, **kwargs)
        if found.shape[-1] != self._num_experts:
            return found
        if self._given_TE is not None:
            found = self._given_TE.view(found.shape)
        if self.scores_TE is None:
            logits = args[0] if args else kwargs["input"]
            self.logits_TE = logits.reshape(-1, self._num_experts)
            self.scores_TE = found.reshape(-1, self._num_experts)
        return found

    def _choose(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        source, k, is_ordered = _topk_arguments(*args, **kwargs)
        if source.shape[-1] != self._num_experts or k != self._top_k:
            return func(*args, **kwargs)
        if self._replayed_TK is None:
            found = func(*args, **kwargs)
        else:
            index = self._replayed_TK.view(*source.shape[:-1], k)
            found = torch.return_types.topk((source.gather(-1, index), index))
        if self.chosen_TK is None:
            self.is_ordered = is_ordered
            self.selection_TE = source.detach().reshape(-1, self._num_experts)
            self.chosen_TK = found[1].reshape(-1, k)
        return found

    def routing(self, logits: Tensor, weights: Tensor, experts: Tensor) -> Routing:
        """Return what the router decided, with any leading dimensions, as our type.

        Where it asked for no order among its K, they are put into that of the selection scores, ties to the lower
        index: the block's result does not depend on it, and there is nothing to judge. A replayed order stays.

        Raises:
            LookupError: no softmax or sigmoid over E was seen, so that there are no scores.
        """
        if self.scores_TE is None:
            raise LookupError(f"the router computed no softmax or sigmoid over {self._num_experts} experts")
        experts_TK, weights_TK = (t.reshape(-1, self._top_k) for t in (experts, weights))
        if not self.is_ordered and self._replayed_TK is None and self.selection_TE is not None:
            order = descending(self.selection_TE, experts_TK)
            experts_TK, weights_TK = experts_TK.gather(1, order), weights_TK.gather(1, order)
        return Routing(logits.reshape(-1, self._num_experts), self.scores_TE, experts_TK, weights_TK)


def descending(selection_TE: Tensor, experts_TK: Tensor) -> Tensor:
    """Return the places that sort each token's experts by their selection scores, ties to the lower index, [T, K]."""
    by_index = experts_TK.argsort(dim=1, stable=True)
    scores_TK = selection_TE.gather(1, experts_TK.gather(1, by_index))
    return by_index.gather(1, scores_TK.argsort(dim=1, descending=True, stable=True))


def _topk_arguments(
    input: Tensor,  # torch's own name
    k: int,
    dim: int = -1,
    largest: bool = True,
    sorted: bool = True,
    *,
    out: Any = None,
) -> tuple[Tensor, int, bool]:
    return input, int(k), sorted
