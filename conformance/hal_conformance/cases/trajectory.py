# SPDX-License-Identifier: Apache-2.0
"""What the cases of training trajectories share."""

from __future__ import annotations

from hal_conformance.cases.base import Base
from hal_conformance.language.ensemble import DTYPES


class Trajectory(Base):
    """A case that trains a model of its own: the preset says nothing about it."""

    def presets(self) -> tuple[str, ...]:
        """See `Case.presets`."""
        return ("ling-lite",)

    def dtypes(self) -> tuple[str, ...]:
        """See `Case.dtypes`: training in float16 needs a loss scale, and no published model does it."""
        return DTYPES


class Statistical(Trajectory):
    """One that is compared with other runs: nothing of it has a bound, and what exceeds 1 is amber."""
