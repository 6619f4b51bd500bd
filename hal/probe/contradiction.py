# SPDX-License-Identifier: Apache-2.0
"""Where a device's arithmetic is less than its backend declares."""

from __future__ import annotations

from collections.abc import Mapping

from hal.contract import Contract
from hal.matrix_unit import FORMATS
from hal.probe.facts import UnitFacts


def contradictions(contract: Contract, units: Mapping[str, UnitFacts], topk_ties: str) -> tuple[str, ...]:
    """Return one sentence for each promise that was measured not to hold."""
    found = []
    for format, promised in contract.matmul.items():
        facts = units.get(format)
        if facts is None:
            continue
        bits = facts.accumulator_bits
        if bits is not None and not facts.accumulator_at_least and bits < promised.accumulator_bits:
            found.append(f"{format}: the contract promises sums of {promised.accumulator_bits} bits, they keep {bits}")
        if promised.rounding == "nearest" and facts.sums is not None and not facts.sums.startswith("nearest"):
            found.append(f"{format}: the contract promises sums rounded to nearest, they are rounded {facts.sums}")
        wanted = promised.input_bits or FORMATS[format].bits
        if facts.input_bits is not None and facts.input_bits < wanted:
            found.append(f"{format}: the contract promises operands of {wanted} bits, {facts.input_bits} survive")
        if (below := facts.flushes_below) > promised.flushes_below:
            found.append(f"{format}: the contract promises all operands, those below {below:g} count as zero")
    for format, facts in units.items():
        lost = [what for what, seen in (("operands", facts.subnormal_inputs), ("results", facts.subnormal_results))
                if seen == "flushed"]  # fmt: skip
        if contract.subnormals == "preserved" and lost:
            found.append(f"{format}: the contract promises subnormal numbers, {' and '.join(lost)} lose them")
        if contract.nonfinite == "ieee" and facts.infinity not in (None, "kept"):
            found.append(f"{format}: the contract promises infinities, one becomes {facts.infinity}")
        if contract.nonfinite == "ieee" and facts.nan == "none":
            found.append(f"{format}: the contract promises NaN, infinity times zero is none")
    if contract.topk_ties == "lower_index" and topk_ties != "lower index":
        found.append(f"the contract promises the lower index of equal numbers, top-k takes {topk_ties}")
    return tuple(found)
