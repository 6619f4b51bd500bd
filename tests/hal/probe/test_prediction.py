# SPDX-License-Identifier: Apache-2.0
"""Products of two devices are compared bit by bit, on one machine or through a file that anything may have happened to."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hal.errors import ConfigError
from hal.probe import prediction, recording
from hal.probe.prediction import CLASSES, compare, computed, key, operands


@pytest.fixture(scope="module")
def h200():
    return computed("sim:h200", ["bfloat16"])


@pytest.fixture(scope="module")
def file(h200, tmp_path_factory):
    path = tmp_path_factory.mktemp("products") / "h200.safetensors"
    recording.write(h200, path)
    return path


def test_a_device_predicts_itself(h200):
    for found in compare(h200, computed("sim:h20", ["bfloat16"])):
        assert (found.share, found.equal_shapes, found.differing) == (1.0, found.shapes, {})


def test_another_unit_and_another_schedule_are_told_apart(h200):
    for other in ("sim:a100", "sim:mi300x", "sim:h200/splitk=4"):
        for found in compare(h200, computed(other, ["bfloat16"])):
            assert found.share < 0.6, (other, found)


def test_splitting_k_changes_nothing_where_k_is_one_grain(h200):
    (aligned, *_) = compare(h200, computed("sim:h200/splitk=4", ["bfloat16"]))
    assert aligned.kind == "aligned"
    assert "64x64x64" not in aligned.differing
    assert len(aligned.differing) == len(CLASSES["aligned"]) - 1


def test_there_are_twenty_shapes_and_more_and_the_exact_product_of_each_is_zero():
    assert sum(map(len, CLASSES.values())) >= 20
    for shape in ((3, 6, 2), (2, 7, 3)):
        a, b = operands(key("float16", shape), shape)
        assert a.shape == shape[:2]
        assert b.shape == shape[1:]
        assert torch.all((a @ b).abs() < 1e-14)
        assert (a != 0).any()


def test_a_recording_gives_back_every_bit(h200, file):
    found = recording.read(file)
    assert found.device == h200.device
    assert {name: x.dtype for name, x in found.results.items()} == {name: x.dtype for name, x in h200.results.items()}
    assert all(each.share == 1.0 for each in compare(h200, found))


def test_nan_is_equal_to_the_same_nan(h200):
    results = {name: torch.full_like(x, torch.nan) for name, x in h200.results.items()}
    odd = prediction.Products("a", {}, {}, results, {})
    assert all(each.share == 1.0 for each in compare(odd, odd))


def refused(path):
    with pytest.raises(ConfigError) as error:
        recording.read(path)
    assert len(error.value.message.splitlines()) == 1


def altered(file, tmp_path, change):
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    described = json.loads(header["__metadata__"]["hal"])
    change(header, described)
    header["__metadata__"]["hal"] = json.dumps(described)
    made = json.dumps(header).encode()
    path = tmp_path / "altered.safetensors"
    path.write_bytes(len(made).to_bytes(8, "little") + made + data[8 + length :])
    return path


CHANGES = {
    "another schema": lambda header, described: described.update(schema="hal.products/9"),
    "another seed": lambda header, described: described.update(seed=1),
    "no schema": lambda header, described: described.pop("schema"),
    "a dtype that is none": lambda header, described: described["dtypes"].update({"bfloat16/64x64x64": "int3"}),
    "a dtype of another size": lambda header, described: described["dtypes"].update({"bfloat16/64x64x64": "float64"}),
    "a product that nobody knows": lambda header, described: header.update({"bfloat16/1x2x3": header.pop("bfloat16/64x64x64")}),
    "another shape": lambda header, described: header["bfloat16/64x64x64"].update(shape=[32, 128]),
    "an enormous shape": lambda header, described: header["bfloat16/64x64x64"].update(shape=[1 << 40, 1 << 40]),
    "no device": lambda header, described: described.update(device=7),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_an_altered_recording_is_refused_in_one_line(file, tmp_path, change):
    refused(altered(file, tmp_path, CHANGES[change]))


def test_what_is_no_recording_is_refused_in_one_line(file, tmp_path, monkeypatch):
    cut = tmp_path / "cut"
    cut.write_bytes(file.read_bytes()[:-5])
    empty = tmp_path / "empty"
    empty.touch()
    for path in (cut, empty, tmp_path, tmp_path / "missing"):
        refused(path)
    monkeypatch.setattr(recording, "LARGEST_BYTES", 100)
    refused(file)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=300))
def test_any_bytes_are_refused_in_one_line(tmp_path, data):
    path = tmp_path / "bytes"
    path.write_bytes(data)
    refused(path)


def test_a_folder_that_is_not_there_leaves_nothing(h200, tmp_path):
    with pytest.raises(ConfigError, match="cannot be written"):
        recording.write(h200, tmp_path / "none" / "f")
    assert list(tmp_path.iterdir()) == []
