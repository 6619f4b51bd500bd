# SPDX-License-Identifier: Apache-2.0
"""What was found out about one product: format in, format out, and everything that decides its bits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from types import MappingProxyType

from hal.matrix_unit import FORMATS


@dataclass(frozen=True)
class UnitFacts:
    """How a device multiplies operands of one format, as measured. What cannot be shown is None.

    Attributes:
        format: of the operands, a key of `hal.matrix_unit.FORMATS`.
        partner: of the second one, where the device does not multiply two of `format`.
        result: dtype of the result.
        inner: inner length K of the product that was probed.
        order: in which order products are added, in words; why there is no tree, if there is none.
        tree: the same in parentheses (`hal.probe.tree.Tree.text`).
        longer: by a longer K, the tree of a few of its products, evenly spaced; or why there is none.
        group: products that are added at once.
        accumulator_bits: significand bits that a sum keeps.
        accumulator_at_least: whether the format's range ends there, so that there may be more.
        alignment_bits: bits that products added at once keep below the leading one of the largest.
        aligned: what becomes of the rest: "cut", "rounded down" or "nearest".
        exponents: by which products are aligned: "summed" ones of the operands, or of "normalised" products.
        products_under_sum: bits that products keep below the leading one of a larger sum, if not all.
        rest_under_sum: what becomes of the rest of them: "cut" or "rounded down".
        sum_under_product: bits that a sum keeps below the leading one of a larger product, if not all.
        sums: how a sum is rounded to the accumulator.
        small_sum: what becomes of a small sum under a large product: "dropped" or "rounded down".
        products: "exact" or "rounded".
        stored: how a sum is rounded to a result with fewer bits.
        input_bits: significand bits that survive of an operand.
        input_rounding: what becomes of the others.
        subnormal_inputs: "kept" or "flushed".
        subnormal_results: the same.
        overflow: products beyond 2^128 that cancel: "cancels" or "infinity".
        overflow_stored: what finite products become whose sum is beyond the largest number of the result: "infinity",
            "largest", "nan", or a number; as the next, it may differ by question (`hal.probe.special.Extremes`).
        infinity: "kept", or what an infinite operand becomes.
        nan: "kept", or what becomes of one, of infinity times zero, or of infinity less infinity.
        nan_bits: of a NaN as it is stored, in hexadecimal; a conversion may have made them.
        zero_signs: "kept", or which zeros are not those of IEEE arithmetic whose sums begin with +0.
    """

    format: str
    result: str
    inner: int
    order: str
    partner: str | None = None
    tree: str | None = None
    longer: Mapping[str, str] = field(default_factory=dict)
    group: int | None = None
    accumulator_bits: int | None = None
    accumulator_at_least: bool = False
    alignment_bits: int | None = None
    aligned: str | None = None
    exponents: str | None = None
    products_under_sum: int | None = None
    rest_under_sum: str | None = None
    sum_under_product: int | None = None
    sums: str | None = None
    small_sum: str | None = None
    products: str | None = None
    stored: str | None = None
    input_bits: int | None = None
    input_rounding: str | None = None
    subnormal_inputs: str | None = None
    subnormal_results: str | None = None
    overflow: str | None = None
    overflow_stored: str | None = None
    infinity: str | None = None
    nan: str | None = None
    nan_bits: str | None = None
    zero_signs: str | None = None

    @property
    def name(self) -> str:
        """The format, and the partner's where it is another."""
        return self.format if self.partner is None else f"{self.format} by {self.partner}"

    @property
    def arithmetic(self) -> Mapping[str, object]:
        """The facts that decide bits: all but names, and of a NaN its code."""
        names = {"format", "partner", "result", "inner", "order", "nan_bits"}
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in names}

    @property
    def flushes_below(self) -> float:
        """Below which magnitude operands were seen to count as zero, if that is more than float32's subnormals."""
        least = FORMATS[self.format].min_exponent
        return 2.0**least if self.subnormal_inputs == "flushed" and least > -126 else 0.0

    def as_json(self) -> dict[str, object]:
        """Return plain JSON values."""
        return asdict(self)


def fingerprint(units: Mapping[str, UnitFacts], others: Mapping[str, object] = MappingProxyType({})) -> str:
    """Return twelve hexadecimal digits that two devices share if all that was measured of their arithmetic is alike.

    Args:
        units: the facts of each format.
        others: what else was measured, as plain JSON values.
    """
    named = {name: {"inner": facts.inner, **facts.arithmetic} for name, facts in sorted(units.items())}
    return hashlib.sha256(json.dumps([named, dict(others)], sort_keys=True).encode()).hexdigest()[:12]
