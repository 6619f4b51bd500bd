# SPDX-License-Identifier: Apache-2.0
"""The experts at every count of rows from 0 to 257, forward and backward: kernels lose tails at particular counts.

Narrow matrices of integers, whose results are exact in every order of summation: a lost row is seen, and it is cheap.
At every scale and seed all counts are there; the seed chooses which expert has which.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import numpy as np

from hal.moe.presets import preset
from hal_conformance import inputs as make
from hal_conformance.case import I64, Arrays, Footprint, Params
from hal_conformance.cases import designs
from hal_conformance.cases.experts_backward import BackwardIntegers
from hal_conformance.cases.experts_exact import Integers

MANY, FEW = "ling-2.0-mini", "ling-lite"
"""256 experts and 64."""

SWEPT = range(2, 258)
BEYOND = (0, 1, 383, 384, 385, 511, 512, 513, 1024, 1025)
"""What 256 experts leave over, whole tiles of 128 and 256 rows, and what exceeds them by one or lacks one."""

WIDTH = HIDDEN = 24


def counts(p: Params) -> I64:
    """Return [E] counts, permuted: `SWEPT` for 256 experts; `BEYOND` for fewer, and one row for each of the others."""
    experts = preset(p.preset).router.num_experts
    swept = [*SWEPT] if experts == len(SWEPT) else [*BEYOND, *[1] * (experts - len(BEYOND))]
    return np.array(swept, np.int64)[make.permutation(p.seed, "sweep/order", experts)]


KINDS = 521
"""Different rows, a prime: they are repeated, since 33,000 of them would take longer to make than to judge."""


def repeated(design: Callable[[designs.Size], Arrays], p: Params) -> Arrays:
    """Return the inputs of a design, its rows repeated until there are enough."""
    of = counts(p)
    few = np.zeros_like(of)
    few[0] = KINDS
    arrays = design(designs.Size(few, WIDTH, HIDDEN, p.dtype, p.seed))
    rows = np.arange(of.sum()) % KINDS
    return {**arrays, "counts_E": of, **{name: a[rows] for name, a in arrays.items() if name.endswith("_RD")}}


class Swept:
    """What both directions share; comes before the case that it sweeps."""

    AT_TINY: ClassVar[tuple[str, ...]] = (MANY, FEW)

    @staticmethod
    def design(size: designs.Size) -> Arrays:
        """Return the inputs of the case that is swept, for other counts."""
        raise NotImplementedError

    def presets(self) -> tuple[str, ...]:
        """See `Case.presets`."""
        return (MANY, FEW)

    def dtypes(self) -> tuple[str, ...]:
        """See `Case.dtypes`: which rows a kernel reads does not depend on which of the 16-bit dtypes they have."""
        return ("float32", "bfloat16")

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`."""
        return repeated(self.design, p)

    def footprint(self, p: Params) -> Footprint:
        """See `Case.footprint`."""
        return Footprint()


class Sweep(Swept, Integers):
    """Every count, forward."""

    design = staticmethod(designs.integers)


class BackwardSweep(Swept, BackwardIntegers):
    """Every count, forward and backward."""

    design = staticmethod(designs.backward_integers)


_COUNTS = (
    "narrow, and at every scale with 0 to 257, 383 to 385, 511 to 513, 1,024 and 1,025 rows to an expert: each count "
    "occurs, whatever the seed. A row that is lost at one count alone shows, bit by bit."
)
CASES = (
    Sweep("experts.sweep", "experts", ("experts",), "As experts.integers, " + _COUNTS),
    BackwardSweep("experts.backward_sweep", "experts", ("experts",), "As experts.backward_integers, " + _COUNTS),
)
