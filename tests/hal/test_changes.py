# SPDX-License-Identifier: Apache-2.0
import os

import pytest

from hal.changes import Changes, Switch
from hal.errors import ConfigError, DeviceConflict


class Flag:
    """A process-wide setting of a made-up library."""

    def __init__(self, value=0):
        self.value = value
        self.writes = []
        self.switch = Switch(f"flag {id(self)}", lambda: self.value, self.write)

    def write(self, value):
        self.writes.append(value)
        self.value = value


def test_the_last_owner_puts_the_old_value_back():
    flag, first, second = Flag(), Changes("a"), Changes("b")
    first.set(flag.switch, 1)
    second.set(flag.switch, 1)
    first.release()
    assert flag.value == 1
    second.release()
    assert flag.value == 0
    assert flag.writes == [1, 0]


def test_another_value_is_a_conflict_that_names_the_holder_and_changes_nothing():
    flag, first, second = Flag(), Changes("first device"), Changes("second device")
    first.set(flag.switch, 1)
    with pytest.raises(DeviceConflict, match="first device"):
        second.set(flag.switch, 2)
    assert flag.value == 1
    assert len(second) == 0
    first.release()


def test_an_only_owner_may_change_its_mind_and_the_oldest_value_comes_back():
    flag, owner = Flag(), Changes("a")
    owner.set(flag.switch, 1)
    owner.set(flag.switch, 2)
    assert [(c.old, c.new) for c in owner] == [(0, 2)]
    owner.release()
    assert flag.value == 0


def test_a_switch_that_does_not_keep_its_value_is_an_error_and_is_put_back():
    flag, owner = Flag(), Changes("a")
    deaf = Switch("deaf", lambda: 0, flag.write)
    with pytest.raises(ConfigError, match="reads back as 0"):
        owner.set(deaf, 1)
    assert flag.writes == [1, 0]
    assert len(owner) == 0


def test_what_is_set_together_is_all_or_nothing():
    one, two, owner = Flag(), Flag(), Changes("a")
    owner.set(one.switch, 1)
    with pytest.raises(RuntimeError, match="halfway"), owner.together():
        owner.set(one.switch, 5)
        owner.set(two.switch, 5)
        raise RuntimeError("halfway")
    assert (one.value, two.value) == (1, 0)
    assert [(c.old, c.new) for c in owner] == [(0, 1)]
    owner.release()
    assert one.value == 0


def test_an_environment_variable_that_was_not_set_is_unset_again(monkeypatch):
    monkeypatch.delenv("HAL_TEST_VARIABLE", raising=False)
    owner = Changes("a")
    owner.set_environment("HAL_TEST_VARIABLE", "1")
    assert os.environ["HAL_TEST_VARIABLE"] == "1"
    owner.release()
    assert "HAL_TEST_VARIABLE" not in os.environ
    owner.release()
