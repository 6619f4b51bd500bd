# SPDX-License-Identifier: Apache-2.0
"""Where a device's arithmetic is less than its backend declares, and the contract that the measurement supports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from hal.contract import Arithmetic, Contract
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
        below = _flushes_below(facts)
        if below > promised.flushes_below:
            found.append(
                f"{format}: the contract promises all operands, those below {below:g} count as zero"
            )
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


def measured(units: Mapping[str, UnitFacts], declared: Contract) -> Contract:
    """Return a contract that promises no more than was measured, nor more than was declared of a format that was.

    Products of one shape were measured. A library may have other kernels, which the vendor's own promise covers; so of
    a format with both, the weaker holds. A format that nobody has declared is promised as it was measured.
    """
    matmul = dict(declared.matmul)
    for format, facts in units.items():
        bits, of_input = facts.accumulator_bits, facts.input_bits
        if format in ("tf32", "hf32") or bits is None or facts.sums is None or of_input is None:
            continue
        seen = Arithmetic(
            accumulator_bits=bits,
            rounding="nearest" if facts.sums.startswith("nearest") else "truncate",
            input_bits=of_input if of_input < FORMATS[format].bits else None,
            flushes_below=_flushes_below(facts),
        )
        matmul[format] = _weaker(seen, matmul[format]) if format in matmul else seen
    flushed = any("flushed" in (facts.subnormal_inputs, facts.subnormal_results) for facts in units.values())
    return replace(declared, matmul=matmul, subnormals="flushed" if flushed else declared.subnormals)


def _flushes_below(facts: UnitFacts) -> float:
    """Return below which magnitude operands were seen to count as zero, if that is more than float32's subnormals."""
    least = FORMATS[facts.format].min_exponent
    return 2.0**least if facts.subnormal_inputs == "flushed" and least > -126 else 0.0


def _weaker(one: Arithmetic, other: Arithmetic) -> Arithmetic:
    kept = [bits for bits in (one.input_bits, other.input_bits) if bits is not None]
    return Arithmetic(
        accumulator_bits=min(one.accumulator_bits, other.accumulator_bits),
        rounding="truncate" if "truncate" in (one.rounding, other.rounding) else "nearest",
        input_bits=min(kept) if kept else None,
        flushes_below=max(one.flushes_below, other.flushes_below),
    )
