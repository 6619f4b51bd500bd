# SPDX-License-Identifier: Apache-2.0
"""A recording whose digest is not that of what it holds hides behind no other, and taints none."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import recordings
from click.testing import CliRunner
from fuzz_recordings import CATALOGUE, sound

from hal_conformance import cli
from hal_conformance.recordings import bundle, recording, sampling
from hal_conformance.recordings.bundle import Unreadable
from hal_conformance.recordings.compare import compare
from hal_conformance.recordings.packed import pack
from hal_conformance.verdicts import Status

HONEST = sound()
AT = 4
"""Of an element of y_TD in the column of float32: before it are one loss and two NaNs."""


def read(data, name="a"):
    return recording.parse(data, name, CATALOGUE)


def forged(name="outputs/values/float32", change=None, tag=np.uint32):
    """Return a recording of which one column was changed; digests of outputs are as they were, the file's is right."""
    _, tensors = bundle.decode(HONEST)
    stored = tensors[name].array("uint8" if name.startswith("outputs/values") else recordings.TAGS[tensors[name].dtype])
    deflated = name.startswith("outputs/values")
    column = np.frombuffer(bundle.inflate(stored, 1 << 20), tag).copy() if deflated else stored.copy()
    change(column)
    made = bundle.deflate(column.tobytes()) if deflated else column
    return recordings.with_json(HONEST, recordings.manifest_of(HONEST), **{name: made})


def held(value):
    def change(column):
        column[AT] = np.float32(value).view(np.uint32)

    return forged(change=change)


def low_bit():
    return forged(change=lambda column: column.__setitem__(AT, column[AT] ^ 1))


def sums():
    return forged("outputs/checksums", lambda column: column.__setitem__(slice(None), 0))


def test_the_forgeries_change_a_sampled_output():
    (first, _) = read(HONEST).entries
    assert first.outputs["y_TD"].grid is not None
    assert read(held(123)).entries[0].outputs["y_TD"].values[1] == 123
    assert read(held(123)).entries[0].outputs["y_TD"].digest == first.outputs["y_TD"].digest


@pytest.mark.parametrize("lie", [lambda: held(123), low_bit, sums])
def test_a_lie_is_found_beside_honest_recordings_in_any_order(lie):
    names = {"honest": HONEST, "lie": lie(), "like it": HONEST}
    for order in itertools.permutations(names):
        with pytest.raises(Unreadable, match=r"lie.*fuzzed\.case\[a\] y_TD.*one of the recordings was altered"):
            compare([read(names[name], name) for name in order])


def test_alone_it_is_judged_by_what_it_holds():
    by_dtype = {row.dtype: row.status for row in compare([read(held(123))]).report.results}
    assert by_dtype["float32"].colour == "red"
    assert by_dtype["bfloat16"] is Status.EXACT


def absent_throughout():
    """Return a recording of which every sampled float32 is the NaN that stands for an element that is not held."""

    def change(column):
        column[:] = ABSENT

    data = forged(change=change)
    manifest = recordings.manifest_of(data)
    for line in manifest["outputs"]:
        line[4] = False  # not said to be finite
    return recordings.with_json(data, manifest)


ABSENT = 0x7FD50000


def test_elements_that_are_forged_to_be_absent_are_nan_and_not_left_unjudged():
    with pytest.raises(Unreadable, match="contradicts itself"):  # the whole outputs, which have a digest
        read(absent_throughout())
    (first, _) = read(HONEST).entries
    start, size = AT - 1, first.outputs["y_TD"].values.size
    column = forged(change=lambda values: values.__setitem__(slice(start, start + size), ABSENT))
    manifest = recordings.manifest_of(column)
    manifest["outputs"][place("y_TD")][4] = False
    found = compare([read(recordings.with_json(column, manifest))])
    rows = {row.dtype: row.status for row in found.report.results}
    assert rows["float32"].colour == "red"
    assert found.exit_status() == 1


def test_a_recording_of_which_no_element_can_be_judged_is_no_agreement():
    found = compare([read(HONEST)])
    assert found.exit_status() == 0
    found.recordings[0]["elements_judged_here"] = 0
    assert found.exit_status() == 1
    assert found.faults() == [f"nothing of {found.recordings[0]['label']} could be judged"]


def test_a_contradiction_between_two_is_one_line_and_exit_status_2(tmp_path, monkeypatch):
    monkeypatch.setattr("hal_conformance.execution.plan.Catalogue", lambda: CATALOGUE)
    for name, data in {"honest": HONEST, "lie": sums()}.items():
        (tmp_path / name).write_bytes(data)
    ran = CliRunner().invoke(cli.conformance, ["compare", str(tmp_path / "honest"), str(tmp_path / "lie")])
    assert ran.exit_code == 2
    assert not ran.stdout
    (line,) = ran.stderr.splitlines()
    assert "one of the recordings was altered" in line


def test_a_changed_digest_with_the_same_elements_is_found():
    data = forged("outputs/sha256", lambda column: column.__setitem__(place("y_TD"), 0))
    with pytest.raises(Unreadable, match="the same elements, and their digests say otherwise"):
        compare([read(HONEST), read(data, "b")])


def place(name):
    return next(at for at, line in enumerate(recordings.manifest_of(HONEST)["outputs"]) if line[0] == name)


# What one file shows by itself is refused when it is read.


def test_a_whole_output_that_does_not_have_its_digest_is_refused_with_exit_status_2(tmp_path, monkeypatch):
    monkeypatch.setattr("hal_conformance.execution.plan.Catalogue", lambda: CATALOGUE)
    data = forged("outputs/sha256", lambda column: column.__setitem__(place("loss"), 0))
    (tmp_path / "lie").write_bytes(data)
    ran = CliRunner().invoke(cli.conformance, ["compare", str(tmp_path / "lie")])
    assert ran.exit_code == 2
    (line,) = ran.stderr.splitlines()
    assert "lie: the recording contradicts itself: of the output loss the elements do not have its digest" in line


def test_two_outputs_with_one_digest_that_differ_are_refused():
    lines = recordings.manifest_of(HONEST)["outputs"]
    a, b = (at for at, line in enumerate(lines) if line[0] == "y_TD")
    data = forged("outputs/sha256", lambda column: column.__setitem__(b, column[a]))
    with pytest.raises(Unreadable, match=r"contradicts itself: y_TD .* has the digest of another output"):
        read(data)


def random(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def with_values(packed, change):
    values = packed.values.copy()
    change(values)
    return type(packed)(**{**vars(packed), "values": values})


def test_an_element_held_twice_has_one_value():
    array = random((64, 64))
    worst = sampling.grid("y_TD", array.shape, 0).indices[:1]
    packed = pack("y_TD", array, 0, worst)
    assert packed.contradiction() == ""
    assert "two values" in with_values(packed, lambda values: values.__setitem__(-1, 9)).contradiction()


def test_a_sampled_output_of_which_everything_is_held_has_its_digest():
    packed = pack("logits_TE", random((8, 256)), 0)
    assert packed.grid.size == packed.size
    assert packed.contradiction() == ""
    assert "digest" in with_values(packed, lambda values: values.__setitem__(5, 9)).contradiction()


@pytest.mark.parametrize("shape", [(16, 64), (15, 35), (2000,)])
def test_a_row_that_is_held_has_its_checksum(shape):
    packed = pack("logits_TE", random(shape), 0)
    assert packed.contradiction() == ""
    found = with_values(packed, lambda values: values.__setitem__(5, 9)).contradiction()
    assert ("checksum" in found) == (len(shape) == 2), "of long vectors no block is held"


def test_worst_elements_that_only_one_recorder_chose_are_no_difference():
    array = random((64, 64))
    a, b = pack("y_TD", array, 0, np.array([70, 71])), pack("y_TD", array, 0, np.array([71, 72]))
    assert not a.contradicts(b)
    assert a.content() != b.content()
    assert a.contradicts(with_values(b, lambda values: values.__setitem__(-2, 9)))
