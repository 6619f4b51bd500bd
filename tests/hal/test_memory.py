# SPDX-License-Identifier: Apache-2.0
import copy
import dataclasses
import json
import pickle
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hal
from hal.allocator_plan import AllocatorPlan, merge_allocator_settings, parse_allocator_settings
from hal.changes import Changes
from hal.errors import CollectiveError, ConfigError, DeviceConflict, OutOfMemoryError, UnsupportedOperation
from hal.memory import requested_bytes
from hal.memory_stats import MemoryStats
from hal.torch_memory import TorchMemory

words = st.text("abcdefghij_", min_size=1, max_size=8)


@given(current=st.dictionaries(words, words, max_size=4), wanted=st.dictionaries(words, words, max_size=4))
def test_merging_keeps_what_the_user_set_or_refuses(current, wanted):
    text = ",".join(f"{k}:{v}" for k, v in current.items())
    conflict = any(key in current and current[key] != value for key, value in wanted.items())
    if conflict:
        with pytest.raises(ConfigError, match="already sets"):
            merge_allocator_settings("CONF", text, wanted)
    else:
        merged = merge_allocator_settings("CONF", text, wanted)
        assert dict(item.split(":") for item in merged.split(",") if item) == {**wanted, **current}


def test_a_bracketed_list_survives_merging():
    current = "roundup_power2_divisions:[256:1,512:2,>:8],backend:native"
    merged = merge_allocator_settings("CONF", current, {"expandable_segments": "True"})
    assert merged == current + ",expandable_segments:True"


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("nonsense", "nonsense"),
        ("a:1,nonsense", "nonsense"),
        ("roundup_power2_divisions:[256:1,512:2", "roundup"),
        ("a:[1,2]x", "a:"),
        ("a:1]", "a:1"),
        ("a:,b:1", "a:"),
        (":1", ":1"),
        ("a:1,,b:2", ",b:2"),
        ("a:1:2", "a:1:2"),
    ],
)
def test_an_unreadable_variable_is_refused_and_never_written_anew(text, part):
    with pytest.raises(ConfigError, match=re.escape(f"cannot be read at '{part}")):
        merge_allocator_settings("CONF", text, {})


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", {}), (" ", {}), ("a:1,", {"a": "1"}), (" a : 1 , b : [2, >:3] ", {"a": "1", "b": "[2, >:3]"})],
)
def test_spaces_and_a_comma_at_the_end_are_read_as_the_allocator_reads_them(text, expected):
    assert parse_allocator_settings("CONF", text) == expected


@pytest.mark.parametrize(
    ("current", "wanted"),
    [("share:0.80", "0.8"), ("share:.8", "0.8"), ("share:true", "True"), ("share:8e-1", "0.8"), ("share: 512", "512")],
)
def test_one_value_written_in_two_ways_is_no_contradiction_and_the_users_way_stays(current, wanted):
    merged = merge_allocator_settings("CONF", current, {"share": wanted})
    assert merged == current.replace(" ", "")


@pytest.mark.parametrize(
    "plan",
    [
        {"max_split_size_mb": 0},
        {"max_split_size_mb": 3.7},
        {"max_split_size_mb": "512"},
        {"max_split_size_mb": True},
        {"garbage_collection_threshold": 1.5},
        {"garbage_collection_threshold": 1},
        {"garbage_collection_threshold": "0.8"},
        {"garbage_collection_threshold": float("nan")},
        {"expandable_segments": "yes"},
        {"expandable_segments": 1},
        {"expandable_segments": 1.0},
    ],
)
def test_an_impossible_plan_is_refused(plan):
    with pytest.raises(ConfigError, match=next(iter(plan))):
        AllocatorPlan(**plan)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity", 2 * 2**30),
        ("NPU out of memory. Tried to allocate 20.00 MiB (NPU 0; 29.50 GiB total", 20 * 2**20),
        ("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4503599627370496 bytes.", 2**52),
        ("no size in here", None),
    ],
)
def test_the_requested_size_is_read_out_of_real_messages(message, expected):
    assert requested_bytes(message) == expected


def test_statistics_are_frozen_to_the_bottom():
    with hal.open_device("cpu") as device:
        stats = device.memory.stats()
        with pytest.raises(TypeError):
            stats.sources["process"] = "x"
        with pytest.raises(dataclasses.FrozenInstanceError):
            stats.process = 1
        given = {"free": "me"}
        mine = MemoryStats(free=1, sources=given)
        given["free"] = "x"
        assert mine.sources["free"] == "me"
        assert device.memory.stats().sources["process"] != "x"


def test_statistics_can_be_copied_sent_and_written_down():
    stats = MemoryStats(free=1, sources={"free": "me"})
    assert pickle.loads(pickle.dumps(stats)) == copy.deepcopy(stats) == stats
    assert MemoryStats(**json.loads(json.dumps(stats.as_json()))) == stats


# --- the facet over a torch device module, on stand-ins ----------------------------------------------------------

TOTAL = 85_017_493_504  # an H100's, no power of two


class Module:
    """A device module that keeps its limit as torch's allocator does: a whole number of bytes, told as a share."""

    def __init__(self):
        self.allowed = {}

    def mem_get_info(self, device):
        return TOTAL // 2, TOTAL

    def set_per_process_memory_fraction(self, share, device):
        assert isinstance(share, float)
        assert 0.0 <= share <= 1.0
        self.allowed[device] = int(share * TOTAL)

    def get_per_process_memory_fraction(self, device):
        return self.allowed[device] / TOTAL if device in self.allowed else 1.0

    def memory_snapshot(self):
        return [{"device": 0, "address": 1}, {"device": 3, "address": 2}, {"device": 3, "address": 3}]


class MuteModule(Module):
    """One that cannot tell its limit."""

    get_per_process_memory_fraction = None


DEVICE = torch.device("cuda", 3)


def handle(module, name="one"):
    memory = TorchMemory("gpu:3", DEVICE, module)
    changes = Changes(name)
    memory.attach(changes)
    return memory, changes


@pytest.mark.parametrize("module", [Module, MuteModule])
@given(nbytes=st.integers(1, TOTAL))
def test_any_limit_is_kept_to_the_byte_and_lifted_with_the_handle(module, nbytes):
    module = module()
    memory, changes = handle(module)
    memory.limit(nbytes)
    assert module.allowed[DEVICE] == nbytes
    assert [(change.old, change.new) for change in changes] == [(TOTAL, nbytes)]
    changes.close()
    assert module.allowed[DEVICE] == TOTAL


@pytest.mark.parametrize("module", [Module, MuteModule])
def test_two_handles_of_one_device_share_its_limit_and_another_devices_is_its_own(module):
    module = module()
    (one, first), (two, second) = handle(module), handle(module, "two")
    one.limit(2**30)
    with pytest.raises(DeviceConflict, match="on cuda:3"):
        two.limit(2**31)
    other = TorchMemory("gpu:0", torch.device("cuda", 0), module)
    other.limit(2**31)
    two.limit(2**30)
    first.close()
    assert module.allowed[DEVICE] == 2**30, "the second still holds it"
    second.close()
    assert module.allowed == {DEVICE: TOTAL, torch.device("cuda", 0): 2**31}
    other.limit(None)
    assert module.allowed[torch.device("cuda", 0)] == TOTAL


def test_a_limit_above_what_there_is_is_none():
    module = Module()
    memory, changes = handle(module)
    memory.limit(2**65)
    assert module.allowed[DEVICE] == TOTAL
    changes.close()


@pytest.mark.parametrize("bad", [0, -1, 1.5e11, "1", True])
def test_what_is_no_number_of_bytes_is_no_limit(bad):
    module = Module()
    memory, _ = handle(module)
    with pytest.raises(ConfigError, match="memory limit in bytes"):
        memory.limit(bad)
    assert module.allowed == {}


def test_a_module_that_cannot_set_a_limit_says_so_before_anything_is_tried():
    class Without(Module):
        set_per_process_memory_fraction = None

    memory, changes = handle(Without())
    with pytest.raises(UnsupportedOperation, match="set_per_process_memory_fraction"):
        memory.limit(2**30)
    assert len(changes) == 0


def test_a_snapshot_has_this_devices_segments_only():
    memory, _ = handle(Module())
    assert [segment["address"] for segment in memory.snapshot()] == [2, 3]


@pytest.mark.parametrize("bad", [None, [1.0], torch.empty(1, device="meta")])
def test_only_a_tensor_on_the_cpu_can_be_pinned(bad):
    memory, _ = handle(Module())
    with pytest.raises(ConfigError, match="cannot pin a"):
        memory.pin(bad)
    with hal.open_device("cpu") as device:
        tensor = torch.ones(3)
        assert device.memory.pin(tensor) is tensor
        with pytest.raises(ConfigError, match="cannot pin a"):
            device.memory.pin(bad)


def test_a_collective_that_ran_out_of_memory_is_out_of_memory_too():
    memory, _ = handle(Module())
    with pytest.raises(OutOfMemoryError) as caught, memory.catch_out_of_memory():
        try:
            raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")
        except RuntimeError as error:
            raise CollectiveError("out of memory", operation="all_reduce", rank=0) from error
    assert caught.value.requested == 2 * 2**30
    assert isinstance(caught.value.__cause__, CollectiveError)
    with pytest.raises(CollectiveError), memory.catch_out_of_memory():
        raise CollectiveError("something else", operation="all_reduce", rank=0) from ValueError("no")


def test_a_closed_devices_memory_is_closed():
    memory, changes = handle(Module())
    changes.close()
    for call in (
        memory.allocated,
        memory.stats,
        memory.reset_peak,
        memory.empty_cache,
        memory.snapshot,
        lambda: memory.limit(None),
        lambda: memory.pin(torch.zeros(1)),
        lambda: memory.catch_out_of_memory().__enter__(),
    ):
        with pytest.raises(hal.DeviceClosed):
            call()
