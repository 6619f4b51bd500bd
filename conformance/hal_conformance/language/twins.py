# SPDX-License-Identifier: Apache-2.0
"""Honest twins of a training run: the same model, computed in another order, from parameters that differ in one ulp.

Permuting the channels, the hidden units, and the experts is a symmetry of the equations, and changes the order of every
sum and of every tie; half of the twins keep more inside an expert than the contract asks for. What sets a twin's loss
apart from another's is therefore what sets an honest device's apart: order, ties, store points, and what the model
makes of them in time.

Legend: D model dim, E experts, F their hidden dim, S of the shared experts.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hal_conformance import inputs as make
from hal_conformance.case import I64, Arrays
from hal_conformance.language.spec import LanguageSpec


def twin(start: Arrays, spec: LanguageSpec, number: int) -> Arrays:
    """Return the parameters of one twin: permuted along D, E, F and S, each moved by at most an ulp."""
    found: Arrays = {}
    orders: dict[str, I64] = {}
    for name, array in start.items():
        block, _, kind = name.rpartition("/")
        letters = kind.rsplit("_", 1)[-1]
        changed = array * (1.0 + make.integers(number, f"twin/{name}", -1, 1, *array.shape) * 2.0**-23)
        for axis, letter in enumerate(letters):
            if letter not in "DEFS":
                continue
            # The channels run through the whole model; experts and their units are a block's own.
            where = letter if letter == "D" else f"{block}/{letter}"
            if where not in orders:
                orders[where] = make.permutation(number, f"twin/order/{where}", array.shape[axis])
            changed = np.take(changed, orders[where], axis)
        found[name] = changed.astype(np.float32)
    return found


def operators(number: int) -> Any:
    """Return the implementation of one twin: every other one keeps an expert's inside in float32."""
    from hal_conformance.faults.benign import FusedExpert
    from hal_conformance.portable import portable

    return FusedExpert() if number % 2 else portable
