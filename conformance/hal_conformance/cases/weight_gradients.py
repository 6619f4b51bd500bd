# SPDX-License-Identifier: Apache-2.0
"""Judging the gradients of all experts' weights, which together need not fit in memory."""

from __future__ import annotations

import numpy as np

from hal_conformance.case import I64, Arrays
from hal_conformance.numerics.absent import never_shown
from hal_conformance.numerics.detectors import Finding, Meter, exact
from hal_conformance.oracle.experts import SwigluGradients
from hal_conformance.oracle.layer import ROUTED
from hal_conformance.verdicts import Status


class WeightGradients:
    """Judges the gradients of the experts' weights, a few experts at a time.

    Errors of one expert's gradient share its rows, so that there are as many independent ones as experts with rows. An
    expert without rows has gradients of exactly zero.
    """

    def __init__(self, outputs: Arrays, counts_E: I64, dtype: str) -> None:
        self._outputs = outputs
        self._dtype = dtype
        self._empty = np.flatnonzero(counts_E == 0)
        self._left = counts_E > 0
        used = int((counts_E > 0).sum())
        self._meters = {f"d{name}": Meter(f"d{name}", independent=used) for name in ROUTED}

    def add(self, experts: I64, gradients: SwigluGradients) -> None:
        """Take in those of a few experts; of the others nothing is there."""
        self._left[experts] = False
        for (name, meter), part in zip(self._meters.items(), gradients.weights, strict=True):
            got = self._outputs[name]
            meter.add(got[experts], part.bounded(self._dtype, got.size), experts)

    def findings(self) -> list[Finding]:
        """Return what was found, and whether experts without rows have zeros."""
        found = [meter.finding() for meter in self._meters.values()]
        for name in self._meters:
            never_shown(int(self._left.sum()) * self._outputs[name][0].size)
            if not self._empty.size:
                continue
            zeros = exact(
                f"{name} of experts without rows", self._outputs[name][self._empty],
                np.zeros_like(self._outputs[name][self._empty]),
            )  # fmt: skip
            if zeros.status is not Status.EXACT:
                found.append(zeros)
        return found
