# SPDX-License-Identifier: Apache-2.0
"""Which known matrix unit a device's arithmetic is like, and in what it differs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hal.matrix_unit import FORMATS, MATRIX_UNITS, MatrixUnit
from hal.probe.facts import UnitFacts
from hal.probe.tree import Tree, leaf, node


@dataclass(frozen=True)
class Likeness:
    """The architectures whose rules come closest to what was measured.

    Attributes:
        archs: keys of `MATRIX_UNITS`, all equally close.
        differences: for each format, the facts that differ, and the formats that only one of the two has.
    """

    archs: tuple[str, ...]
    differences: Mapping[str, tuple[str, ...]]

    @property
    def exact(self) -> bool:
        """Whether nothing differs."""
        return not any(self.differences.values())


GUESSES = frozenset(arch for arch, rules in MATRIX_UNITS.items() if rules["float16"].evidence == "unverified")
"""Architectures of which nobody has published anything: no device is shown to be like them."""


def nearest(units: Mapping[str, UnitFacts]) -> Likeness:
    """Return the known architectures that a device is most like, over all formats that were probed."""
    found = {arch: differences(units, rules) for arch, rules in MATRIX_UNITS.items() if arch not in GUESSES}
    least = min(map(_weight, found.values()))
    archs = tuple(arch for arch, differences in found.items() if _weight(differences) == least)
    return Likeness(archs, {name: what for name, what in found[archs[0]].items() if what})


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
            want, got = expected(rules[format], format, units[format].inner), units[format].arithmetic
            # What a result cannot show, since it is stored in another format, is no difference.
            found[format] = tuple(
                name
                for name, value in want.items()
                if value != got[name] and not (name in _UNSEEN and got[name] is None)
            )
        elif format != "tf32":  # a mode, which need not have been asked for
            found[format] = ("was not measured",)
    return found


_FLOORED_BITS = 31
"""That products keep below a larger sum, in a "floored" unit (`MatrixUnit.kind`)."""

_UNSEEN = ("subnormal_results", "overflow", "small_sum")


def expected(unit: MatrixUnit, format: str, K: int) -> Mapping[str, object]:
    """Return what `UnitFacts.arithmetic` says of a unit that follows a rule, at an inner length of K."""
    at_once = unit.kind in ("truncated", "floored")
    flushes = unit.kind == "pairwise"
    narrow = format.startswith("float8")
    return {
        "tree": tree(unit, K).text,
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
    }  # fmt: skip


def tree(unit: MatrixUnit, K: int) -> Tree:
    """Return the additions of a unit, k ascending."""
    groups = [[leaf(k) for k in range(start, min(start + unit.group, K))] for start in range(0, K, unit.group)]
    if unit.kind == "pairwise":
        groups = [[_by_pairs(group)] for group in groups]
    at = groups[0][0] if len(groups[0]) == 1 else node(groups[0])
    for group in groups[1:]:
        at = node([at, *group])
    return at


def _by_pairs(trees: list[Tree]) -> Tree:
    while len(trees) > 1:
        pairs = [trees[i : i + 2] for i in range(0, len(trees), 2)]
        trees = [node(pair) if len(pair) == 2 else pair[0] for pair in pairs]
    return trees[0]
