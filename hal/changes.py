# SPDX-License-Identifier: Apache-2.0
"""The ledger of what opening a device changed in this process, and how to put it back.

Several open devices may want the same process-wide switch. A switch is therefore reference-counted: the first
holder saves the old value and sets the new one, a second holder of the same value only counts, another value is
a `DeviceConflict`, and the last one to let go restores the old value.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from hal.errors import ConfigError, DeviceConflict


@dataclass(frozen=True)
class Change:
    """One change to the process: what was changed, from which value, to which."""

    what: str
    old: object
    new: object

    def __str__(self) -> str:
        return f"{self.what}: {self.old!r} -> {self.new!r}"


@dataclass(frozen=True)
class Switch:
    """A process-wide setting that can be read and written.

    Attributes:
        name: as a user would write it, such as `torch.backends.mkldnn.matmul.fp32_precision`. Two switches of
            one name are the same switch.
    """

    name: str
    read: Callable[[], object]
    write: Callable[[Any], object]


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
    owners: list[str]


_lock = threading.RLock()
_holdings: dict[str, _Holding] = {}


class Changes:
    """Everything that one device changed, in order. Thread-safe.

    Args:
        owner: the device; two open handles of one device need two owners.
    """

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self._held: dict[str, object] = {}  # switch name to the value that this owner asked for, in order

    def __iter__(self) -> Iterator[Change]:
        with _lock:
            return iter([Change(name, _holdings[name].old, value) for name, value in self._held.items()])

    def __len__(self) -> int:
        return len(self._held)

    def value(self, name: str) -> object:
        """Return the value at which this owner holds a switch, or None."""
        return self._held.get(name)

    def set(self, switch: Switch, value: object) -> None:
        """Set a switch and hold it until `release`.

        Raises:
            DeviceConflict: another owner holds this switch at another value; nothing is changed.
            ConfigError: the switch does not keep the value; the former one is back.
        """
        with _lock:
            holding = _holdings.get(switch.name)
            if holding is not None and holding.new != value:
                others = [owner for owner in holding.owners if owner != self.owner]
                if others:
                    raise DeviceConflict(
                        f"wants {switch.name} = {value!r}, which {', '.join(others)} holds at {holding.new!r}",
                        device=self.owner,
                        hint=f"close {others[0]} first, or ask both for the same",
                    )
            if holding is None or holding.new != value:
                before = switch.read()
                self._write(switch, value, before)
                old = before if holding is None else holding.old
                holding = _holdings[switch.name] = _Holding(switch, old, value, [self.owner])
            elif self.owner not in holding.owners:
                holding.owners.append(self.owner)
            self._held[switch.name] = value

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
        """Make what is set inside the block all or nothing: an exception puts this owner's switches back."""
        with _lock:
            before = dict(self._held)
            switches = {name: _holdings[name].switch for name in before}
            try:
                yield
            except BaseException:
                self.release([name for name in self._held if name not in before])
                for name, value in before.items():
                    self.set(switches[name], value)
                raise

    def release(self, names: Iterable[str] | None = None) -> None:
        """Let go of the named switches, or of all; the last owner of a switch puts the old value back."""
        with _lock:
            chosen = set(self._held if names is None else names)
            for name in [name for name in reversed(self._held) if name in chosen]:
                del self._held[name]
                holding = _holdings[name]
                holding.owners.remove(self.owner)
                if not holding.owners:
                    del _holdings[name]
                    holding.switch.write(holding.old)
