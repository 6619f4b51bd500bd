# SPDX-License-Identifier: Apache-2.0
import copy
import pickle

import pytest

import hal
from hal import errors
from hal.memory_stats import MemoryStats

STATS = MemoryStats(allocated=7, sources={"allocated": "somewhere"})

EVERY = [
    hal.ConfigError("a", expected="b", hint="c"),
    hal.ShapeError("a", expected="b"),
    hal.UnknownDevice("a", device="d"),
    hal.Absent("a", device="d", hint="c"),
    hal.DeviceConflict("a", device="d"),
    hal.OutOfMemoryError("a", device="d", requested=3, stats=STATS),
    hal.UnsupportedPrecision("a", device="d", what="w"),
    hal.CollectiveError("a", operation="o", rank=1),
    hal.CollectiveTimeout("a", operation="o", rank=1, hint="c"),
]


@pytest.mark.parametrize("error", EVERY, ids=lambda error: type(error).__name__)
def test_an_error_that_travels_between_processes_keeps_its_class_its_text_and_what_it_carries(error):
    for arrived in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(arrived) is type(error)
        assert str(arrived) == str(error)
        assert vars(arrived) == vars(error)


def test_every_class_of_the_tree_is_drawn_in_it():
    drawn = errors.__doc__
    classes = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, hal.HalError)]
    assert [kind.__name__ for kind in classes if kind.__name__ not in drawn] == []
