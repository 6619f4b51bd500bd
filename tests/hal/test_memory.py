# SPDX-License-Identifier: Apache-2.0
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hal.errors import ConfigError
from hal.memory import AllocatorPlan, merge_allocator_settings, requested_bytes

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


def test_an_unreadable_variable_is_refused():
    with pytest.raises(ConfigError, match="cannot be read at 'nonsense'"):
        merge_allocator_settings("CONF", "nonsense", {})


@pytest.mark.parametrize("plan", [{"max_split_size_mb": 0}, {"garbage_collection_threshold": 1.5}])
def test_an_impossible_plan_is_refused(plan):
    with pytest.raises(ConfigError):
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
