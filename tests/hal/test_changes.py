# SPDX-License-Identifier: Apache-2.0
import gc
import logging
import os
import threading
import warnings

import pytest

from hal.changes import Changes, Switch
from hal.errors import ConfigError, DeviceClosed, DeviceConflict
from hal.facet import Facet


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


def test_a_closed_ledger_has_put_everything_back_and_refuses_to_set_anything():
    flag, owner = Flag(), Changes("a")
    owner.set(flag.switch, 1)
    owner.close()
    owner.close()
    assert (flag.value, owner.closed) == (0, True)
    with pytest.raises(DeviceClosed, match="after it was closed"):
        owner.set(flag.switch, 1)
    assert flag.value == 0
    second = Changes("b")
    second.set(flag.switch, 2)
    second.close()
    assert flag.value == 0


def test_a_facet_belongs_to_the_handle_that_it_is_attached_to_and_ends_with_it():
    facet, handle = Facet("a"), Changes("a (handle 1)")
    facet.attach(handle)
    facet.check_open()
    handle.close()
    with pytest.raises(DeviceClosed, match="a: the device is closed"):
        facet.check_open()


def test_what_the_user_wrote_meanwhile_is_shown_and_stays_with_a_warning(caplog):
    flag, owner = Flag(), Changes("a")
    owner.set(flag.switch, 1)
    flag.value = 7
    (change,) = owner
    assert (change.new, change.now) == (1, 7)
    assert "somebody else has set it to 7" in str(change)
    with caplog.at_level(logging.WARNING, logger="hal"):
        owner.release()
    assert flag.value == 7
    assert "was set to 7 after this device had set it to 1; it stays" in caplog.text


@pytest.mark.parametrize("wanted", [1, 2])
def test_asking_once_more_sets_it_again_and_the_users_newer_value_is_what_comes_back(wanted):
    flag, owner = Flag(), Changes("a")
    owner.set(flag.switch, 1)
    flag.value = 7
    owner.set(flag.switch, wanted)
    assert flag.value == wanted
    assert [(c.old, c.new) for c in owner] == [(7, wanted)]
    owner.release()
    assert flag.value == 7


def test_a_second_holder_of_the_same_value_really_gets_it():
    flag, first, second = Flag(), Changes("a"), Changes("b")
    first.set(flag.switch, 1)
    flag.value = 7
    second.set(flag.switch, 1)
    assert flag.value == 1
    first.release()
    second.release()
    assert flag.value == 7


def test_a_setting_that_inherits_is_put_back_as_inheriting():
    parent, own = [3], [None]
    child = Switch(
        "child",
        read=lambda: parent[0] if own[0] is None else own[0],
        write=lambda value: own.__setitem__(0, value),
        saved=lambda: own[0],
    )
    owner = Changes("a")
    owner.set(child, 5)
    assert child.read() == 5
    owner.release()
    parent[0] = 4
    assert child.read() == 4


def test_one_switch_that_cannot_be_written_keeps_no_other_from_being_put_back():
    one, stuck, two, owner = Flag(), Flag(), Flag(), Changes("a")
    frozen = []

    def write(value):
        if frozen:
            raise RuntimeError("frozen")
        stuck.value = value

    for switch in (one.switch, Switch("stuck", lambda: stuck.value, write), two.switch):
        owner.set(switch, 1)
    frozen.append(True)
    with pytest.raises(RuntimeError, match="frozen"):
        owner.close()
    assert (one.value, two.value) == (0, 0)
    assert list(owner) == []


def test_what_the_user_wrote_before_a_refused_block_is_what_it_is_afterwards():
    flag, owner = Flag(), Changes("a")
    owner.set(flag.switch, 1)
    flag.value = 7
    for wanted in (1, 2):
        with pytest.raises(RuntimeError, match="refused"), owner.together():
            owner.set(flag.switch, wanted)
            assert flag.value == wanted
            raise RuntimeError("refused")
        assert flag.value == 7
        assert [(c.old, c.new, c.now) for c in owner] == [(0, 1, 7)]
    owner.release()
    assert flag.value == 7


def test_a_refused_block_leaves_what_another_owner_holds_as_it_was():
    flag, first, second = Flag(), Changes("first"), Changes("second")
    first.set(flag.switch, 1)
    flag.value = 7
    with pytest.raises(RuntimeError, match="refused"), second.together():
        second.set(flag.switch, 1)
        raise RuntimeError("refused")
    assert flag.value == 7
    assert (len(first), len(second)) == (1, 0)
    first.release()
    assert flag.value == 7


def test_what_is_written_by_others_during_a_refused_block_stays():
    one, two, owner = Flag(), Flag(), Changes("a")
    owner.set(one.switch, 1)
    with pytest.raises(RuntimeError, match="refused"), owner.together():
        owner.set(one.switch, 2)
        owner.set(two.switch, 2)
        one.value = two.value = 7
        raise RuntimeError("refused")
    assert (one.value, two.value) == (7, 7)
    owner.close()


def test_an_inner_block_is_taken_back_with_the_outer_one():
    flag, owner = Flag(), Changes("a")
    with pytest.raises(RuntimeError, match="refused"), owner.together():
        with owner.together():
            owner.set(flag.switch, 1)
        owner.set(flag.switch, 2)
        raise RuntimeError("refused")
    assert flag.writes == [1, 2, 1, 0]
    assert len(owner) == 0
    with owner.together():
        with pytest.raises(RuntimeError, match="refused"), owner.together():
            owner.set(flag.switch, 1)
            raise RuntimeError("refused")
        owner.set(flag.switch, 2)
    assert flag.value == 2
    owner.release()
    assert flag.value == 0


def test_a_ledger_that_is_dropped_warns_and_its_switch_stays_until_the_next_owner_lets_go():
    flag, second = Flag(), Changes("b")
    owner = Changes("a (handle 1)")
    owner.set(flag.switch, 1)
    with pytest.warns(ResourceWarning, match=rf"a \(handle 1\) was dropped without close\(\), and {flag.switch.name}"):
        del owner
    assert flag.writes == [1]
    second.set(flag.switch, 2)  # nobody is left who could let go
    assert [(c.old, c.new) for c in second] == [(0, 2)]
    second.close()
    assert flag.value == 0


def test_a_ledger_that_holds_nothing_is_dropped_in_silence():
    flag, owner = Flag(), Changes("a")
    with pytest.raises(RuntimeError, match="refused"), owner.together():
        owner.set(flag.switch, 1)
        raise RuntimeError("refused")
    owner.set(flag.switch, 1)
    owner.close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del owner
        gc.collect()


def test_a_ledger_may_be_dropped_on_any_thread_while_another_one_is_at_work():
    flag, inside, dropped = Flag(), threading.Event(), threading.Event()
    abandoned, owner = [Changes("a")], Changes("b")
    abandoned[0].set(Flag().switch, 1)

    def drop():
        inside.wait(30)
        with pytest.warns(ResourceWarning, match="a was dropped"):
            abandoned.clear()
        dropped.set()

    thread = threading.Thread(target=drop)
    thread.start()
    with owner.together():
        owner.set(flag.switch, 1)
        inside.set()
        assert dropped.wait(30), "the collector waits for the ledger's lock"
    thread.join()
    owner.close()
    assert flag.value == 0
