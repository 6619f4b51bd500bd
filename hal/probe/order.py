# SPDX-License-Identifier: Apache-2.0
"""What a tree of additions looks like, in words, and the moments at which its sum grows."""

from __future__ import annotations

from collections.abc import Sequence

from hal.probe.tree import Tree


def spine(tree: Tree) -> list[list[Tree]]:
    """Return what is added to the growing sum, moment by moment: the deepest way up, with what joins it at each node.

    The first moment holds the leaves (or the leaf) at its bottom.
    """
    moments: list[list[Tree]] = []
    while not tree.is_leaf:
        below = [child for child in tree.children if not child.is_leaf]
        if not below:
            break
        # Of equally large ones the first: k ascending is what most do.
        trunk = max(below, key=lambda child: len(child.leaves))
        moments.append([child for child in tree.children if child is not trunk])
        tree = trunk
    if not tree.is_leaf and len(tree.children) == 2:  # two leaves, one after the other
        moments += [[tree.children[1]], [tree.children[0]]]
    else:
        moments.append(list(tree.children) or [tree])
    return moments[::-1]


def fused(tree: Tree) -> int:
    """Return how many products are added at once, the sum so far aside; 1 if only two numbers ever meet."""
    most, pending = 1, [tree]
    while pending:
        at = pending.pop()
        pending += at.children
        if len(at.children) > 2:
            most = max(most, sum(child.is_leaf for child in at.children))
    return most


def meeting(tree: Tree) -> tuple[int, int]:
    """Return two products that are added at once, or, where only two numbers ever meet, one right after the other."""
    group = largest_group(tree)
    if len(group) > 1:
        return group[0], group[1]
    moments = [child.leaves[0] for joining in spine(tree) for child in joining]
    return moments[0], moments[min(1, len(moments) - 1)]


def largest_group(tree: Tree) -> list[int]:
    """Return the products of one node that adds as many at once as any; none if only two numbers ever meet."""
    most = fused(tree)
    pending = [tree]
    while pending:
        at = pending.pop()
        pending += at.children
        leaves = [child.leaves[0] for child in at.children if child.is_leaf]
        if len(at.children) > 2 and len(leaves) == most:
            return leaves
    return []


def described(tree: Tree) -> str:
    """Return one line about a tree; it need not tell unlike trees apart, as their text does."""
    K = len(tree.leaves)
    if K == 1:
        return "one product"
    if all(child.is_leaf for child in tree.children) and len(tree.children) > 2:
        return f"all {K} products at once"
    moments = spine(tree)
    if all(len(joining) == 1 and joining[0].is_leaf for joining in moments):
        return f"one product after another, {_sequence([joining[0].leaves[0] for joining in moments])}"
    chain = _chain(moments)
    if chain is not None:
        return chain
    return _joined(tree)


def _chain(moments: Sequence[Sequence[Tree]]) -> str | None:
    """Describe groups of one size that are added to one sum, if that is what the moments are."""
    for size in sorted({_count(joining) for joining in moments}):
        bottom: list[Tree] = []
        rest = list(moments)
        while rest and _count([*bottom, *rest[0]]) <= size:
            bottom += rest.pop(0)
        alike = all(_count(joining) == size for joining in rest[:-1])
        if _count(bottom) == size and rest and alike and _count(rest[-1]) <= size:
            return _groups(size, bottom, rest)
    return None


def _groups(size: int, bottom: Sequence[Tree], rest: Sequence[Sequence[Tree]]) -> str | None:
    groups = [sorted(k for child in joining for k in child.leaves) for joining in [bottom, *rest]]
    if any(group != list(range(group[0], group[-1] + 1)) for group in groups):
        return None  # interleaved
    kind = f"groups of {size}" if len(rest) > 1 else f"2 slices of {size}"
    if all(child.is_leaf for joining in [bottom, *rest] for child in joining):
        inner = f"{kind} at once"
    elif all(len(joining) == 1 for joining in rest):
        inner = f"{kind}, each {_shape(rest[0][0])}"
    else:
        return None
    if [k for group in groups for k in group] == list(range(sum(map(len, groups)))):
        return f"{inner}, k ascending"
    return f"{inner}, in the order of k {_listed([group[0] for group in groups])}"


def _count(joining: Sequence[Tree]) -> int:
    return sum(len(child.leaves) for child in joining)


def _shape(tree: Tree) -> str:
    """Describe a subtree by itself."""
    if tree.is_leaf:
        return "one product"
    if all(child.is_leaf for child in tree.children):
        return "a pair" if len(tree.children) == 2 else f"{len(tree.children)} at once"
    if len(tree.children) == 2 and [len(child.leaves) for child in tree.children] == [2, 2]:
        return "by pairs, then the pairs"
    return f"({described(_renumbered(tree))})"


def _joined(tree: Tree) -> str:
    """Describe several sums that are joined in the end: interleaved ones, slices, or neither."""
    K = len(tree.leaves)
    for size in range(2, K // 2 + 1):
        parts = _parts(tree, size) if K % size == 0 else []
        sets = [part.leaves for part in parts]
        kinds = {described(_renumbered(part)) for part in parts}
        each = kinds.pop() if len(kinds) == 1 else "of several kinds"
        count = len(parts)
        if parts and all(leaves == tuple(range(leaves[0], leaves[-1] + 1, count)) for leaves in sets):
            return f"{count} sums of every {_ordinal(count)} product, each {each}; then {_joins(tree, parts)}"
        if parts and all(leaves == tuple(range(leaves[0], leaves[-1] + 1)) for leaves in sets):
            return f"{count} slices of K, each {each}; then {_joins(tree, parts)}"
    return f"no order with a name: {_short(tree.text)}"


def _parts(tree: Tree, size: int) -> list[Tree]:
    """Return the subtrees of a size if they make up the tree, by their smallest leaf; none otherwise."""
    found, pending = [], [tree]
    while pending:
        at = pending.pop()
        if len(at.leaves) == size:
            found.append(at)
        elif len(at.leaves) < size:
            return []
        else:
            pending += at.children
    return sorted(found, key=lambda at: at.leaves[0])


def _joins(tree: Tree, parts: Sequence[Tree]) -> str:
    number = {part.leaves: str(i) for i, part in enumerate(parts)}

    def text(at: Tree) -> str:
        return number.get(at.leaves) or f"({' '.join(map(text, at.children))})"

    return text(tree)


def _renumbered(tree: Tree) -> Tree:
    number = {k: i for i, k in enumerate(tree.leaves)}
    above, pending = [], [tree]
    while pending:  # a chain is as deep as it is long
        above.append(pending.pop())
        pending += above[-1].children
    made: dict[int, Tree] = {}
    for at in reversed(above):
        made[id(at)] = Tree(tuple(number[k] for k in at.leaves), tuple(made[id(child)] for child in at.children))
    return made[id(tree)]


def _sequence(leaves: Sequence[int]) -> str:
    ascending = list(range(len(leaves)))
    if list(leaves) == ascending:
        return "k ascending"
    if list(leaves) == ascending[::-1] or list(leaves[2:]) == ascending[::-1][2:]:
        return "k descending"
    return f"in the order of k {_listed(leaves)}"


def _listed(numbers: Sequence[int]) -> str:
    return " ".join(map(str, numbers)) if len(numbers) <= 12 else f"{' '.join(map(str, numbers[:12]))} ..."


def _ordinal(n: int) -> str:
    return {2: "second", 3: "third"}.get(n, f"{n}th")


def _short(text: str, most: int = 60) -> str:
    return text if len(text) <= most else f"{text[: most - 4]} ..."
