# SPDX-License-Identifier: Apache-2.0
"""The contract that a measurement supports, of a device whose own one is assumed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from hal.contract import Arithmetic, Contract
from hal.matrix_unit import FORMATS
from hal.probe.contradiction import contradictions
from hal.probe.facts import UnitFacts, fingerprint
from hal.probe.kernels import topk_ties
from hal.probe.multiplier import multipliers
from hal.probe.unit import unit_facts
from hal.probe.whole import products

if TYPE_CHECKING:
    from hal.device import Device


def measured_contract(device: Device) -> Contract:
    """Probe an opened device, and return the contract that this supports; `measured` says how much.

    Its evidence names the fingerprint, by which devices of one kind that do not compute alike differ, and what was
    assumed and does not hold.
    """
    found, _ = multipliers(device)
    units = {format: unit_facts(multiply) for format, multiply in found.items()}
    assumed = device.contract
    wholes = {format: products(multiply, units[format].inner).digest for format, multiply in found.items()}
    sentences = contradictions(assumed, units, topk_ties(device.torch_device))
    evidence = "; ".join((f"measured here, fingerprint {fingerprint(units, wholes)}", *sentences, assumed.evidence))
    return replace(measured(units, assumed), evidence=evidence)


def measured(units: Mapping[str, UnitFacts], declared: Contract) -> Contract:
    """Return a contract that promises no more than was measured, nor more than was declared of a format that was.

    Products of one shape were measured, and a library may have other kernels; so of a format with both, the weaker
    holds. A format that nobody has declared is promised as it was measured. Operands of float32 that lose bits are not
    excused: whether they are read as TF32 or HF32 is a switch, and a run in which it is on unasked must show.
    """
    matmul = dict(declared.matmul)
    for format, facts in units.items():
        bits, of_input = facts.accumulator_bits, facts.input_bits
        if format in ("tf32", "hf32") or bits is None or facts.sums is None or of_input is None:
            continue
        seen = Arithmetic(
            accumulator_bits=bits,
            rounding="nearest" if facts.sums.startswith("nearest") else "truncate",
            input_bits=of_input if of_input < FORMATS[format].bits and format != "float32" else None,
            flushes_below=facts.flushes_below,
        )
        matmul[format] = _weaker(seen, matmul[format]) if format in matmul else seen
    flushed = any("flushed" in (facts.subnormal_inputs, facts.subnormal_results) for facts in units.values())
    return replace(declared, matmul=matmul, subnormals="flushed" if flushed else declared.subnormals, basis="measured")


def _weaker(one: Arithmetic, other: Arithmetic) -> Arithmetic:
    kept = [bits for bits in (one.input_bits, other.input_bits) if bits is not None]
    return Arithmetic(
        accumulator_bits=min(one.accumulator_bits, other.accumulator_bits),
        rounding="truncate" if "truncate" in (one.rounding, other.rounding) else "nearest",
        input_bits=min(kept) if kept else None,
        flushes_below=max(one.flushes_below, other.flushes_below),
    )
