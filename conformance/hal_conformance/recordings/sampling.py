# SPDX-License-Identifier: Apache-2.0
"""Which elements of an output a recording holds: the same on every host, from the suite's counter generator.

Small outputs and integers (experts, slots, counts, codes) are held whole: later stages are judged from them. Of the
rest there is a grid: a few rows of the first axis, the first and the last among them, where kernels lose tails, and
a few columns of each. Rows and columns depend on the seed and on an extent, on nothing else. So a token is sampled
in every output that has tokens, and a stage of which a row is held finds that row of its input; and two recordings
hold the same elements, which can be compared bit by bit. Of logits and scores whole rows are held, since a token's
choice depends on all of its experts. A first axis of a few (the steps of an optimiser) is held whole.

Legend: T tokens, E experts, K choices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from hal_conformance import inputs as make
from hal_conformance.case import I64

WHOLE = 512
"""Elements of a float output that is held whole."""
ROWS, COLUMNS = 8, 8
FEW = 12
"""Rows of a first axis that is held whole."""
LINE = 128
"""Elements of a longer output with one axis."""
TOGETHER = ("logits_TE", "scores_TE")
"""Outputs of which a row means nothing without the rest of it."""
FULL_ROWS = 4
"""Rows of these; they are among the `ROWS` of other outputs, since both are the first numbers of one stream."""
CONDITIONS = ("weights_TK", "left_MN", "right_NM", "sums_M")
"""Outputs that are held whole if they are not enormous: others are judged from the device's own."""
ENORMOUS = 1 << 15
"""Elements beyond which nothing else of a case is judged from them."""


@dataclass(frozen=True)
class Grid:
    """Rows and columns of an output that was reshaped to [rows, everything else].

    Attributes:
        rows: sorted.
        columns: sorted; None: all.
        width: of a row.
    """

    rows: I64
    columns: I64 | None
    width: int

    @property
    def size(self) -> int:
        """How many elements there are; computed without making their indices."""
        return len(self.rows) * (self.width if self.columns is None else len(self.columns))

    @property
    def indices(self) -> I64:
        """The flat indices, row by row."""
        columns = np.arange(self.width) if self.columns is None else self.columns
        return (self.rows[:, None] * self.width + columns).ravel()


@lru_cache(maxsize=4096)
def grid(name: str, shape: tuple[int, ...], seed: int) -> Grid | None:
    """Return which elements of a float output are held; None: all of them.

    Args:
        name: of the output; see `word`.
        shape: of the output. May be enormous: nothing of its size is allocated.
        seed: of the inputs.
    """
    name = word(name)
    if math.prod(shape) <= (ENORMOUS if name in CONDITIONS else WHOLE):
        return None
    if len(shape) == 1:
        return Grid(picked(seed, shape[0], LINE), None, 1)
    width = math.prod(shape[1:])
    together = name in TOGETHER
    rows = picked(seed, shape[0], shape[0] if shape[0] <= FEW else FULL_ROWS if together else ROWS)
    return Grid(rows, None if together else picked(seed, width, COLUMNS), width)


def word(name: str) -> str:
    """Return the part of a name that says what an output is: the last one that is no number of a run or a step."""
    return next((part for part in reversed(name.split("/")) if not part.isdecimal()), name)


def picked(seed: int, extent: int, count: int) -> I64:
    """Return at most `count` of the indices below `extent`, sorted: the first, the last, and random ones between."""
    if extent <= count:
        return np.arange(extent)
    between = make.integers(seed, f"recording/{extent}", 1, extent - 2, count - 2)
    return np.unique(np.concatenate([between, [0, extent - 1]]))
