# SPDX-License-Identifier: Apache-2.0
"""Where a device's arithmetic is less than its backend declares, or another than its architecture is known to have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from hal.contract import Contract
from hal.matrix_unit import FORMATS, MATRIX_UNITS, MatrixUnit
from hal.probe.facts import UnitFacts
from hal.probe.rules import ADDITIONS, GUESSES, OF_LIBRARIES, Likeness, differences, expected
from hal.probe.special import named


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
        if contract.nonfinite == "ieee":
            found += [f"{format}: {sentence}" for sentence in _not_ieee(facts)]
    if contract.topk_ties == "lower_index" and topk_ties != "lower index":
        found.append(f"the contract promises the lower index of equal numbers, top-k takes {topk_ties}")
    return tuple(found)


def _not_ieee(facts: UnitFacts) -> Iterator[str]:
    if facts.infinity not in (None, "kept"):
        yield f"the contract promises infinities, one becomes {named(facts.infinity)}"
    if (became := facts.overflow_stored) not in (None, "infinity"):
        yield f"the contract promises infinities, a sum beyond the largest number becomes {named(became)}"
    if facts.nan not in (None, "kept"):
        yield f"the contract promises NaN, what should be one becomes {named(facts.nan)}"


def of_architecture(arch: str | None, units: Mapping[str, UnitFacts], likeness: Likeness) -> tuple[str, ...]:
    """Return one sentence for each format that is not what the declared architecture is known to do with it.

    Nothing is said where nothing is known of the architecture, nor of what a library decides: the order of additions
    and the signs of zeros outside of a matrix unit, pieces of K, and which formats it multiplies at all.

    Args:
        arch: that the backend declares.
        units: what was measured.
        likeness: to known architectures.
    """
    if arch is None or arch not in MATRIX_UNITS or arch in GUESSES:
        return ()
    rules = MATRIX_UNITS[arch]
    found = []
    if likeness.exact and arch not in likeness.archs:
        others = ", ".join(likeness.archs)
        found.append(f"the declared architecture is {arch}, but this is the known arithmetic of {others}")
    for format, names in differences(units, rules).items():
        if format in units and format in rules:
            said = [_said(name, rules[format], units[format]) for name in names
                    if name not in OF_LIBRARIES or rules[format].kind != "fused"]  # fmt: skip
            if said:
                found.append(f"{format}: the declared architecture, {arch}, is known to have {'; '.join(said)}")
    if arch in likeness.archs and not likeness.differences:
        found += [
            f"{format}: of {elements} elements of whole products, {count} are not what the declared architecture, "
            f"{arch}, is known to make of them"
            for format, (count, elements) in likeness.whole.items()
        ]
    return tuple(found)


def _said(name: str, unit: MatrixUnit, facts: UnitFacts) -> str:
    if name in ADDITIONS:
        return "another order of additions" if name == "tree" else "another order of additions in longer products"
    want, got = expected(unit, facts.format)[name], facts.arithmetic[name]
    return f"{named(name.replace('_', ' '))} {_word(want)}, not {_word(got)}"


def _word(value: object) -> str:
    return "none" if value is None else named(str(value))
