# SPDX-License-Identifier: Apache-2.0
"""Which elements a recording holds, and the numbers that stand for the rest."""

from __future__ import annotations

import numpy as np
import pytest

from hal_conformance import arrays
from hal_conformance.recordings import sampling
from hal_conformance.recordings.checksums import BLOCKS, block_rows, checksums, count
from hal_conformance.recordings.columns import Writer
from hal_conformance.recordings.packed import distance, pack


def test_small_outputs_and_conditions_are_held_whole():
    assert sampling.grid("y_TD", (32, 16), 0) is None
    assert sampling.grid("weights_TK/2", (4096, 8), 0) is None
    assert sampling.grid("weights_TK", (65_792, 2), 0) is not None
    assert sampling.grid("y_TD", (32, 17), 0) is not None
    names = ("y_TD", "y_TD/2", "2/y_TD", "1/0/y_TD", "p/y_TD")
    assert {sampling.word(name) for name in names} == {"y_TD"}
    assert (sampling.word("2"), sampling.word("")) == ("2", "")


def test_a_grid_has_the_ends_of_both_axes_and_the_same_rows_in_every_output():
    y, dx, logits = (
        sampling.grid(*about, 3) for about in (("y", (97, 128)), ("dx", (97, 40)), ("logits_TE", (97, 64)))
    )
    for grid, (rows, width) in ((y, (97, 128)), (dx, (97, 40)), (logits, (97, 64))):
        assert len(grid.indices) == grid.size
        assert {0, rows * width - 1} <= set(grid.indices.tolist())
        assert set(grid.rows) <= set(y.rows)
    assert 3 < len(y.rows) <= sampling.ROWS
    assert logits.size == len(logits.rows) * 64
    assert not np.array_equal(sampling.grid("y", (97, 128), 4).rows, y.rows), "the seed chooses"


def test_every_step_of_few_is_held_in_the_same_columns():
    grid = sampling.grid("p/dense", (10, 61, 20), 0)
    assert grid.rows.tolist() == list(range(10))
    assert sampling.grid("x", (5000,), 0).size <= sampling.LINE


def test_an_enormous_shape_allocates_nothing():
    grid = sampling.grid("y", (2**31, 2**8), 0)
    assert grid.size == len(grid.rows) * len(grid.columns)
    assert sampling.grid("logits_TE", (2**10, 2**30), 0).size >= 2**32


@pytest.mark.parametrize("shape", [(5, 7), (97, 3, 4), (200, 9), (1, 1), (3,), (0, 4), (4, 0)])
def test_there_is_a_checksum_for_each_row_or_block(shape):
    array = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    sums = checksums(array)
    assert len(sums) == count(shape) <= BLOCKS
    if array.size:
        changed = array.copy()
        changed.reshape(-1).view(np.uint32)[-1] ^= 1
        assert np.flatnonzero(checksums(changed) != sums).tolist() == [(shape[0] - 1) // block_rows(shape)]


def test_a_checksum_sees_order_and_equal_rows_that_an_xor_does_not():
    row = np.arange(1.0, 9.0, dtype=np.float32)
    assert checksums(row[None]) != checksums(row[None, ::-1])
    twice = np.stack([row, row]).reshape(1, -1)
    assert checksums(twice) != checksums(np.zeros_like(twice)), "XOR of two equal rows is that of none"


def test_the_rows_of_a_difference_that_no_sample_shows_are_named():
    a = np.random.default_rng(1).standard_normal((97, 128)).astype(np.float32)
    grid = sampling.grid("y", a.shape, 0)
    row = next(r for r in range(97) if r not in grid.rows)
    b = a.copy()
    b[row, 5] = np.nextafter(b[row, 5], np.float32(9))
    together = block_rows(a.shape)
    block = row // together * together
    rows = f"rows {block}-{min(97, block + together) - 1} of 97"
    assert distance(pack("y", a, 0), pack("y", b, 0)) == (0.0, 0.0, rows)


def test_the_same_output_is_stored_once_and_integers_are_narrow():
    writer = Writer(0)
    x = np.arange(6000, dtype=np.int64).reshape(60, 100) % 250
    assert [writer.add("experts_TK", x), writer.add("experts_TK/1", x), writer.add("slots", x)] == [0, 0, 1]
    assert writer.tensors()["outputs/values/uint8"].nbytes < 12_000
    assert arrays.tag_of(x) == writer.lines[0][1] == "int64"
