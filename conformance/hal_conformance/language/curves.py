# SPDX-License-Identifier: Apache-2.0
"""What is seen of a training run: its losses, and the norms of its gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hal_conformance.case import Arrays
from hal_conformance.language import parameters as named
from hal_conformance.language import spec as specs
from hal_conformance.language.spec import LanguageSpec
from hal_conformance.language.training import Recipe, begin, run

if TYPE_CHECKING:
    import torch
    from torch import Tensor

RECIPE = Recipe(sequences=2, length=32, lr=8e-3, warmup=10)
STEPS = 60
CURVES = ("entropy", "norm")
MODELS = ("ling", "llama")


def model(name: str) -> LanguageSpec:
    """Return the model of that name: 64 experts of which 6 are chosen, or the dense control of equal activated size."""
    spec = specs.ling(32, 16) if name == "ling" else specs.llama(32, 16)
    return replace(spec, head_width=8)


def start(spec: LanguageSpec, seed: int) -> Arrays:
    """Return the parameters from which a run of a seed begins."""
    return named.initial(spec, seed)


def curves(
    ops: Any, spec: LanguageSpec, start: Mapping[str, Tensor], seed: int, steps: int, dtype: torch.dtype
) -> Tensor:
    """Train, and return [2, steps], float32: cross-entropy, and the norm of the gradients before clipping.

    Args:
        ops: the operators under test.
        spec: the model.
        start: the parameters, on the device.
        seed: of the batches.
        steps: how many are taken.
        dtype: of the arithmetic.
    """
    import torch

    training = begin(ops, spec, start, RECIPE, dtype)
    seen = [torch.stack((done.losses.entropy.detach(), done.norm)) for done in run(training, RECIPE, seed, steps)]
    return torch.stack(seen, dim=1)
