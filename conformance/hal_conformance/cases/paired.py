# SPDX-License-Identifier: Apache-2.0
"""Final losses of many seeds, paired with the reference's: are they equivalent, not merely not different?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np

from hal.contract import Contract
from hal_conformance.case import Arrays, Params, Scale
from hal_conformance.cases.base import wide
from hal_conformance.cases.trajectory import Statistical
from hal_conformance.language import curves as run
from hal_conformance.language import ensemble as twins
from hal_conformance.numerics.detectors import structure
from hal_conformance.verdicts import Judgement, Status

if TYPE_CHECKING:
    import torch

LEVEL, POWER = 0.05, 0.8
"""Of each of the two tests, and of both where the true difference is zero."""
SHARE = 0.5
"""The margin of equivalence as a share of the reference's deviation between seeds, declared before anything is run."""
SEEDS = 24


def student(probability: float, freedom: int) -> float:
    """Return a quantile of Student's t: Abramowitz and Stegun 26.7.5, right to 1e-4 from 10 degrees of freedom on."""
    z = NormalDist().inv_cdf(probability)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return float(z + sum(term / freedom ** (n + 1) for n, term in enumerate(terms)))


def needed(deviation: float, margin: float) -> int:
    """Return the seeds with which two one-sided tests prove a true difference of zero with probability `POWER`.

    n = (t_level + t_beta/2)^2 deviation^2 / margin^2: either test may fail, each with half of beta (Chow, Shao and
    Wang, Sample Size Calculations in Clinical Research, 3.2).
    """
    n = 12
    for _ in range(20):
        quantiles = student(1 - LEVEL, n - 1) + student(1 - (1 - POWER) / 2, n - 1)
        n = max(12, math.ceil((quantiles * deviation / margin) ** 2))
    return n


@dataclass(frozen=True)
class Paired(Statistical):
    """Runs of `SEEDS` seeds.

    Attributes:
        model: its name.
    """

    model: str

    def scales(self, preset: str) -> tuple[Scale, ...]:
        """See `Case.scales`: minutes on a CPU."""
        return ("full",)

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`: the parameters before the first step, of every seed."""
        spec = run.model(self.model)
        return {f"{s}/{name}": a for s in range(1, SEEDS + 1) for name, a in run.start(spec, s).items()}

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """See `Case.run`."""
        import torch

        spec, dtype, finals = run.model(self.model), getattr(torch, p.dtype), []
        for seed in range(1, SEEDS + 1):
            lead = f"{seed}/"
            start = {name.removeprefix(lead): t for name, t in tensors.items() if name.startswith(lead)}
            finals.append(run.curves(ops, spec, start, seed, run.STEPS, dtype)[0, -twins.WINDOW :])
        return {"entropy_SW": torch.stack(finals)}

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`: two one-sided t-tests of the mean paired difference, each at 5 %.

        Both say yes exactly if the 90 % confidence interval lies inside the margin.
        """
        wrong = structure(outputs, {"entropy_SW": ((SEEDS, twins.WINDOW), "float32")})
        if wrong is not None:
            return wrong
        reference = wide(twins.ensemble()[f"{self.model}/{p.dtype}/final"])
        margin = SHARE * float(reference.std(ddof=1))
        difference = wide(outputs["entropy_SW"]).mean(axis=1) - reference[:SEEDS]
        if not np.isfinite(difference).all():
            return Judgement(Status.FAIL_NONFINITE, detail="the loss of a run is not finite")
        mean, deviation = float(difference.mean()), float(difference.std(ddof=1))
        half = student(1 - LEVEL, SEEDS - 1) * deviation / math.sqrt(SEEDS)
        furthest, nearest = abs(mean) + half, abs(mean) - half
        used = furthest / margin
        detectors = {"bound": used, "rms": None, "bias": None, "exact": None}
        what = (
            f"mean paired difference {mean:.2g}, 90 % interval +- {half:.2g}, margin {margin:.2g} (half of the "
            "reference's deviation between seeds)"
        )
        if furthest <= margin:
            return Judgement(Status.PASS, used, detectors)
        if nearest >= margin:
            return Judgement(Status.DEGRADED, used, detectors, what)
        return Judgement(
            Status.INCONCLUSIVE, used, detectors,
            f"{what}; {SEEDS} seeds, and {needed(deviation, margin)} have 80 % power at this deviation",
        )  # fmt: skip


_WHAT = (
    "Final losses of 24 seeds of a small {0}, each paired with the reference's of the same seed: equivalent if two "
    "one-sided t-tests at 5 % prove the mean difference below half of the deviation between seeds. INCONCLUSIVE, with "
    "the seeds that 80 % power takes, where they do not; DEGRADED where the difference is proved to be larger."
)
CASES = (
    Paired("trajectory.paired_ling", "trajectory", ("layer",), _WHAT.format("model in the shape of Ling-Lite"), "ling"),
    Paired("trajectory.paired_llama", "trajectory", ("experts",), _WHAT.format("dense control of equal size"), "llama"),
)
