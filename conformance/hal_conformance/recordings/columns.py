# SPDX-License-Identifier: Apache-2.0
"""The outputs of a recording as the columns of a few tensors, each output once.

A tensor for each output would cost more in names and offsets than its samples do. So all samples of one dtype lie in
one tensor, output after output, and likewise digests, checksums and places of worst elements. The manifest has a line
for each output, from which its part of each column follows: name, dtype, shape, dtype in the file, whether every
element is finite, and how many worst elements there are. Outputs with the same name and the same bits are one.

The samples are deflated, since the suite's integers, powers of two and codes have few bits: a third less.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from hal_conformance import arrays as codec
from hal_conformance.case import I64, Array, Arrays
from hal_conformance.numerics import absent
from hal_conformance.recordings import sampling
from hal_conformance.recordings.bundle import MAX_DIMENSIONS, MAX_EXTENT, MAX_FILE, Stored, Unreadable, deflate, inflate
from hal_conformance.recordings.checksums import count
from hal_conformance.recordings.packed import NONE, Packed, narrow, pack
from hal_conformance.text import plain

MAX_ELEMENTS = 2**40
"""Of one output: more than any host has memory for."""
MAX_HELD = 2**24
"""Elements of all outputs that a recording holds. Each has an index of 8 bytes while it is looked at, and zeros take
next to no room in a file."""

DIGESTS, CHECKSUMS, WORST, VALUES = "outputs/sha256", "outputs/checksums", "outputs/worst", "outputs/values"


class Writer:
    """Takes in outputs, one after the other, and forgets what a recording does not hold.

    Args:
        seed: of the inputs.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._known: dict[tuple[str, str], int] = {}
        self._packed: list[Packed] = []
        self._values: dict[str, list[Array]] = {}
        self.lines: list[list[Any]] = []

    def add(self, name: str, array: Array, worst: I64 = NONE) -> int:
        """Return the number of an output; see `packed.pack`.

        Raises:
            TypeError: its dtype has no tag.
        """
        digest, name = codec.digest(array), sampling.word(name)
        if (name, digest) in self._known:
            return self._known[name, digest]
        made = pack(name, array, self._seed, worst, digest)
        values = narrow(made.values)
        kept_as = codec.tag_of(values)
        self._values.setdefault(kept_as, []).append(values)
        self._packed.append(made)
        self.lines.append([name, made.tag, list(made.shape), kept_as, made.finite, len(made.worst)])
        return self._known.setdefault((name, digest), len(self.lines) - 1)

    def tensors(self) -> Arrays:
        """Return the columns, by name."""
        found = {
            DIGESTS: np.frombuffer(b"".join(p.digest for p in self._packed), np.uint8).reshape(-1, 32),
            CHECKSUMS: _joined([p.sums.view(np.int32) for p in self._packed], np.int32),
            WORST: _joined([p.worst for p in self._packed], np.int64),
        }
        for tag, parts in sorted(self._values.items()):
            found[f"{VALUES}/{tag}"] = deflate(codec.to_buffer(np.concatenate(parts)))
        return found


def _joined(parts: list[Array], dtype: Any) -> Array:
    return np.concatenate([np.zeros(0, dtype), *parts])


class Reader:
    """Gives out the outputs of a file, in order, and checks all that can be checked of them.

    Args:
        tensors: of the file; the columns are taken out.
        seed: of the inputs.
    """

    def __init__(self, tensors: dict[str, Stored], seed: int) -> None:
        self._seed = seed
        self._digests = tensors.pop(DIGESTS).array("uint8")
        self._sums = tensors.pop(CHECKSUMS).array("int32").view(np.uint32)
        self._worst = tensors.pop(WORST).array("int64")
        self._values: dict[str, Array] = {}
        left = MAX_FILE
        for name in [name for name in tensors if name.startswith(f"{VALUES}/")]:
            tag = name.removeprefix(f"{VALUES}/")
            data = inflate(tensors.pop(name).array("uint8"), left)
            left -= len(data)
            if tag not in codec.TAGS or len(data) % codec.TAGS[tag].itemsize:
                raise Unreadable(f"the column {plain(name, 60)} holds no elements of a dtype that is known")
            self._values[tag] = codec.from_bytes(data, tag, (len(data) // codec.TAGS[tag].itemsize,))
        if self._digests.ndim != 2 or self._digests.shape[1:] != (32,):
            raise Unreadable("its digests have another shape than [n, 32]")
        if any(column.ndim != 1 for column in (self._sums, self._worst)):
            raise Unreadable("one of its columns has more than one axis")
        self._by_digest: dict[bytes, Packed] = {}
        self._room = MAX_HELD
        self._at: dict[str, int] = dict.fromkeys([*self._values, CHECKSUMS, WORST], 0)

    def read(self, lines: Any) -> list[Packed]:
        """Return all outputs.

        Raises:
            Unreadable: a line is none, or the columns are longer or shorter than the lines say.
            TypeError, ValueError: likewise.
        """
        if not isinstance(lines, list) or len(lines) != len(self._digests):
            raise Unreadable(f"there are {len(self._digests)} digests, and not as many outputs")
        found = [self._one(bytes(digest), *line) for digest, line in zip(self._digests, lines, strict=True)]
        lengths = {CHECKSUMS: len(self._sums), WORST: len(self._worst), **{t: len(v) for t, v in self._values.items()}}
        if self._at != lengths:
            raise Unreadable("it holds more elements than its outputs have")
        return found

    def _one(
        self, digest: bytes, name: Any, tag: Any, shape: Any, kept_as: Any, finite: Any, worst_count: Any
    ) -> Packed:
        known = isinstance(name, str) and isinstance(tag, str) and tag in codec.TAGS and isinstance(finite, bool)
        if not known or not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS:
            raise Unreadable(f"the output {plain(name, 60)} has no dtype or shape that is known")
        if not all(type(n) is int and 0 <= n <= MAX_EXTENT for n in [*shape, worst_count]):
            raise Unreadable(f"the output {plain(name, 60)} has an extent that none can have")
        size = math.prod(shape)
        if size > MAX_ELEMENTS:
            raise Unreadable(f"the output {plain(name, 60)} has {size} elements")
        dtype = codec.TAGS[tag]
        real = absent.can_be_absent(dtype)
        grid = sampling.grid(name, tuple(shape), self._seed) if real else None
        if grid is None and worst_count:
            raise Unreadable(f"the output {plain(name, 60)} is whole, and has worst elements beside that")
        held = size if grid is None else grid.size + worst_count
        values = self._take(kept_as, self._values.get(kept_as), held) if isinstance(kept_as, str) else None
        if values is None or (kept_as != tag and (real or dtype.kind not in "iu" or values.dtype.kind not in "iu")):
            raise Unreadable(f"the output {plain(name, 60)} is kept as {plain(kept_as, 40)}")
        self._room -= held
        if self._room < 0:
            raise Unreadable(f"its outputs hold more than {MAX_HELD} elements")
        values = values.astype(dtype, copy=False)
        worst = self._take(WORST, self._worst, worst_count)
        if worst.size and (worst[0] < 0 or worst[-1] >= size or (np.diff(worst) <= 0).any()):
            raise Unreadable(f"the worst elements of {plain(name, 60)} are not in order, or not in it")
        sums = self._take(CHECKSUMS, self._sums, 0 if grid is None else count(tuple(shape)))
        if finite and real and not codec.all_finite(values):
            raise Unreadable(f"the output {plain(name, 60)} is said to be finite, and an element of it is not")
        made = Packed(tag, tuple(shape), digest, finite, grid, worst, values, sums)
        if reason := made.contradiction():
            raise Unreadable(f"the recording contradicts itself: of the output {plain(name, 60)} {reason}")
        if made.contradicts(twin := self._by_digest.setdefault(digest, made)):
            what = f"{plain(name, 60)} {list(shape)} has the digest of another output, {list(twin.shape)}"
            raise Unreadable(f"the recording contradicts itself: {what}, and differs from it")
        return replace(made, values=absent.present(made.values)) if real else made

    def _take(self, column: str, values: Array | None, count: int) -> Array:
        """Return the next elements of a column."""
        at = self._at.get(column, 0)
        if values is None or count > len(values) - at:
            raise Unreadable(f"the column {plain(column, 60)} is too short")
        self._at[column] = at + count
        return values[at : at + count]


def digests_to_array(hashes: Mapping[str, int]) -> Array:
    """Return SHA-256 digests in hexadecimal, given with their numbers, as an array [n, 32]."""
    ordered = sorted(hashes, key=hashes.__getitem__)
    return np.frombuffer(bytes.fromhex("".join(ordered)), np.uint8).reshape(-1, 32)
