# SPDX-License-Identifier: Apache-2.0
"""The worst elements of each output, as the detectors meet them: a recording holds these beside its samples.

The detectors see parts of an output, under names of their own. Where a part is a view, its address says which elements
of which output it holds; where it is a copy of some rows, name and rows do. What is neither (a derived quantity) has no
element to point at.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import numpy as np

from hal_conformance.case import I64, Array, Arrays

WORST = 4
"""Elements that are kept of each output, and taken from each part of it."""


class Witness:
    """Collects where outputs are worst.

    Args:
        outputs: the arrays that the judge is given; each contiguous.
    """

    def __init__(self, outputs: Arrays) -> None:
        self._outputs = outputs
        self._found: dict[str, list[tuple[float, int]]] = {}

    def note(self, name: str, got: Array, badness: Array, places: int | I64) -> None:
        """Take in a part: how bad each of its elements is; 0 is no worse than any other."""
        flat = np.ravel(badness)
        if not flat.size:
            return
        most = np.argpartition(flat, -WORST)[-WORST:] if flat.size > WORST else np.arange(flat.size)
        for at in most:
            if not flat[at] > 0:
                continue
            place = self._place(name, got, int(at), places)
            if place is not None:
                self._found.setdefault(place[0], []).append((float(flat[at]), place[1]))

    def worst(self, name: str) -> I64:
        """Return the flat indices of the worst elements of an output, sorted; most bad first is not kept."""
        found = {index: badness for badness, index in sorted(self._found.get(name, []))}
        best = sorted(found, key=lambda index: (-found[index], index))[:WORST]
        return np.array(sorted(best), np.int64)

    def _place(self, name: str, got: Array, at: int, places: int | I64) -> tuple[str, int] | None:
        """Return which output an element belongs to, and where in it."""
        index = np.unravel_index(at, got.shape)
        address = got.__array_interface__["data"][0] + sum(int(i) * s for i, s in zip(index, got.strides, strict=True))
        for output, whole in self._outputs.items():
            offset = address - whole.__array_interface__["data"][0]
            if whole.dtype == got.dtype and 0 <= offset < whole.nbytes:
                return output, offset // whole.itemsize
        of = self._outputs.get(name)
        if of is None or of.shape[1:] != got.shape[1:] or not got.ndim:
            return None
        row = places + int(index[0]) if isinstance(places, int) else int(places[index[0]])
        return name, int(np.ravel_multi_index((row, *index[1:]), of.shape))


_watching: ContextVar[Witness | None] = ContextVar("watching", default=None)


@contextmanager
def watching(outputs: Arrays) -> Iterator[Witness]:
    """Collect the worst elements while these outputs are judged."""
    witness = Witness(outputs)
    token = _watching.set(witness)
    try:
        yield witness
    finally:
        _watching.reset(token)


def note(name: str, got: Array, badness: Array, places: int | I64) -> None:
    """Tell the witness, if there is one, about a part of an output; see `Witness.note`."""
    if (witness := _watching.get()) is not None:
        witness.note(name, got, badness, places)
