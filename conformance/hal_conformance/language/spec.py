# SPDX-License-Identifier: Apache-2.0
"""The two models.

Legend: D model dim, H query heads, G key heads, d width of a head, F hidden dim of an expert, S of the shared experts.
"""

from __future__ import annotations

from dataclasses import dataclass

from hal.moe.model_spec import MoEModelSpec
from hal.moe.presets import preset


@dataclass(frozen=True)
class LanguageSpec:
    """A decoder of equal blocks: attention, then experts or one dense MLP.

    Attributes:
        experts: a block's experts; None: a dense MLP of width `dense`.
        dense: hidden dim of the dense MLP.
        norm_head: Ling's NormHead, its norms being constants for the gradient; otherwise a plain product.
    """

    name: str
    experts: MoEModelSpec | None
    dense: int
    norm_head: bool
    layers: int = 2
    width: int = 64
    heads: int = 4
    key_heads: int = 1
    head_width: int = 16
    theta: float = 600000.0
    eps: float = 1e-5

    @property
    def projected(self) -> int:
        """Rows of the joint projection of queries, keys and values."""
        return (self.heads + 2 * self.key_heads) * self.head_width


def ling(width: int = 64, expert_hidden: int = 32) -> LanguageSpec:
    """Return Ling-Lite with small matrices: its router, 64 experts of which 6 are chosen, and 2 shared ones.

    Heads, their grouping by four, the rotary base and the norm's epsilon are those of the published configuration.
    """
    model = preset("ling-lite").scaled(hidden=width, expert_hidden=expert_hidden)
    return LanguageSpec("ling", model, 0, norm_head=True, width=width)


def llama(width: int = 64, expert_hidden: int = 32) -> LanguageSpec:
    """Return the dense control: an MLP as wide as the experts that a token of `ling` visits, and a plain head."""
    model = ling(width, expert_hidden).experts
    assert model is not None
    dense = model.router.top_k * model.expert_hidden_size + model.shared_hidden_size
    return LanguageSpec("llama", None, dense, norm_head=False, width=width)
