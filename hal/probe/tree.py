# SPDX-License-Identifier: Apache-2.0
"""In which order a device sums the products of one element: the tree of its additions, found from outside.

FPRev (arXiv:2411.00442): let all products be a small 1, but for a huge one at i and its negative at j. Every 1 that is
added to one of them before they meet is lost. So the sum counts the ones outside of the smallest subtree that holds
both; the size of that subtree, for all pairs, determines the tree. Products that a matrix unit adds at once appear as
one node with more than two children.

Legend: K products. Leaves are all of them, 0 to K - 1, or a few: the others are zero then, and leave no trace.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch

from hal.probe.multiplier import Multiplier
from hal.probe.terms import Term, sums

ALL_PAIRS = 64
"""Up to so many leaves every pair is asked for, and a device whose answers fit no tree is told from one with a tree.
Beyond, the tree is built by recursion."""

AT_ONCE = 32
"""Leaves that join a tree in one node, of which all pairs are asked for in one go: most matrix units add no more."""

ELSEWHERE = 64
"""Pairs at random for which the tree foretells the answer, at another place in the matrix."""

ABSORBED_BITS = 30
"""A 1 is lost beside the huge number in accumulators and aligned sums of up to so many bits (24 to 31 are known)."""

COUNTED = 256
"""Ones that even bfloat16 counts exactly."""


class NoTree(Exception):
    """The answers fit no tree; the text says why."""


@dataclass(frozen=True, eq=False, repr=False)
class Tree:
    """A subtree: a leaf, or the node where its children are added.

    Attributes:
        leaves: all products below, ascending.
        children: by their smallest leaf; none of a leaf.
    """

    leaves: tuple[int, ...]
    children: tuple[Tree, ...] = ()

    @property
    def is_leaf(self) -> bool:
        """Whether this is one product."""
        return not self.children

    @property
    def text(self) -> str:
        """Parentheses around what is added at once, leaves by number; the same for equal trees."""
        words: list[str] = []
        pending: list[Tree | str] = [self]
        while pending:  # a chain is as deep as it is long
            at = pending.pop()
            if isinstance(at, str):
                words.append(at)
            elif at.is_leaf:
                words.append(str(at.leaves[0]))
            else:
                words.append("(")
                pending += [")", *at.children[::-1]]
        return " ".join(words).replace("( ", "(").replace(" )", ")")

    # By the text: what a dataclass has would call itself as often as the tree is deep.

    def __eq__(self, other: object) -> bool:
        return self.text == other.text if isinstance(other, Tree) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.text)

    def __repr__(self) -> str:
        return f"Tree({self.text})"


def leaf(k: int) -> Tree:
    """Return product k alone."""
    return Tree((k,))


def node(children: Sequence[Tree]) -> Tree:
    """Return the node of these children."""
    return Tree(
        tuple(sorted(k for child in children for k in child.leaves)),
        tuple(sorted(children, key=lambda child: child.leaves[0])),
    )


def parsed(text: str) -> Tree:
    """Return the tree that has this text."""
    open_: list[list[Tree]] = [[]]
    for word in text.replace("(", "( ").replace(")", " )").split():
        if word == "(":
            open_.append([])
        else:
            made = node(open_.pop()) if word == ")" else leaf(int(word))
            open_[-1].append(made)
    return open_[0][0]


def summation_tree(multiply: Multiplier, K: int, leaves: Sequence[int] | None = None) -> Tree:
    """Find the tree of a product whose inner length is K.

    Args:
        multiply: the product.
        K: its inner length.
        leaves: positions of the products that are not zero, ascending; None: all. The tree is theirs alone.

    Raises:
        NoTree: the sums lose nothing (an accumulator wider than the format's range can show, or an exact one), or the
            answers contradict each other, as those of atomic additions do.
    """
    leaves = range(K) if leaves is None else leaves
    if len(leaves) == 1:
        return leaf(leaves[0])
    ask = _sizes(multiply, K, leaves)
    answers = _Answers(lambda pairs: ask(pairs, 0))
    if len(leaves) <= ALL_PAIRS:
        answers.learn(list(combinations(leaves, 2)))
    tree = _built(tuple(leaves), answers)
    if len(leaves) <= ALL_PAIRS:
        _check(tree, answers)
    pairs = _at_random(leaves)
    if _foretold(tree, pairs) != dict(zip(pairs, ask(pairs, multiply.outer // 2 + 1), strict=True)):
        raise NoTree("rows or columns of one product have orders of their own, or the order changes from run to run")
    return tree


Pair = tuple[int, int]
"""Of leaves, the smaller one first."""


def _pair(i: int, j: int) -> Pair:
    return (i, j) if i < j else (j, i)


class _Answers:
    """Sizes of the smallest subtrees that hold both of a pair, each asked for once."""

    def __init__(self, ask: Callable[[Sequence[Pair]], Sequence[int]]) -> None:
        self._ask = ask
        self._sizes: dict[Pair, int] = {}

    def learn(self, pairs: Sequence[Pair]) -> None:
        """Ask for all of these at once."""
        missing = [pair for pair in pairs if pair not in self._sizes]
        self._sizes |= zip(missing, self._ask(missing), strict=True)

    def of(self, i: int, others: Sequence[int]) -> list[int]:
        """Return the sizes with i and each of others."""
        pairs = [_pair(i, j) for j in others]
        self.learn(pairs)
        return [self._sizes[pair] for pair in pairs]


def _at_random(leaves: Sequence[int]) -> list[Pair]:
    generator = random.Random(len(leaves))
    return list({_pair(*generator.sample(leaves, 2)): None for _ in range(ELSEWHERE)})


def _foretold(tree: Tree, pairs: Sequence[Pair]) -> dict[Pair, int]:
    """Return the size of the smallest subtree with both of each pair."""
    found: dict[Pair, int] = {}
    pending = [(tree, set(pairs))]
    while pending:
        at, inside = pending.pop()
        for child in at.children:
            leaves = set(child.leaves)
            below = {pair for pair in inside if pair[0] in leaves and pair[1] in leaves}
            if below:
                pending.append((child, below))
            inside -= below
        found |= dict.fromkeys(inside, len(at.leaves))
    return found


def _built(leaves: tuple[int, ...], answers: _Answers) -> Tree:
    """Return the tree over `leaves`."""
    # From the middle one: k ascending and descending both take K log K questions then, as deep as log K.
    first = leaves[len(leaves) // 2]
    others = [k for k in leaves if k != first]
    tree = leaf(first)
    if not others:
        return tree
    by_size: dict[int, list[int]] = {}
    for k, found in zip(others, answers.of(first, others), strict=True):
        by_size.setdefault(found, []).append(k)
    for found, group in sorted(by_size.items()):
        # `group` joins what there is at one node: in one child, or in several if more is added at once.
        if len(group) <= AT_ONCE:
            answers.learn(list(combinations(group, 2)))
        children, left = [tree], group
        while left:
            beside = answers.of(left[0], left[1:])
            together = [k for k, apart in zip(left[1:], beside, strict=True) if apart < found]
            children.append(_built((left[0], *together), answers))
            left = [k for k, apart in zip(left[1:], beside, strict=True) if apart >= found]
        tree = node(children)
        if len(tree.leaves) != found:
            raise NoTree(f"a subtree of {found} products seems to have {len(tree.leaves)}")
    return tree


def _check(tree: Tree, answers: _Answers) -> None:
    pending = [tree]
    while pending:
        at = pending.pop()
        pending += at.children
        for number, child in enumerate(at.children):
            for other in at.children[number + 1 :]:
                for i in child.leaves:
                    for j, size in zip(other.leaves, answers.of(i, other.leaves), strict=True):
                        if size != len(at.leaves):
                            raise NoTree(f"the products {i} and {j} meet in more than one place")


def _sizes(multiply: Multiplier, K: int, leaves: Sequence[int]) -> Callable[[Sequence[Pair], int], list[int]]:
    """Return a function from pairs (i, j), and a shift of their places in the matrix, to sizes of subtrees."""
    top = min(multiply.largest_exponent, 60)
    one = _one(multiply)
    most = int(min(COUNTED, 2.0 ** (2 * top - 2 * one - ABSORBED_BITS)))
    if most < 1:
        raise NoTree(f"{multiply.format} has no numbers so far apart that one is lost beside the other")
    huge, small = 2.0**top, 2.0**one
    outer, count = multiply.outer, len(leaves)
    blocks = [list(leaves[start : start + most]) for start in range(0, count, most)]

    def ask(pairs: Sequence[Pair], shift: int) -> list[int]:
        sizes: list[int] = []
        for first in range(0, len(pairs), outer):
            chunk = torch.tensor(pairs[first : first + outer])
            place = (torch.arange(len(chunk)) + shift) % outer
            survivors = torch.zeros(len(chunk), dtype=torch.float64)
            for block in blocks:
                a = torch.zeros(outer, K, dtype=torch.float64)
                b = torch.zeros(K, outer, dtype=torch.float64)
                a[:, block], b[block] = small, small
                a[place, chunk[:, 0]], a[place, chunk[:, 1]] = huge, -huge
                b[chunk[:, 0], place], b[chunk[:, 1], place] = huge, huge
                survivors += multiply(a, b).diagonal()[place] / small**2
            for ones in survivors.tolist():
                if ones != ones or not 0 <= ones <= count - 2 or ones % 1:
                    raise NoTree(f"{ones:g} of {count - 2} ones were counted")
            sizes += [count - int(ones) for ones in survivors.tolist()]
        return sizes

    neighbours = [(leaves[k], leaves[k + 1]) for k in range(0, count - 1, max(1, count // 16))]
    lonely = ask([(leaves[0], leaves[-1]), *neighbours], 0)
    if count > 2 and set(lonely) == {2}:
        raise NoTree("no product is lost beside another: sums are exact, or wider than the format can show")
    return ask


def _one(multiply: Multiplier) -> int:
    """Return the exponent of the factors of a small 1: as small as is sure not to be flushed, in sums and results."""
    if multiply.result == torch.float16:
        return -7  # 2^-14 is the smallest normal number
    if multiply.numbers.bits <= 4:  # FP8
        return multiply.numbers.min_exponent - (multiply.numbers.bits - 1 if _keeps_subnormals(multiply) else 0)
    return 0 if multiply.format != "float64" else -60


def _keeps_subnormals(multiply: Multiplier) -> bool:
    least = 2.0 ** (multiply.numbers.min_exponent - multiply.numbers.bits + 1)
    return float(sums(multiply, [[Term(0, least, least)]], 64)[0]) == least**2
