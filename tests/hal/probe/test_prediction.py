# SPDX-License-Identifier: Apache-2.0
"""Products of two devices side by side, and in a file that is read as it was written or refused."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

from hal.errors import ConfigError, UnknownDevice
from hal.probe import prediction, recording
from hal.probe.prediction import CLASSES, Products, compare, key

SMALL = (1, 64, 1)


@pytest.fixture(scope="module")
def h200():
    return prediction.computed("sim:h200", ["bfloat16"])


@pytest.fixture(scope="module")
def others():
    return {name: prediction.computed(name, ["bfloat16"]) for name in ("sim:a100", "sim:h200/splitk=4")}


def codes(x):
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def test_a_simulated_device_predicts_itself(h200):
    again = prediction.computed("sim:h200", ["bfloat16"])
    found = compare(h200, again)
    assert [each.kind for each in found] == list(CLASSES)
    for each in found:
        assert each.equal_shapes == each.shapes == len(CLASSES[each.kind])
        assert each.equal_elements == each.elements
        assert each.share == 1.0
        assert not each.differing


def test_another_architecture_differs(h200, others):
    for each in compare(h200, others["sim:a100"]):
        assert each.equal_shapes < each.shapes
        assert each.share < 0.9
        assert all(share < 1 for share in each.differing.values())


def test_slices_of_k_differ_where_there_is_more_than_one(h200, others):
    agreement = {each.kind: each for each in compare(h200, others["sim:h200/splitk=4"])}
    assert agreement["large K"].equal_shapes == 0
    short = {"x".join(map(str, shape)) for shapes in CLASSES.values() for shape in shapes if shape[1] <= 64}
    assert {"64x64x64", "1x64x1"} <= short
    for each in agreement.values():
        assert not short & set(each.differing)


def test_the_operands_are_the_same_everywhere_and_cancel():
    a, b = prediction.operands("x", (3, 101, 2))
    again = prediction.operands("x", (3, 101, 2))
    assert torch.equal(a, again[0])
    assert torch.equal(b, again[1])
    assert a.shape == (3, 101)
    assert b.shape == (101, 2)
    assert float((a @ b).abs().max()) < 1e-12
    assert not torch.equal(a, prediction.operands("y", (3, 101, 2))[0])


def test_a_format_that_a_device_has_not_is_refused_with_a_reason():
    found = prediction.computed("sim:v100", ["bfloat16", "nonsense"])
    assert not found.results
    assert set(found.refused) == {"bfloat16", "nonsense"}
    assert compare(found, found) == []


def test_a_shape_that_is_refused_is_told_and_not_compared(monkeypatch):
    monkeypatch.setattr(prediction, "CLASSES", {"tiny M or N": (SMALL, (2, 512, 256))})
    whole = prediction.computed("cpu", ["float32"])
    part = Products("part", {}, {}, {key("float32", SMALL): whole.results[key("float32", SMALL)]}, {})
    (found,) = compare(whole, part)
    assert (found.shapes, found.equal_shapes) == (1, 1)


def test_other_dtypes_are_unequal_and_zeros_of_two_signs_too():
    def of(x):
        return Products("x", {}, {}, {key("bfloat16", SMALL): x}, {})

    zero = torch.zeros(1, 1)
    assert compare(of(zero), of(-zero))[0].share == 0.0
    assert compare(of(zero), of(zero.bfloat16()))[0].share == 0.0
    assert compare(of(zero * torch.nan), of(zero * torch.nan))[0].share == 1.0


def test_an_unknown_device_is_refused():
    with pytest.raises(UnknownDevice):
        prediction.computed("nonesuch:0")


# Files ---------------------------------------------------------------------------------------------------------------


def small(dtype=torch.bfloat16, name="bfloat16", code=-1):
    x = torch.full((1, 1), code, dtype={2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]).view(dtype)
    return Products("cpu", {"id": "cpu", "name": None}, {"torch": "2"}, {key(name, SMALL): x}, {"float16": "no"})


def test_a_recording_is_read_bit_for_bit(h200, tmp_path):
    path = tmp_path / "h200.safetensors"
    recording.write(h200, path)
    found = recording.read(path)
    assert found.source == str(path)
    assert (found.device, found.versions, found.refused) == (h200.device, h200.versions, h200.refused)
    assert found.results.keys() == h200.results.keys()
    for name, x in h200.results.items():
        assert found.results[name].dtype == x.dtype
        assert torch.equal(codes(found.results[name]), codes(x))
    assert all(each.share == 1.0 for each in compare(h200, found))
    assert [each.name for each in tmp_path.iterdir()] == [path.name]  # nothing temporary


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("code", [-1, 1, 0x7C01])
def test_any_bits_of_any_dtype_come_back(tmp_path, dtype, code):
    products = small(dtype, code=code)
    recording.write(products, tmp_path / "f")
    (x,) = recording.read(tmp_path / "f").results.values()
    assert x.dtype == dtype
    assert int(codes(x)) == code


def refused(path):
    """Return the one line that says why."""
    before = sorted(path.parent.rglob("*"))
    with pytest.raises(ConfigError) as caught:
        recording.read(path)
    assert "\n" not in caught.value.message
    assert str(path) in caught.value.message
    assert sorted(path.parent.rglob("*")) == before
    return caught.value.message


def described(path, change):
    """Write a small recording whose description was changed."""
    recording.write(small(), path)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    metadata = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["hal"])
    changed = change(metadata)
    changed = changed if changed == [1] else metadata
    path.write_bytes(save(load(data), {"hal": json.dumps(changed)}))


@pytest.mark.parametrize(
    ("change", "words"),
    [(lambda m: m.update(schema="hal.products/2"), "is of 'hal.products/2'"),
     (lambda m: m.update(seed=1), "seed 1"),
     (lambda m: m.pop("dtypes"), "no recording"), (lambda m: m.pop("schema"), "no recording"),
     (lambda m: m.update(dtypes={}), "no recording"),
     (lambda m: m.update(dtypes={"bfloat16/1x64x1": "int16"}), "no recording"),
     (lambda m: m.update(dtypes={"bfloat16/1x64x1": "float32"}), "wrong shape or type"),
     (lambda m: m.update(device=3), "no recording"), (lambda m: m.update(refused=None), "no recording"),
     (lambda m: [1], "no recording")],
)  # fmt: skip
def test_a_changed_description_is_refused(tmp_path, change, words):
    described(tmp_path / "f", change)
    assert words in refused(tmp_path / "f")


def test_a_product_of_another_shape_or_name_is_refused(tmp_path):
    path = tmp_path / "f"
    recording.write(small(), path)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + length])["__metadata__"]
    path.write_bytes(save({"bfloat16/1x64x1": torch.zeros(2, 1, dtype=torch.int16)}, metadata))
    assert "wrong shape or type" in refused(path)
    path.write_bytes(save({"bfloat16/1x64x1": torch.zeros(1, 1, dtype=torch.int32)}, metadata))
    assert "wrong shape or type" in refused(path)
    path.write_bytes(save({"bfloat16/5x5x5": torch.zeros(5, 5, dtype=torch.int16)}, metadata))
    assert "does not know" in refused(path)


def test_a_file_without_a_description_is_refused(tmp_path):
    (tmp_path / "f").write_bytes(save({"x": torch.zeros(1)}))
    assert "no recording" in refused(tmp_path / "f")


def test_a_file_that_ends_too_early_is_refused_wherever_it_ends(tmp_path):
    path = tmp_path / "f"
    recording.write(small(), path)
    data = path.read_bytes()
    for end in (*range(0, len(data), 7), len(data) - 1):
        path.write_bytes(data[:end])
        refused(path)


def test_a_folder_and_nothing_are_refused(tmp_path):
    (tmp_path / "folder").mkdir()
    assert "cannot be read" in refused(tmp_path / "folder")
    assert "cannot be read: No such file" in refused(tmp_path / "missing")


def test_a_file_that_is_too_large_is_refused_unread(tmp_path, monkeypatch):
    recording.write(small(), tmp_path / "f")
    monkeypatch.setattr(recording, "LARGEST_BYTES", 10)
    assert "is larger than" in refused(tmp_path / "f")


@given(st.binary(max_size=400))
def test_random_bytes_are_refused(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("random") / "f"
    path.write_bytes(data)
    refused(path)


@given(st.integers(0, 10**9), st.binary(min_size=1, max_size=4))
def test_a_damaged_recording_is_refused_or_is_one(tmp_path_factory, place, damage):
    path = tmp_path_factory.mktemp("damaged") / "f"
    recording.write(small(), path)
    data = bytearray(path.read_bytes())
    at = place % len(data)
    data[at : at + len(damage)] = damage
    path.write_bytes(data)
    try:
        found = recording.read(path)
    except ConfigError as error:
        assert "\n" not in error.message
    else:
        assert all(x.shape == (1, 1) for x in found.results.values())


def test_what_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="cannot be written: No such file"):
        recording.write(small(), tmp_path / "missing" / "f")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match="cannot be written"):
        recording.write(small(), tmp_path / "folder")
    assert [each.name for each in tmp_path.rglob("*")] == ["folder"]
    (tmp_path / "f").write_text("before")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(tmp_path), "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        recording.write(small(), tmp_path / "f")
    assert (tmp_path / "f").read_text() == "before"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["f", "folder"]
