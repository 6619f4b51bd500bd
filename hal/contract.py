# SPDX-License-Identifier: Apache-2.0
"""The numerics contract: what a device promises about its arithmetic, from which every tolerance is derived.

A backend *declares* a contract; the conformance suite derives its bounds from it, so a promise that is too
good makes the device fail. What is not promised is "unspecified", and the suite then accepts every
conforming choice. A promise that nobody can know is *assumed*, and measured before anything is held to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from hal.matrix_unit import MatrixUnit

Rounding = Literal["nearest", "truncate"]


@dataclass(frozen=True)
class Arithmetic:
    """How a matrix product over one storage dtype is computed.

    Attributes:
        accumulator_bits: significand bits of the accumulator, the hidden one included (float32: 24).
        rounding: rounding of each accumulation. "nearest" has mean zero; "truncate" has a known bias.
        input_bits: significand bits that survive of each input; None means all of them. A float32 product on
            TF32 units keeps 11.
        flushes_below: operands of a smaller magnitude count as zero: 2^-14 for float16 on CDNA2. 0 where none do, or
            only numbers that are subnormal in float32.
    """

    accumulator_bits: int = 24
    rounding: Rounding = "nearest"
    input_bits: int | None = None
    flushes_below: float = 0.0

    @property
    def unit_roundoff(self) -> float:
        """The largest relative error of one accumulation, half a unit in the last place or a whole one cut off."""
        return 2.0 ** (-self.accumulator_bits if self.rounding == "nearest" else 1 - self.accumulator_bits)


def arithmetic(unit: MatrixUnit, min_exponent: int) -> Arithmetic:
    """Return what is promised of products on a unit whose rule is known.

    Args:
        unit: the rule.
        min_exponent: of the operands' normal numbers.
    """
    bits = {"float64": 53, "float32_13": 14, "float16": 11}.get(unit.result, 24)
    cuts = unit.kind in ("truncated", "floored")
    flushes = unit.kind == "pairwise" and min_exponent > -126
    return Arithmetic(bits, "truncate" if cuts else "nearest", flushes_below=2.0**min_exponent if flushes else 0.0)


FLOAT32_ACCUMULATION: Mapping[str, Arithmetic] = MappingProxyType(
    {
        "float64": Arithmetic(accumulator_bits=53),
        "float32": Arithmetic(),
        "bfloat16": Arithmetic(),
        "float16": Arithmetic(),
    }
)
"""IEEE accumulation in float32 for every storage dtype up to 32 bits: what a CPU promises."""

TRUNCATING_MATRIX_UNITS: Mapping[str, Arithmetic] = MappingProxyType(
    {
        "float64": Arithmetic(accumulator_bits=53),
        "float32": Arithmetic(),
        "bfloat16": Arithmetic(rounding="truncate"),
        "float16": Arithmetic(rounding="truncate"),
    }
)
"""Matrix units that align the products of a group to the largest exponent and cut the rest off, as every
recorded GPU generation does for 16-bit inputs (arXiv:2511.10909)."""


@dataclass(frozen=True)
class Contract:
    """What a device promises about its arithmetic.

    Attributes:
        matmul: storage dtype name to its `Arithmetic`; a dtype that is missing is not promised at all.
        subnormals: whether subnormal inputs and results survive. Not promised unless said: even CPUs with
            16-bit dot products take them for zero (the instruction VDPBF16PS, by its manual).
        nonfinite: "ieee" keeps infinities and NaN; "saturate" replaces them by the largest finite value.
        topk_ties: which index `topk` returns among equal values.
        evidence: where the promise comes from.
        basis: "assumed" where nothing is published or recorded. The conformance suite then measures the device first,
            and holds it to no more than it saw: "measured" (`hal.probe.measured`).
    """

    matmul: Mapping[str, Arithmetic] = field(default_factory=lambda: FLOAT32_ACCUMULATION)
    subnormals: Literal["preserved", "flushed", "unspecified"] = "unspecified"
    nonfinite: Literal["ieee", "saturate"] = "ieee"
    topk_ties: Literal["lower_index", "unspecified"] = "unspecified"
    evidence: str = "IEEE 754 binary32 accumulation"
    basis: Literal["known", "assumed", "measured"] = "known"

    def as_json(self) -> dict[str, object]:
        """Return the contract as plain JSON values."""
        return {
            "matmul": {
                dtype: {
                    "accumulator_bits": rule.accumulator_bits,
                    "rounding": rule.rounding,
                    "input_bits": rule.input_bits,
                    "flushes_below": rule.flushes_below,
                }
                for dtype, rule in sorted(self.matmul.items())
            },
            "subnormals": self.subnormals,
            "nonfinite": self.nonfinite,
            "topk_ties": self.topk_ties,
            "evidence": self.evidence,
            "basis": self.basis,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> Contract:
        """Read a contract back from `as_json`.

        Raises:
            ValueError, TypeError, KeyError: the data is not of that form.
        """
        matmul = data["matmul"]
        if not isinstance(matmul, Mapping):
            raise TypeError(f"'matmul' must be a mapping, not {type(matmul).__name__}")
        rules: dict[str, Arithmetic] = {}
        for dtype, rule in matmul.items():
            arithmetic = Arithmetic(**rule)
            bits = arithmetic.accumulator_bits
            if type(bits) is not int or not 2 <= bits <= 113 or arithmetic.rounding not in ("nearest", "truncate"):
                raise ValueError(f"no such arithmetic for {dtype}: {rule}")
            kept = arithmetic.input_bits
            if kept is not None and (type(kept) is not int or not 2 <= kept <= 53):
                raise ValueError(f"input_bits of {dtype} must be null or an integer from 2 to 53")
            below = arithmetic.flushes_below
            if type(below) not in (int, float) or not 0.0 <= below <= 1.0:
                raise ValueError(f"flushes_below of {dtype} must be a number from 0 to 1")
            rules[str(dtype)] = arithmetic
        choices = {
            "subnormals": ("preserved", "flushed", "unspecified"),
            "nonfinite": ("ieee", "saturate"),
            "topk_ties": ("lower_index", "unspecified"),
            "basis": ("known", "assumed", "measured"),
        }
        for key, allowed in choices.items():
            if data[key] not in allowed:
                raise ValueError(f"{key!r} must be one of {', '.join(allowed)}, not {data[key]!r}")
        return cls(
            matmul=MappingProxyType(rules),
            subnormals=data["subnormals"],  # type: ignore[arg-type]
            nonfinite=data["nonfinite"],  # type: ignore[arg-type]
            topk_ties=data["topk_ties"],  # type: ignore[arg-type]
            evidence=str(data["evidence"]),
            basis=data["basis"],  # type: ignore[arg-type]
        )
