# SPDX-License-Identifier: Apache-2.0
"""The one false-alarm budget, from which every statistical threshold of the suite follows.

An honest subject is to be called wrong in at most one of a million complete runs. A run makes at most
`TESTS_PER_RUN` statistical tests (one detector on one array; the largest run, all presets in all dtypes, makes
more than half of that, and a test counts them), so by the union bound each test may raise a false alarm with
probability `SHARE`. A test of n elements divides its share by n again. No other number is chosen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

FALSE_ALARMS_PER_RUN = 1e-6
TESTS_PER_RUN = 2**17
SHARE = FALSE_ALARMS_PER_RUN / TESTS_PER_RUN


@dataclass(frozen=True)
class Level:
    """How far out in the tail one element of a test must lie to be an alarm.

    Attributes:
        log_odds: L = ln(2 n / share) for n two-sided comparisons.
    """

    log_odds: float

    @property
    def deviations(self) -> float:
        """lambda = sqrt(2 L): a sub-Gaussian error of standard deviation s exceeds lambda s with odds exp(-L)."""
        return math.sqrt(2.0 * self.log_odds)

    @property
    def bridge(self) -> float:
        """L / (pi sqrt 3): the same for rounding errors along a random walk bridge (see `bounds.matmul`)."""
        return self.log_odds / (math.pi * math.sqrt(3.0))


def level(elements: int) -> Level:
    """Return the level at which `elements` comparisons together use up one test's share."""
    return Level(math.log(2.0 * max(elements, 1) / SHARE))


def rms_threshold(n2: float, n_inf: float) -> float:
    """Return the root mean square of error / sd that an honest subject exceeds with probability `SHARE`.

    For sub-Gaussian errors with correlation matrix C over n elements, P(R^2 > 1 + 2 sqrt(l / n2) + 2 l / n_inf)
    is at most exp(-l), with n2 = n^2 / tr(C^2) and n_inf = n / norm(C); independent errors have n2 = n_inf = n.

    Source: Hsu, Kakade, Zhang 2012, "A tail inequality for quadratic forms of subgaussian random vectors".
    """
    odds = -math.log(SHARE)
    return math.sqrt(1.0 + 2.0 * math.sqrt(odds / max(n2, 1e-9)) + 2.0 * odds / max(n_inf, 1e-9))


def bias_threshold() -> float:
    """Return the |z| that an honest subject's mean rounding error exceeds with probability `SHARE`."""
    return math.sqrt(2.0 * math.log(2.0 / SHARE))
