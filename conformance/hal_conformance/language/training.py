# SPDX-License-Identifier: Apache-2.0
"""Training the model: one step, and a run of many.

The recipe is Ling's at a small scale: AdamW with betas 0.9 and 0.95, decay 0.1, the norm of all gradients clipped at 1,
a linear warm-up.

Legend: B sequences, L tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from hal.moe.optimizer_ops import AdamHyper
from hal_conformance.arguments import backward_pass
from hal_conformance.language.model import Losses, Tap, complete, losses, rotary_table, unseen
from hal_conformance.language.spec import LanguageSpec
from hal_conformance.language.text import batch

if TYPE_CHECKING:
    import torch
    from torch import Tensor

LIMIT = 1.0
"""Of the gradients' norm."""


@dataclass(frozen=True)
class Recipe:
    """How the model is trained.

    Attributes:
        sequences: B.
        length: L.
        lr: the learning rate after the warm-up.
        warmup: steps over which it rises from zero.
    """

    sequences: int = 4
    length: int = 64
    lr: float = 4e-3
    warmup: int = 20

    def hyper(self, step: int) -> AdamHyper:
        """Return the hyperparameters of a step; the first is 1."""
        return AdamHyper(self.lr * min(1.0, step / self.warmup), 0.9, 0.95, 1e-8, 0.1)


class Gradients(NamedTuple):
    """What a step computes before it changes anything."""

    losses: Losses
    raw: list[Tensor]
    clipped: list[Tensor]
    norm: Tensor


class Training:
    """A model in training.

    Args:
        ops: the operators under test; those that are missing are the portable ones.
        spec: the model.
        start: the parameters by name (`parameters.initial`), float32, on the device.
        table: `model.rotary_table` of the sequences' length, on the device.
        recipe: how it is trained.
        dtype: of the arithmetic.
    """

    def __init__(
        self,
        ops: Any,
        spec: LanguageSpec,
        start: Mapping[str, Tensor],
        table: tuple[Tensor, Tensor],
        recipe: Recipe,
        dtype: torch.dtype,
    ) -> None:
        import torch

        self._ops, self._spec, self._table, self._recipe, self._dtype = complete(ops), spec, table, recipe, dtype
        self.step = 0
        self.names = list(start)
        self.parameters = list(start.values())
        self.first = [torch.zeros_like(p) for p in self.parameters]
        self.second = [torch.zeros_like(p) for p in self.parameters]

    def gradients(self, tokens_BL: Tensor, targets_BL: Tensor, tap: Tap = unseen) -> Gradients:
        """Return losses and gradients of a batch, raw and clipped."""
        import torch

        leaves = [p.detach().requires_grad_() for p in self.parameters]
        named = dict(zip(self.names, leaves, strict=True))
        found = losses(self._ops, named, self._spec, tokens_BL, targets_BL, self._table, self._dtype, tap)
        with backward_pass():
            found.total.backward()
        raw = [torch.zeros_like(p) if p.grad is None else p.grad for p in leaves]
        clipped, norm = self._ops.clip_grad_norm(raw, LIMIT)
        return Gradients(found, raw, clipped, norm)

    def update(self, gradients: Gradients) -> None:
        """Take the step."""
        self.step += 1
        self.parameters, self.first, self.second = self._ops.adamw_step(
            self.parameters, gradients.clipped, self.first, self.second, self.step, self._recipe.hyper(self.step)
        )


def begin(ops: Any, spec: LanguageSpec, start: Mapping[str, Tensor], recipe: Recipe, dtype: torch.dtype) -> Training:
    """Return a training whose rotary table lies where the parameters do."""
    import torch

    device, wide = next(iter(start.values())).device, torch.promote_types(dtype, torch.float32)
    cos, sin = (torch.from_numpy(a).to(device, wide) for a in rotary_table(recipe.length, spec.head_width, spec.theta))
    return Training(ops, spec, start, (cos, sin), recipe, dtype)


def run(training: Training, recipe: Recipe, seed: int, steps: int) -> Iterator[Gradients]:
    """Take so many steps on the batches of a seed, yielding what each computed before it is taken."""
    import torch

    device = training.parameters[0].device
    for _ in range(steps):
        text = batch(seed, training.step + 1, recipe.sequences, recipe.length)
        tokens, targets = (torch.from_numpy(array).to(device) for array in text)
        found = training.gradients(tokens, targets)
        yield found
        training.update(found)
