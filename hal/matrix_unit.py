# SPDX-License-Identifier: Apache-2.0
"""How a matrix unit computes a dot product, bit for bit, and the table of the units that are known.

Sources: arXiv:2511.10909 (MMA-Sim) and arXiv:2512.07004, two models that were made independently; the second also
publishes products recorded on V100, A100, A2, Ada, L40S, H100, H200 and B200. For a finite x other than zero of a
format whose smallest normal exponent is m, the exponent is e(x) = max(floor(log2 |x|), m) and the significand
s(x) = x 2^-e(x), below 1 for a subnormal. A product has s(a) s(b), which is not normalised, and e(a) + e(b).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

Evidence = Literal["recorded hardware", "two models", "same architecture", "unverified"]
"""Recorded products of such a device are reproduced; two independent models agree; another device of this architecture
has such evidence; nobody has published anything."""


@dataclass(frozen=True)
class InputFormat:
    """A format of operands: `bits` of the significand, the hidden one included, and the smallest normal exponent."""

    bits: int
    min_exponent: int


FORMATS: Mapping[str, InputFormat] = MappingProxyType(
    {
        "float64": InputFormat(53, -1022),
        "float32": InputFormat(24, -126),
        "tf32": InputFormat(11, -126),
        "hf32": InputFormat(12, -126),
        "bfloat16": InputFormat(8, -126),
        "float16": InputFormat(11, -14),
        "float8_e4m3fn": InputFormat(4, -6),
        "float8_e5m2": InputFormat(3, -14),
        "float8_e4m3fnuz": InputFormat(4, -7),
        "float8_e5m2fnuz": InputFormat(3, -15),
    }
)
PARTNERS: Mapping[str, str] = MappingProxyType({"float8_e5m2": "float8_e4m3fn"})
"""Of formats that some libraries do not multiply with themselves: gradients of e5m2 meet weights of e4m3."""


@dataclass(frozen=True)
class MatrixUnit:
    """One rule: d = c + the products of K pairs, `group` of them at a time in the order of k, d being the next c.

    Attributes:
        kind: what is done with the products of a group and with c.
            "truncated": with E the largest exponent of all of them, c included, each is cut toward zero to a multiple
            of 2^(E - fraction_bits); the sum of these is exact, and is cut toward zero to `result` (rounded to nearest
            for float16). Products beyond 2^128 are no infinities yet.
            "floored": the products alone are aligned and cut so, with E over them; their sum is then rounded down to
            31 and c to 24 bits below the larger exponent of the two, and the sum of both to nearest.
            "pairwise": subnormal operands are zero; every product and every sum is rounded to float32, a subnormal one
            to zero; neighbours are added first, their sums next, and that sum to c.
            "fused": a chain of fused multiply-adds, rounded to nearest in the format of the operands.
        group: products that are fused, L.
        fraction_bits: below E, F; unused by "pairwise" and "fused".
        result: format of d: "float32"; "float32_13" keeps 13 fraction bits of it; "float16"; "float64".
        exponent_floor: E is at least this. Only results below 2^-118 show it, and the models disagree about them.
        interleaved: products of even and of odd k are summed apart, each with an E of its own ("floored").
        evidence: for the rule.
    """

    kind: Literal["truncated", "floored", "pairwise", "fused"]
    group: int = 1
    fraction_bits: int = 0
    result: Literal["float32", "float32_13", "float16", "float64"] = "float32"
    exponent_floor: int | None = None
    interleaved: bool = False
    evidence: Evidence = "two models"


_IEEE: Mapping[str, MatrixUnit] = {
    "float32": MatrixUnit("fused"), "float64": MatrixUnit("fused", result="float64"),
}  # fmt: skip


def _truncated(group: int, bits: int, floor: int | None, evidence: Evidence = "recorded hardware") -> MatrixUnit:
    return MatrixUnit("truncated", group, bits, exponent_floor=floor, evidence=evidence)


def _narrow(group: int, floor: int) -> MatrixUnit:
    """FP8 of Ada and Hopper: 13 bits are kept below the largest exponent, and of the sum."""
    return MatrixUnit("truncated", group, 13, "float32_13", floor, evidence="recorded hardware")


def _fp8(unit: MatrixUnit, family: str = "") -> Mapping[str, MatrixUnit]:
    return dict.fromkeys((f"float8_e4m3{family or 'fn'}", f"float8_e5m2{family}"), unit)


_AMPERE = {**_IEEE, **dict.fromkeys(("bfloat16", "float16"), _truncated(8, 24, -132)), "tf32": _truncated(4, 24, -132)}
_HOPPER = {**_IEEE, **dict.fromkeys(("bfloat16", "float16"), _truncated(16, 25, -133)), "tf32": _truncated(8, 25, -133)}


def _unpublished(of_16_bits: MatrixUnit) -> Mapping[str, MatrixUnit]:
    """The cube of davinci: float32 sums, HF32 for float32 operands, by documents that say nothing of alignment,
    groups or rounding; no unit for float64."""
    of_32_bits = MatrixUnit("fused", evidence="unverified")
    return {
        "float32": of_32_bits, "hf32": of_32_bits, **dict.fromkeys(("bfloat16", "float16"), of_16_bits),
    }  # fmt: skip


MATRIX_UNITS: Mapping[str, Mapping[str, MatrixUnit]] = MappingProxyType(
    {
        "sm_70": {**_IEEE, "float16": _truncated(4, 23, None)},
        "sm_75": {**_IEEE, "float16": _truncated(8, 24, None, "two models")},
        "sm_80": _AMPERE,
        "sm_86": _AMPERE,
        "sm_89": {**_AMPERE, **_fp8(_narrow(16, -132))},
        "sm_90": {**_HOPPER, **_fp8(_narrow(32, -133))},
        "sm_100": {**_HOPPER, **_fp8(_truncated(32, 25, -133, "two models"))},
        "gfx90a": {**_IEEE, **dict.fromkeys(("bfloat16", "float16"), MatrixUnit("pairwise", 4))},
        "gfx942": {
            **_IEEE,
            **dict.fromkeys(("bfloat16", "float16"), MatrixUnit("floored", 8, 24)),
            "tf32": MatrixUnit("floored", 4, 24),
            **_fp8(MatrixUnit("floored", 16, 24, interleaved=True), "fnuz"),
        },
        # Two guesses, between which only a probe of the card can tell.
        "davinci, nearest": _unpublished(MatrixUnit("fused", evidence="unverified")),
        "davinci, cut": _unpublished(_truncated(16, 24, None, "unverified")),
    }
)
"""Architecture to format of the operands to rule. float32 and float64 run outside the matrix units or through them,
and are chains of fused multiply-adds in both cases (as far as anything is published)."""
