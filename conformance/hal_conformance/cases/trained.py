# SPDX-License-Identifier: Apache-2.0
"""A router and a layer that were trained on text, on activations that reach them (hal_conformance.language.trained).

Legend: T tokens, D model dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from hal.contract import Contract
from hal_conformance import inputs as make
from hal_conformance.case import Arrays, Footprint, Params
from hal_conformance.cases.base import At, Shape, gate_storage, model_of, shape
from hal_conformance.cases.layer import Layer
from hal_conformance.cases.router import RouterCase
from hal_conformance.language.trained import X, layer
from hal_conformance.oracle.layer import ROUTED
from hal_conformance.verdicts import Judgement

if TYPE_CHECKING:
    import torch


def trained(p: Params) -> Arrays:
    """Return as many activations as the scale has tokens, chosen by the seed, and the weights."""
    spec, known = model_of(p).router, layer()
    rows = make.permutation(p.seed, "trained/rows", len(known[X]))[: shape(p).tokens]
    storage = {"gate_ED": gate_storage(spec, p)}
    found = {name: make.store(array, storage.get(name, p.dtype)) for name, array in known.items()}
    found[X] = found[X][rows]
    return found


class TrainedRouter(RouterCase):
    """Every stage of the router."""

    def presets(self) -> tuple[str, ...]:
        """See `Case.presets`: what was trained."""
        return ("ling-lite",)

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`."""
        arrays = trained(p)
        return {name: arrays[name] for name in (X, "gate_ED")}


class TrainedLayer(Layer):
    """The layer, forward and backward; its matrices are as small at every scale as they were trained."""

    def footprint(self, p: Params) -> Footprint:
        """See `Case.footprint`."""
        return super().footprint(_small(p))

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`."""
        arrays = trained(p)
        tokens, width = arrays[X].shape
        arrays["dy_TD"] = make.store(make.normal(p.seed, "trained/dy", tokens, width), p.dtype)
        arrays["daux"], arrays["dz"] = (np.asarray(share * tokens, np.float32) for share in (1.0, 0.25))
        return arrays

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """See `Case.run`."""
        return super().run(ops, tensors, _small(p))

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`."""
        return super().judge(inputs, outputs, _small(p), contract)


def _small(p: Params) -> At:
    """Return the instance whose matrices have the trained layer's sizes."""
    _, hidden, width = layer()[ROUTED[0]].shape
    return At(p.preset, p.dtype, p.scale, p.seed, Shape(shape(p).tokens, width, hidden))


_TRAINED = (
    "trained for 3,000 steps on text, on activations that reach it: margins, load and outliers as training makes them. "
    "64 experts, 6 chosen, D = 64; another seed picks other tokens. "
)
CASES = (
    TrainedRouter(
        "router.trained", "router", ("route",),
        "A router " + _TRAINED + "Logits, scores, choice and weights, each from the device's own input to it.",
    ),
    TrainedLayer(
        "layer.trained", "layer", ("layer",),
        "A layer " + _TRAINED + "As layer.backward_free.", backward=True, only=("ling-lite",),
    ),
)  # fmt: skip
