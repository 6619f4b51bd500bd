# SPDX-License-Identifier: Apache-2.0
"""In which pieces a library sums a product, on top of what its unit does with each: slices of K, promoted sums.

Each piece starts from zero; two sums of pieces are added at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from hal.matrix_unit import MatrixUnit
from hal.probe.tree import Tree, leaf, node

SHORTEST = 8
MOST = 256
"""Products of a piece that is not the last, and pieces: any order at all would be one of pieces otherwise."""


@dataclass(frozen=True)
class Pieces:
    """A stretch of K.

    Attributes:
        start, end: its products.
        parts: the two that are added; none if the unit sums it in one go.
    """

    start: int
    end: int
    parts: tuple[Pieces, ...] = ()

    @property
    def longest(self) -> int:
        """Products that the unit sums in one go, at most."""
        return max((part.longest for part in self.parts), default=self.end - self.start)


def pieces(tree: Tree, unit: MatrixUnit, K: int) -> Pieces | None:
    """Return the pieces that explain a tree of evenly spaced products, if a unit of this rule sums each; else None."""
    ks = tree.leaves
    spacing = ks[1] - ks[0] if len(ks) > 1 else K
    if ks != tuple(range(0, K, spacing)):
        return None
    least = max(SHORTEST, K // MOST, unit.group, 2 * spacing if spacing > 1 else 0)

    def part(at: Tree) -> Pieces | None:
        start, end = at.leaves[0], at.leaves[-1] + spacing
        if end - start != len(at.leaves) * spacing:
            return None  # interleaved
        if at.text == additions(unit, at.leaves).text:
            return Pieces(start, min(end, K))
        short = [child for child in at.children if len(child.leaves) * spacing < least and child.leaves[-1] != ks[-1]]
        if len(at.children) != 2 or short:
            return None
        parts = tuple(found for child in at.children if (found := part(child)) is not None)
        return Pieces(start, min(end, K), parts) if len(parts) == 2 else None

    return part(tree)


def additions(unit: MatrixUnit, ks: Sequence[int]) -> Tree:
    """Return the additions of some products, ascending, by a unit whose first one is the first of them."""
    groups = [[leaf(k) for k in group] for _, group in groupby(ks, lambda k: (k - ks[0]) // unit.group)]
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


def finer(long: Pieces | None, shorter: Pieces | None, tree: Tree) -> Pieces | None:
    """Return a longer K in the pieces of a shorter one, if these are too short to be seen by the products asked there.

    Args:
        long: the longer K, all of it in one piece as far as it was seen.
        shorter: the shorter one, of which more were asked.
        tree: of the products that were asked of the longer one.
    """
    if long is None or long.parts or shorter is None or not shorter.parts:
        return long
    length = _shape(shorter)[1]
    if length >= 2 * (tree.leaves[1] - tree.leaves[0]):
        return long
    at = Pieces(0, length)
    for start in range(length, long.end, length):
        end = min(start + length, long.end)
        at = Pieces(0, end, (at, Pieces(start, end)))
    return at


def described(found: Mapping[int, Pieces | None]) -> str:
    """Return in words how K is shared out, by its length; nothing where it never is."""
    shared = {K: whole for K, whole in sorted(found.items()) if whole is not None and whole.parts}
    shapes = {K: _shape(whole) for K, whole in shared.items()}
    if not shapes:
        return ""
    counts, lengths = {shape[0] for shape in shapes.values()}, {shape[1] for shape in shapes.values()}
    inner = {_shape(_sequence(whole)[0])[1] for whole in shared.values()}
    nested = f", each in pieces of {inner.pop()}" if len(inner) == 1 and not inner & lengths else ""
    if len(lengths) == 1 and len(shapes) > 1:
        return f"K in pieces of {lengths.pop()}"
    if len(counts) == 1 and len(shapes) > 1:
        return f"K in {counts.pop()} slices{nested}"
    return "; ".join(f"K = {K} in {count} slices of {length}" for K, (count, length) in shapes.items()) + nested


def _shape(whole: Pieces) -> tuple[int, int]:
    """Return how many there are, and the length of the first."""
    sequence = _sequence(whole)
    return len(sequence), sequence[0].end - sequence[0].start


def _sequence(whole: Pieces) -> list[Pieces]:
    """Return the pieces, or the slices made of several, that are added to one sum one after the other."""
    joined: list[Pieces] = []
    at = whole
    while at.parts and bool(at.parts[1].parts) == bool(whole.parts[1].parts):
        joined.append(at.parts[1])
        at = at.parts[0]
    return [at, *joined[::-1]]
