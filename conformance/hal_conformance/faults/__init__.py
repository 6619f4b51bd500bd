# SPDX-License-Identifier: Apache-2.0
"""Implementations that test the suite: wrong ones that it must flag, and honest ones that it must not.

They are whole implementations of the operators and know nothing of the cases: `--impl hal_conformance.faults:NAME`
runs one. They are small and rare as real faults are: one expert, one residue of a count, one gradient term.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from hal_conformance.faults.catalogue import VARIATIONS, Variation

__all__ = ["VARIATIONS", "Variation"]

for _module in iter_modules(__path__):  # each enters what it holds
    import_module(f"{__name__}.{_module.name}")


def __getattr__(name: str) -> Any:
    try:
        return VARIATIONS[name].make()
    except KeyError:
        raise AttributeError(f"no fault or benign variation is named {name!r}") from None
