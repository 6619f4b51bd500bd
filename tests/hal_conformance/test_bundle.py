# SPDX-License-Identifier: Apache-2.0
"""No altered file is read, and a forged one is refused without harm."""

from __future__ import annotations

import os
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import recordings
from hypothesis import given
from hypothesis import strategies as st

from hal_conformance import arrays
from hal_conformance.recordings import bundle, columns, recording
from hal_conformance.recordings.bundle import Unreadable
from hal_conformance.verdicts import Status

SMALL = recordings.make()


def test_a_recording_is_read_back_as_it_was_written():
    read = recordings.parse(SMALL)
    assert read.device == "fake:0"
    assert read.impl == "m:o"
    assert read.selection == recordings.SELECTION
    for entry, seen in zip(read.entries, recordings.observations(), strict=True):
        assert entry.task == seen.task
        assert entry.hashes == seen.hashes
        assert arrays.same_bits(entry.outputs["y"].array(1 << 20), seen.outputs["y"])
        assert entry.claim.status is Status.EXACT


def test_every_flipped_bit_of_a_recording_is_refused():
    assert len(SMALL) < 4096, "keep it small: every bit is tried"
    damaged = bytearray(SMALL)
    for place in range(8 * len(SMALL)):
        damaged[place // 8] ^= 1 << place % 8
        with pytest.raises(Unreadable):
            recordings.parse(bytes(damaged))
        damaged[place // 8] ^= 1 << place % 8
    recordings.parse(bytes(damaged))


def test_every_truncation_and_extension_is_refused():
    for length in range(len(SMALL)):
        with pytest.raises(Unreadable):
            recordings.parse(SMALL[:length])
    with pytest.raises(Unreadable):
        recordings.parse(SMALL + b"\0")


def test_the_same_content_gives_the_same_bytes():
    assert recordings.make() == SMALL


def test_safetensors_itself_reads_a_recording(tmp_path):
    from safetensors.numpy import load_file

    path = tmp_path / "a.safetensors"
    path.write_bytes(SMALL)
    loaded = load_file(path)
    names = ["checksums", "sha256", "values/bfloat16", "values/float32", "worst"]
    assert sorted(loaded) == ["inputs/sha256", *(f"outputs/{name}" for name in names), "tables"]
    values = np.frombuffer(zlib.decompress(loaded["outputs/values/float32"]), "<f4")
    np.testing.assert_array_equal(values, [0, 2, 4, 6, 8, 10])


@pytest.mark.parametrize("tag", arrays.TAGS)
def test_every_dtype_survives_bit_by_bit(tag):
    raw = np.arange(256, dtype=np.uint8) & (1 if tag == "bool" else 255)
    array = raw.view(arrays.TAGS[tag]).reshape(2, -1)
    _, tensors = bundle.decode(bundle.encode({}, {"odd": np.zeros(3, np.int8), "x": array, "none": array[:0]}))
    assert arrays.same_bits(tensors["x"].array(tag), array)
    assert tensors["none"].array(tag).shape == (0, array.shape[1])


def header_with(entry, data=b"\0" * 8):
    header, _ = recordings.split(SMALL)
    return recordings.reseal({"__metadata__": header["__metadata__"], **entry}, data)


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "entries",
    [
        {"x": {**F32, "shape": [2**40], "data_offsets": [0, 2**42]}},
        {"x": {**F32, "shape": [2**31, 2**31, 2**31], "data_offsets": [0, 8]}},
        {"x": {**F32, "shape": [0, 2**31, 2**31, 2**31], "data_offsets": [0, 0]}, "y": F32},
        {"x": {**F32, "shape": [-2]}},
        {"x": {**F32, "shape": [2.0]}},
        {"x": {**F32, "shape": [True, 2]}},
        {"x": {**F32, "shape": "2"}},
        {"x": {**F32, "shape": [1] * 40 + [2]}},
        {"x": {**F32, "data_offsets": [8, 16]}},
        {"x": {**F32, "data_offsets": [0, 8, 8]}},
        {"x": {**F32, "data_offsets": [0, 10**30]}},
        {"x": F32, "y": F32},
        {"x": {**F32, "shape": [1], "data_offsets": [0, 4]}},
        {"x": {**F32, "dtype": "F128"}},
        {"x": {**F32, "dtype": ["F32"]}},
        {"x": {**F32, "more": 1}},
        {"x": 5},
        {"../../etc/passwd": F32},
        {"\x1b[2J\nnew line": F32},
        {},
    ],
)
def test_forged_entries_are_refused_in_one_printable_line(entries):
    data = header_with(entries)
    with pytest.raises(Unreadable) as refusal:
        recordings.parse(data)
    assert str(refusal.value).isprintable()


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 200_000,
        b'"manifest":' + b'{"a":' * 100_000,
        b'"x":1,"x":1}',
        b'"x":NaN}',
        b'"x":' + b"9" * 100_000 + b"}",
        b'"x":"\xff\xfe"}',
        b'"sha256":"0"}}',
    ],
)
def test_forged_headers_are_refused(text):
    prefix = b'{"__metadata__":{"sha256":"' + b"0" * 64 + b'",'
    with pytest.raises(Unreadable):
        recordings.parse(recordings.reseal(prefix + text))
    with pytest.raises(Unreadable):
        recordings.parse(recordings.reseal(prefix[:-1] + b"}," + text))


@pytest.mark.parametrize(
    "bad",
    [b"", b"no zlib", zlib.compress(b"\1" * 6)[:-1], zlib.compress(b"\1" * 6) + b"x", zlib.compress(bytes(65 << 20))],
    ids=["empty", "noise", "cut", "longer", "bomb"],
)
def test_deflated_bytes_that_are_none_or_too_many_are_refused(bad):
    column = np.frombuffer(bad, np.uint8)
    tensors = {"outputs/sha256": np.zeros((1, 32), np.uint8), "outputs/checksums": np.zeros(0, np.int32)}
    more = {"outputs/worst": np.zeros(0, np.int64), "outputs/values/uint8": column}
    _, stored = bundle.decode(bundle.encode({}, tensors | more))
    with pytest.raises(Unreadable, match=r"inflated|deflated"):
        columns.Reader(stored, 0)


def test_an_enormous_header_length_allocates_nothing():
    data = recordings.reseal(b'{"__metadata__":{"sha256":"' + b"0" * 64 + b'"}}')
    forged = recordings.reseal(data[8:])
    for length in (2**63, 2**32, bundle.MAX_HEADER + 1, len(forged)):
        bad = struct.pack("<Q", length) + forged[8:]
        tracemalloc.start()
        with pytest.raises(Unreadable):
            bundle.decode(bad)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
        tracemalloc.stop()


def change(path, value):
    def edit(manifest):
        inner = manifest
        for step in path[:-1]:
            inner = inner[step]
        if value is KeyError:
            del inner[path[-1]]
        else:
            inner[path[-1]] = value

    return edit


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["cases"], {}),
        (["cases"], []),
        (["cases", 0, "case"], "../../etc/passwd"),
        (["cases", 0, "preset"], "\x1b[2J"),
        (["cases", 0, "dtype"], "float64"),
        (["cases", 0, "outputs"], []),
        (["cases", 0, "outputs", "y"], 2),
        (["cases", 0, "outputs", "y"], -1),
        (["cases", 0, "outputs", "y"], True),
        (["cases", 0, "claim"], None),
        (["cases", 0, "claim"], ["EXACT"]),
        (["cases", 0, "claim", 1], "0"),
        (["outputs"], []),
        (["outputs", 0], "y"),
        (["outputs", 0, 0], 5),
        (["outputs", 0, 1], "float64"),
        (["outputs", 0, 1], "complex64"),
        (["outputs", 0, 1], ["float32"]),
        (["outputs", 0, 2], [2, 4]),
        (["outputs", 0, 2], [2, -3]),
        (["outputs", 0, 2], [True, 6]),
        (["outputs", 0, 2], [2**31, 2**31]),
        (["outputs", 0, 2], [2**30] * 8),
        (["outputs", 0, 2], [0] * 9),
        (["outputs", 0, 3], "int32"),
        (["outputs", 0, 3], "float16"),
        (["outputs", 0, 3], ["float32"]),
        (["outputs", 0, 4], 1),
        (["outputs", 0, 5], 1),
        (["outputs", 0, 5], 2**40),
        (["cases", 0, "status"], "CRASH"),
        (["cases", 0, "inputs"], [1]),
        (["cases", 0, "inputs", "x"], 50),
        (["cases", 0, "inputs", "x"], "0" * 64),
        (["cases", 0], 5),
        (["selection", "seed"], -1),
        (["selection", "seed"], 2**40),
        (["selection", "seed"], "0"),
        (["selection", "seed"], True),
        (["selection", "scale"], "huge"),
        (["selection", "scale"], ["tiny"]),
        (["selection", "cases"], ["no.such.case"]),
        (["selection", "cases"], ["*" * 900]),
        (["selection", "cases"], ["*e" * 99 + "x"]),
        (["selection", "cases"], ["*"] * 10_000),
        (["selection", "cases"], [5]),
        (["selection", "dtypes"], ["complex64"]),
        (["selection", "dtypes"], [["float32"]]),
        (["selection"], KeyError),
        (["contract"], {}),
        (["contract", "matmul", "float32", "accumulator_bits"], 10**9),
        (["contract", "matmul", "float32", "input_bits"], -40),
        (["contract", "matmul", "float32"], 5),
        (["contract", "matmul"], []),
        (["contract", "subnormals"], "\x1b[2J"),
        (["info"], []),
        (["device"], 5),
        (["impl"], KeyError),
    ],
)
def test_forged_manifests_are_refused_in_one_printable_line(path, value):
    with pytest.raises(Unreadable) as refusal:
        recordings.parse(recordings.with_manifest(SMALL, change(path, value)))
    assert str(refusal.value).isprintable()


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("schema", "hal.recording/9", "its schema is hal.recording/9; this hal reads hal.recording/2"),
        ("suite", "9.9.9+suite.9", "recorded with suite 9.9.9+suite.9; this is suite"),
        ("manifest", "[" * 100_000, "JSON that cannot be read"),
        ("manifest", "null", "manifest cannot be read"),
        ("manifest", '{"environment": 1e999}', "JSON that cannot be read"),
    ],
)
def test_another_schema_and_another_suite_are_named(key, value, words):
    header, data = recordings.split(SMALL)
    header["__metadata__"][key] = value
    with pytest.raises(Unreadable) as refusal:
        recordings.parse(recordings.reseal(header, data))
    assert words in str(refusal.value)


def test_a_status_that_only_a_judge_may_give_is_invalid_in_a_recording():
    dead = recordings.make(edit=recordings.crashed)
    forged = recordings.with_manifest(dead, change(["cases", 0, "status"], "EXACT"))
    assert recordings.parse(forged).entries[0].status.value == "INVALID"
    assert recordings.parse(dead).entries[0].status.value == "CRASH"


def test_what_is_no_regular_file_is_refused_without_reading_it(tmp_path):
    fifo = tmp_path / "pipe"
    os.mkfifo(fifo)
    sparse = tmp_path / "sparse"
    with sparse.open("wb") as stream:
        stream.truncate(bundle.MAX_FILE + 1)
    for path in (tmp_path, fifo, sparse, tmp_path / "missing", tmp_path / "x\x1b[2J", tmp_path / "nul\0"):
        with pytest.raises(Unreadable) as refusal:
            recording.read(path, recordings.FAKE)
        assert str(refusal.value).isprintable()


@given(st.binary(max_size=200), st.booleans())
def test_random_bytes_are_refused(noise, sealed):
    data = recordings.reseal(b'{"__metadata__":{"sha256":"' + b"0" * 64 + b'"' + noise) if sealed else noise
    with pytest.raises(Unreadable):
        recordings.parse(data)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def places(value, path=()):
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


MANIFEST = recordings.manifest_of(SMALL)


@given(st.sampled_from([path for path in places(MANIFEST) if path]), JSON)
def test_a_manifest_with_anything_anywhere_is_read_or_refused(path, value):
    forged = recordings.with_manifest(SMALL, change(list(path), value))
    try:
        recordings.parse(forged)
    except Unreadable as refusal:
        assert str(refusal).isprintable()
