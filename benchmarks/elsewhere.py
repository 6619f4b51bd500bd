# SPDX-License-Identifier: Apache-2.0
"""An honest implementation that computes more widely than the portable one: to `compare`, another device.

Exact results have the same bits; most others differ in some.
"""

from __future__ import annotations

from hal_conformance.faults import VARIATIONS
from hal_conformance.portable import Portable, portable

_WIDE = ("wide_fused", "wide_norms", "wide_adam")  # the first that has an operator answers for it

ops = Portable(*(VARIATIONS[name].make() for name in _WIDE), portable)
