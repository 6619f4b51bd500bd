# SPDX-License-Identifier: Apache-2.0
"""What a device may return where the exact result is not finite."""

from __future__ import annotations

import numpy as np

from hal.contract import Contract
from hal_conformance.case import Array


def admitted(expected: Array, got: Array, contract: Contract) -> Array:
    """Return what is expected, with the device's own element where it is free to choose.

    For an infinity NaN is right, too: units that split a float32 into parts take inf - inf. Where the contract replaces
    infinities and NaN by finite values, nothing is promised of such an element.
    """
    if contract.nonfinite != "ieee":
        return np.where(np.isfinite(expected), expected, got)
    return np.where(np.isinf(expected) & np.isnan(got), got, expected)
