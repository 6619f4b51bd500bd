# SPDX-License-Identifier: Apache-2.0
"""Implementations that test the suite: wrong ones that it must flag, and honest ones that it must not.

They are whole implementations of the operators and know nothing of the cases: `--impl hal_conformance.faults:NAME`
runs one. They are small and rare as real faults are: one expert, one residue of a count, one gradient term.
"""

from __future__ import annotations

from typing import Any

import hal_conformance.faults.benign
import hal_conformance.faults.combine
import hal_conformance.faults.dispatch
import hal_conformance.faults.experts
import hal_conformance.faults.layer
import hal_conformance.faults.losses
import hal_conformance.faults.products
import hal_conformance.faults.route_alone
import hal_conformance.faults.router
import hal_conformance.faults.training  # noqa: F401  each module enters what it holds
from hal_conformance.faults.catalogue import VARIATIONS, Variation

__all__ = ["VARIATIONS", "Variation"]


def __getattr__(name: str) -> Any:
    try:
        return VARIATIONS[name].make()
    except KeyError:
        raise AttributeError(f"no fault or benign variation is named {name!r}") from None
