# SPDX-License-Identifier: Apache-2.0
"""A training run among honest ones: does its loss stay where theirs do?

Rounding differences grow in training, and an expert that is chosen differently makes them jump, so no bound on the
loss is both honest and tight. What is known is how far honest runs are from each other (language.ensemble): the run is
compared with those. It is a statistic and never red; the steps themselves are judged by trajectory.step_*.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hal.contract import Contract
from hal_conformance.case import SCALES, Arrays, Params, Scale
from hal_conformance.cases.base import wide
from hal_conformance.cases.trajectory import Statistical
from hal_conformance.language import curves as run
from hal_conformance.language import ensemble as twins
from hal_conformance.numerics.detectors import structure
from hal_conformance.verdicts import Judgement, Status

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Band(Statistical):
    """A run of one seed, whatever `--seed` says: the ensemble is of that one.

    Attributes:
        model: its name.
    """

    model: str

    def scales(self, preset: str) -> tuple[Scale, ...]:
        """See `Case.scales`: the control from small on."""
        return SCALES if self.model == "ling" else SCALES[1:]

    def steps(self, p: Params) -> int:
        """Return how many steps are taken."""
        return twins.FEW if p.scale == "tiny" else run.STEPS

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`: the parameters before the first step."""
        return run.start(run.model(self.model), 0)

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """See `Case.run`."""
        import torch

        curves = run.curves(ops, run.model(self.model), tensors, 0, self.steps(p), getattr(torch, p.dtype))
        return dict(zip(run.CURVES, curves, strict=True))

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`: an exact conformal p-value, 1 + the twins that are as far out over 1 + all of them.

        Each twin's deviation is from a median of which it is itself a part; with 199 of them that is nothing.
        """
        steps = self.steps(p)
        wrong = structure(outputs, dict.fromkeys(run.CURVES, ((steps,), "float32")))
        if wrong is not None:
            return wrong
        curves = np.stack([wide(outputs[name]) for name in run.CURVES])
        if not np.isfinite(curves).all():
            at = int(np.flatnonzero(~np.isfinite(curves).all(axis=0))[0])
            return Judgement(Status.FAIL_NONFINITE, detail=f"the loss or the gradients' norm at step {at + 1}")
        lead, known = f"{self.model}/{p.dtype}", twins.ensemble()
        median, mad = (known[f"{lead}/{name}"][:, :steps] for name in ("median", "mad"))
        largest = known[f"{lead}/largest/{steps}"]
        found = twins.deviation(curves, median, mad)
        as_far = int((largest >= found).sum())
        margin = found / float(largest[-1])
        detectors = {"bound": margin, "rms": None, "bias": None, "exact": None}
        if as_far:
            return Judgement(Status.PASS, margin, detectors)
        off = np.abs(curves - median) / twins.unit(median, mad)
        curve, step = np.unravel_index(int(off.argmax()), off.shape)
        detail = (
            f"further out than all {len(largest)} honest runs: {run.CURVES[int(curve)]} at step {step + 1} is "
            f"{curves[curve, step]:.6g}, theirs {median[curve, step]:.6g} +- {mad[curve, step]:.2g} (median absolute "
            f"deviation); p = {1 / (len(largest) + 1):.3f}"
        )
        return Judgement(Status.DEGRADED, margin, detectors, detail)


_WHAT = (
    "The loss of a small {0} in training over real text, 60 steps (10 at tiny), and the norm of its gradients: the "
    "largest deviation from the median of 199 honest runs (other orders, other store points, parameters that differ in "
    "an ulp) in units of their median absolute deviation, ranked among theirs. DEGRADED if it is beyond all of them, "
    "which an honest device is once in 200 runs; never red, since trajectory.step_* judges the steps."
)
CASES = (
    Band("trajectory.band_ling", "trajectory", ("layer",), _WHAT.format("model in the shape of Ling-Lite"), "ling"),
    Band("trajectory.band_llama", "trajectory", ("experts",), _WHAT.format("dense control of equal size"), "llama"),
)
