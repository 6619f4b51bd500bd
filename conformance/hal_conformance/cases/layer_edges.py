# SPDX-License-Identifier: Apache-2.0
"""A layer at its edges: tokens that are degenerate, and exact ties."""

from __future__ import annotations

import numpy as np

from hal.contract import Contract
from hal_conformance import inputs as make
from hal_conformance.case import Arrays, Params
from hal_conformance.cases.base import KINDS, gate_storage, keeps_nonfinite, model_of, wide
from hal_conformance.cases.layer import FREE, Layer, what
from hal_conformance.cases.router_edges import FADE, lowest_first, tied
from hal_conformance.numerics.detectors import Finding, discrete
from hal_conformance.verdicts import Judgement

NAN, INFINITE, VANISHING = 5, 11, 17
"""Tokens of `Degenerate`, among ordinary ones."""


class Degenerate(Layer):
    """A token of NaN, one with an infinity, and one whose scores vanish; the losses, which are means, are NaN."""

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`.

        The vanishing token is one channel, of which all experts' gates are near 1: its sigmoids are as small as the
        epsilon that is added to their sum. The infinity has the sign of the first expert's gate, since of a softmax of
        nothing but -inf opinions differ.
        """
        arrays, spec = super().inputs(p), model_of(p).router
        x, gate = arrays["x_TD"].copy(), arrays["gate_ED"].copy()
        infinite, fading = 3, 7
        steps = make.permutation(p.seed, "layer/steps", spec.num_experts) / (2.0 * spec.num_experts)
        gate[:, fading] = make.store(1.0 + steps, gate_storage(spec, p))
        x[NAN] = np.nan
        x[INFINITE, infinite] = np.copysign(np.inf, wide(gate[0, infinite]))
        x[VANISHING] = 0
        x[VANISHING, fading] = -FADE
        return {**arrays, "x_TD": x, "gate_ED": gate}

    @np.errstate(all="ignore")
    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`."""
        keeps_nonfinite(contract)
        return super().judge(inputs, outputs, p, contract)

    def findings(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> list[Finding]:
        """See `Layer.findings`.

        The experts multiply the infinity by weights of both signs, so that its y is NaN in every order. Its logits may
        be: for units that split a float32 into parts it is a NaN from the start.
        """
        if np.isnan(wide(outputs["logits_TE"][INFINITE])).all():
            x = inputs["x_TD"].copy()
            x[INFINITE] = np.nan
            inputs = {**inputs, "x_TD": x}
        return super().findings(inputs, outputs, p, contract)


class Tied(Layer):
    """Exact ties go to the lower index."""

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`: the tokens and the gate of `router.tie_order`.

        A bias is the same for all, so that it breaks no tie, and below every score: an expert of a group that is masked
        with 0.0 instead of -inf would win.
        """
        arrays = {**super().inputs(p), **tied(p)}
        if "bias_E" in arrays:
            arrays["bias_E"] = np.full_like(arrays["bias_E"], -1.0625)
        return arrays

    def findings(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> list[Finding]:
        """See `Layer.findings`."""
        logits = wide(inputs["x_TD"]) @ wide(inputs["gate_ED"]).T
        expected = lowest_first(logits, model_of(p).router)
        found = discrete("experts of tied logits", outputs["experts_TK"], expected)
        return [found, *super().findings(inputs, outputs, p, contract)]


CASES = (
    Degenerate(
        "layer.degenerate", "layer", ("layer",),
        what(
            f"{FREE}, one token of NaN, one with an infinity and one whose scores are as small as the epsilon that is "
            "added to their sum, each of which stays alone", "y",
        )
        + " The first two make both losses NaN, and are NaN in y.",
        only=KINDS,
    ),
    Tied(
        "layer.tie_order", "layer", ("layer",),
        what("one-hot tokens and an integer gate, most of whose logits are tied: the lower index goes first", "y")
        + " All selection scores are negative where there is a bias.",
        only=("ling-2.0-mini", "mixtral-8x7b"),
    ),
)  # fmt: skip
