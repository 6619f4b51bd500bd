# SPDX-License-Identifier: Apache-2.0
"""Which known matrix unit a device's arithmetic is like, and in what it differs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from types import MappingProxyType

from hal.matrix_unit import FORMATS, MATRIX_UNITS, MatrixUnit
from hal.probe.facts import UnitFacts
from hal.probe.schedule import Pieces, described, finer
from hal.probe.schedule import pieces as in_pieces
from hal.probe.special import has_infinity
from hal.probe.tree import parsed
from hal.probe.whole import Products, differing


@dataclass(frozen=True)
class Likeness:
    """The architectures whose rules come closest to what was measured.

    Attributes:
        archs: keys of `MATRIX_UNITS`, all equally close.
        differences: for each format, the facts that differ, and the formats that only one of the two has.
        schedules: for each format whose K is shared out, in words how; the unit is none the less the same.
        whole: for each format of which whole products differ, how many elements do, of how many.
        elements: that were compared, in all formats.
    """

    archs: tuple[str, ...]
    differences: Mapping[str, tuple[str, ...]]
    schedules: Mapping[str, str] = field(default_factory=dict)
    whole: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    elements: int = field(default=0, compare=False)

    @property
    def exact(self) -> bool:
        """Whether nothing differs."""
        return not any(self.differences.values()) and not self.whole


GUESSES = frozenset(arch for arch, rules in MATRIX_UNITS.items() if rules["float16"].evidence == "unverified")
"""Architectures of which nobody has published anything: no device is shown to be like them."""


def nearest(units: Mapping[str, UnitFacts], products: Mapping[str, Products] = MappingProxyType({})) -> Likeness:
    """Return the known architectures that a device is most like, over all formats that were probed.

    Args:
        units: what was found of each format.
        products: whole products, which are computed by the rule as well where it explains the order of additions.
    """
    found = {arch: differences(units, rules) for arch, rules in MATRIX_UNITS.items() if arch not in GUESSES}
    least = min(map(_weight, found.values()))
    archs = tuple(arch for arch, differences in found.items() if _weight(differences) == least)
    rules = MATRIX_UNITS[archs[0]]
    shared = {name: pieces(facts, rules[name]) for name, facts in units.items() if name in rules}
    compared = {
        name: differing(products[name], rules[name], shared[name])
        for name, facts in units.items()
        if name in products and shared.get(name, {}).get(facts.inner)
    }
    return Likeness(
        archs,
        differences={name: what for name, what in found[archs[0]].items() if what},
        schedules={name: words for name, by_length in shared.items() if (words := described(by_length))},
        whole={name: counts for name, counts in compared.items() if counts[0]},
        elements=sum(elements for _, elements in compared.values()),
    )


def pieces(facts: UnitFacts, unit: MatrixUnit) -> dict[int, Pieces | None]:
    """Return in which pieces of K a unit of this rule explains the additions, by the length of K; None: in none."""
    if facts.tree is None:
        return {}
    shorter = _in_pieces(facts.tree, unit, facts.inner)
    found = {facts.inner: shorter}
    for K, text in facts.longer.items():
        if text.startswith("("):
            shorter = finer(_in_pieces(text, unit, int(K)), shorter, parsed(text))
            found[int(K)] = shorter
    return found


@lru_cache(maxsize=256)  # most architectures have the same rule for most formats
def _in_pieces(text: str, unit: MatrixUnit, K: int) -> Pieces | None:
    return in_pieces(parsed(text), unit, K)


def _weight(differences: Mapping[str, Sequence[str]]) -> tuple[int, int]:
    """Order first by formats that differ, then by facts."""
    return sum(map(bool, differences.values())), sum(map(len, differences.values()))


def differences(units: Mapping[str, UnitFacts], rules: Mapping[str, MatrixUnit]) -> dict[str, tuple[str, ...]]:
    """Return, for each format, the facts that are not what the rules say."""
    found: dict[str, tuple[str, ...]] = {}
    for format in sorted({*units, *rules}):
        if format not in rules:
            found[format] = ("has no such unit",)
        elif format in units:
            found[format] = tuple(_differing(units[format], rules[format], format))
        elif format != "tf32":  # a mode, which need not have been asked for
            found[format] = ("was not measured",)
    return found


def _differing(facts: UnitFacts, unit: MatrixUnit, format: str) -> Iterator[str]:
    shared, got = pieces(facts, unit), facts.arithmetic
    inner = shared.get(facts.inner)
    if inner is None:
        yield "tree"
    if any(shared.get(int(K)) is None for K in facts.longer):
        yield "longer"
    # Pieces of one group are summed outside of the unit, of whose own sums only whole products tell then.
    outside = _OF_SUMS if inner is not None and inner.parts and inner.longest <= unit.group else ()
    for name, value in expected(unit, format).items():
        if value != got[name] and name not in outside and not (name in _UNSEEN and got[name] is None):
            yield name


_FLOORED_BITS = 31
"""That products keep below a larger sum, in a "floored" unit (`MatrixUnit.kind`)."""

ADDITIONS = ("tree", "longer")
"""Facts about the order of additions."""

OF_LIBRARIES = (*ADDITIONS, "zero_signs")
"""Facts that a library decides outside of a matrix unit; one that adds a zero at the end has no -0."""

_UNSEEN = ("subnormal_results", "overflow", "small_sum")
"""Facts that a result need not show, since it is stored in another format."""

_OF_SUMS = (
    "accumulator_bits", "products_under_sum", "rest_under_sum", "sum_under_product", "sums", "small_sum",
)  # fmt: skip


def expected(unit: MatrixUnit, format: str) -> Mapping[str, object]:
    """Return what `UnitFacts.arithmetic` says of a unit that follows a rule, but for the additions."""
    at_once = unit.kind in ("truncated", "floored")
    flushes = unit.kind == "pairwise"
    narrow = format.startswith("float8")
    return {
        "group": unit.group if at_once else 1,
        "accumulator_bits": {"float32": 24, "float32_13": 14, "float16": 11, "float64": 53}[unit.result],
        "accumulator_at_least": False,
        "alignment_bits": unit.fraction_bits if at_once else None,
        "aligned": ("rounded down" if unit.interleaved else "cut") if at_once else None,
        "exponents": "summed" if at_once else None,
        "products_under_sum": _FLOORED_BITS if unit.kind == "floored" else unit.fraction_bits if at_once else None,
        "rest_under_sum": {"floored": "rounded down", "truncated": "cut"}.get(unit.kind),
        "sum_under_product": unit.fraction_bits if at_once else None,
        "sums": "toward zero" if unit.kind == "truncated" else "nearest, ties to even",
        "small_sum": "rounded down" if unit.kind == "floored" and not unit.interleaved else "dropped",
        "products": "exact",
        "stored": "nearest, ties to even" if format in ("bfloat16", "float16") else None,
        "input_bits": FORMATS[format].bits,
        "input_rounding": "cut" if format == "tf32" else None,
        "subnormal_inputs": "flushed" if flushes else "kept",
        # A subnormal float16 is a normal float32, which is what the unit returns.
        "subnormal_results": None if narrow else "flushed" if flushes and format == "bfloat16" else "kept",
        "overflow": None if narrow or format in ("float16", "float64") else
                    "cancels" if unit.kind == "truncated" else "infinity",
        "overflow_stored": None if narrow else "infinity",
        "infinity": "kept" if has_infinity(format) else None,
        "nan": "kept",
        "zero_signs": "kept",
    }  # fmt: skip
