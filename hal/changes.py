# SPDX-License-Identifier: Apache-2.0
"""The ledger of what opening a device changed in this process, and how to put it back.

Several open devices may want the same process-wide switch. A switch is therefore reference-counted: the first
holder saves the old value and sets the new one, a second holder of the same value only counts, another value is
a `DeviceConflict`, and the last one to let go restores the old value.

A switch belongs to the user all the same. If somebody else wrote it meanwhile, the newer value stays when the last
holder lets go, and a warning in the log says so.

A ledger that is dropped without `close()` leaves its switches as they are, with a `ResourceWarning`, and stands in
nobody's way: whoever sets such a switch next takes it over, with the old value. Nothing is put back at that moment,
since the garbage collector chooses it, and the thread: another precision or allocator in the middle of a training step
would be worse than a switch that stays. A function may also have opened the device only to set it up.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from hal.errors import ConfigError, DeviceClosed, DeviceConflict

log = logging.getLogger("hal")


@dataclass(frozen=True)
class Change:
    """One change to the process.

    Attributes:
        what: the switch.
        old: what is written back when the last holder lets go.
        new: the value at which the device holds it.
        now: what it reads. If that is not `new`, somebody else wrote it since, and it will be left alone.
    """

    what: str
    old: object
    new: object
    now: object

    def __str__(self) -> str:
        since = "" if self.now == self.new else f" (somebody else has set it to {self.now!r} since)"
        return f"{self.what}: {self.old!r} -> {self.new!r}{since}"


@dataclass(frozen=True)
class Switch:
    """A process-wide setting that can be read and written.

    Attributes:
        name: as a user would write it, such as `torch.backends.mkldnn.matmul.fp32_precision`. Two switches of
            one name are the same switch.
        read: returns the value in force.
        write: sets it.
        saved: returns what to write to put the present state back, where that is not what `read` returns: a
            setting that inherits reads as the inherited value, which must not be written back as its own.
    """

    name: str
    read: Callable[[], object]
    write: Callable[[Any], object]
    saved: Callable[[], object] | None = None

    def state(self) -> object:
        """Return what to write to put the present state back."""
        return (self.saved or self.read)()


def environment_switch(name: str) -> Switch:
    """Return the switch that is an environment variable of this process; None means that it is not set."""

    def write(new: str | None) -> None:
        if new is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = new

    return Switch(f"environment variable {name}", lambda: os.environ.get(name), write)


@dataclass
class _Holding:
    switch: Switch
    old: object
    new: object
    owners: list[weakref.ref[Changes]]  # weak, or a dropped ledger would live for ever

    def living(self) -> list[Changes]:
        """Return the owners that were not dropped."""
        return [owner for owner in (reference() for reference in self.owners) if owner is not None]

    def state(self) -> object:
        """Return what to write to put the present state back."""
        # Not `Switch.state` where it is ours: it may have to try out, which this value needs no more.
        return self.new if self.switch.read() == self.new else self.switch.state()


_lock = threading.RLock()
_holdings: dict[str, _Holding] = {}


class Changes:
    """Everything that one open handle of a device changed, in order. Thread-safe.

    Args:
        owner: the device and its handle, for messages.

    Warns:
        ResourceWarning: it was dropped, by everyone who had a reference, while it held something.
    """

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self._held: dict[str, object] = {}  # switch name to the value that this owner asked for, in order
        self._closed = False
        self._undo: contextlib.ExitStack | None = None  # of the innermost `together`
        # Not when the interpreter ends: everything ends with it.
        weakref.finalize(self, _dropped, owner, self._held).atexit = False

    def __iter__(self) -> Iterator[Change]:
        with _lock:
            return iter(
                [
                    Change(name, _holdings[name].old, value, _holdings[name].switch.read())
                    for name, value in self._held.items()
                ]
            )

    def __len__(self) -> int:
        return len(self._held)

    @property
    def closed(self) -> bool:
        """Whether the ledger was closed. Then it holds nothing and refuses to set anything."""
        return self._closed

    def value(self, name: str) -> object:
        """Return the value at which this owner holds a switch, or None."""
        return self._held.get(name)

    def set(self, switch: Switch, value: object) -> None:
        """Set a switch and hold it until `release`.

        Raises:
            DeviceClosed: the ledger is closed: nobody would put the value back.
            DeviceConflict: another owner holds this switch at another value; nothing is changed.
            ConfigError: the switch does not keep the value; the former one is back.
        """
        with _lock:
            if self._closed:
                raise DeviceClosed(f"wants {switch.name} = {value!r} after it was closed", device=self.owner)
            holding = _holdings.get(switch.name)
            if holding is None:
                before = switch.state()
                self._write(switch, value, before)
                _holdings[switch.name] = made = _Holding(switch, before, value, [weakref.ref(self)])
                if self._undo is not None:
                    self._undo.callback(self._take_back, made, before, None)
            else:
                before, former = holding.state(), (holding.old, holding.new, list(holding.owners))
                self._hold_at(holding, value, before)
                if self._undo is not None:
                    self._undo.callback(self._take_back, holding, before, former)
                owners = [owner for owner in holding.living() if owner is not self]
                holding.owners = [weakref.ref(owner) for owner in (*owners, self)]
            self._held[switch.name] = value

    def _hold_at(self, holding: _Holding, value: object, before: object) -> None:
        """Set a switch that is held already."""
        switch = holding.switch
        others = [owner.owner for owner in holding.living() if owner is not self]
        if others and holding.new != value:
            raise DeviceConflict(
                f"wants {switch.name} = {value!r}, which {', '.join(others)} holds at {holding.new!r}",
                device=self.owner,
                hint=f"close {others[0]} first, or ask both for the same",
            )
        ours = switch.read() == holding.new
        if not (ours and holding.new == value):
            self._write(switch, value, before)
        if not ours:
            # The user wrote it since, and now asks for a value once more: theirs is what comes back at the end.
            holding.old = before
        holding.new = value

    def _write(self, switch: Switch, value: object, before: object) -> None:
        try:
            switch.write(value)
            kept = switch.read()
        except BaseException:
            switch.write(before)
            raise
        if kept != value:
            switch.write(before)
            raise ConfigError(
                f"{switch.name} was set to {value!r} for {self.owner} and reads back as {kept!r}",
                expected="a switch that keeps its value",
            )

    def set_environment(self, name: str, value: str) -> None:
        """Set an environment variable and hold it until `release`. Raises as `set` does."""
        self.set(environment_switch(name), value)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Make what is set inside the block all or nothing: an exception takes all of it back.

        Every switch is then what it was before the block, whoever set it: this owner, another one or the user.
        """
        with _lock, contextlib.ExitStack() as undo:
            outer, held, self._undo = self._undo, dict(self._held), undo
            undo.callback(self._forget, held)
            try:
                yield
            finally:
                self._undo = outer
            done = undo.pop_all()
            if outer is not None:
                outer.push(done)

    def _forget(self, held: dict[str, object]) -> None:
        """Hold what was held before a block, at those values, and nothing else."""
        kept = {name: value for name, value in held.items() if name in self._held}
        self._held.clear()  # in place: who is told that this ledger was dropped looks into it
        self._held.update(kept)

    def _take_back(
        self, holding: _Holding, before: object, former: tuple[object, object, list[weakref.ref[Changes]]] | None
    ) -> None:
        """Undo one `set`; what another thread's user wrote since stays."""
        ours = holding.switch.read() == holding.new
        if former is None:
            del _holdings[holding.switch.name]
        else:
            holding.old, holding.new, holding.owners = former
        if ours:
            holding.switch.write(before)

    def release(self, names: Iterable[str] | None = None) -> None:
        """Let go of the named switches, or of all, in reverse order; the last owner of one puts the old value back.

        A switch that somebody else wrote since keeps that value. One that cannot be written does not keep the others
        from being put back; its error is raised at the end.
        """
        with _lock, contextlib.ExitStack() as last_first:
            chosen = set(self._held if names is None else names)
            for name in self._held:
                if name in chosen:
                    last_first.callback(self._let_go, name)

    def _let_go(self, name: str) -> None:
        del self._held[name]
        holding = _holdings[name]
        holding.owners.remove(weakref.ref(self))
        if holding.living():
            return
        del _holdings[name]
        now = holding.switch.read()
        if now == holding.new:
            holding.switch.write(holding.old)
        else:
            log.warning(
                "%s: %s was set to %r after this device had set it to %r; it stays", self.owner, name, now, holding.new
            )

    def close(self) -> None:
        """Let go of everything, and refuse to set anything from now on. Harmless the second time."""
        with _lock:
            self._closed = True
            self.release()


def _dropped(owner: str, held: dict[str, object]) -> None:
    # Called by the garbage collector, anywhere, on any thread: it takes no lock and changes nothing.
    if held:
        warnings.warn(
            f"{owner} was dropped without close(), and {', '.join(held)} stays as it set it",
            ResourceWarning,
            stacklevel=2,
        )
