# SPDX-License-Identifier: Apache-2.0
"""The text that the model reads, and its batches.

The text is the beginning of "tinyshakespeare": plays of William Shakespeare, in the public domain, in the selection
that Andrej Karpathy's char-rnn (2015) made and that the field has used for small language models ever since. A token is
a byte; all are ASCII.

Legend: B sequences of a batch, L tokens of a sequence.
"""

from __future__ import annotations

import functools
from importlib.resources import files

import numpy as np

from hal_conformance import inputs as make
from hal_conformance.case import I64

VOCABULARY = 128


@functools.cache
def text() -> I64:
    """Return the text as tokens."""
    data = files("hal_conformance.language").joinpath("shakespeare.txt").read_bytes()
    tokens = np.frombuffer(data, np.uint8).astype(np.int64)
    tokens.flags.writeable = False
    return tokens


def batch(seed: int, step: int, sequences: int, length: int) -> tuple[I64, I64]:
    """Return the tokens [B, L] of a step, and for each the one that follows it [B, L].

    Sequences begin anywhere, chosen by the integer generator, so every host reads the same ones.
    """
    tokens = text()
    start = make.integers(seed, f"language/batch/{step}", 0, len(tokens) - length - 1, sequences, 1)
    places = start + np.arange(length)
    return tokens[places], tokens[places + 1]
