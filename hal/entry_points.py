# SPDX-License-Identifier: Apache-2.0
"""What the installed distributions register in a group of entry points, read from their files.

`importlib.metadata` answers the same, and imports a parser of e-mail for it: that took as long as everything else which
`hal run` does before Python starts the program. It is asked where distributions are no folders on the path.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial, reduce
from importlib.machinery import PathFinder

from hal.errors import described


@dataclass(frozen=True)
class EntryPoint:
    """A name in a group, and what stands under it.

    Attributes:
        name: in its group.
        value: what it leads to, as `module:attribute`.
    """

    name: str
    value: str

    def load(self) -> object:
        """Import the module and return its attribute, or the module where none is named."""
        module, _, path = self.value.partition("[")[0].partition(":")
        return reduce(getattr, filter(None, path.strip().split(".")), importlib.import_module(module.strip()))


@dataclass(frozen=True)
class Plugin:
    """A registered name with everyone who registers it; more than one owner makes it unusable.

    Attributes:
        name: in its group.
        entry_points: what to load, one for each owner.
        owners: the distributions, as `name version`.
    """

    name: str
    entry_points: tuple[EntryPoint, ...]
    owners: tuple[str, ...]

    def claimants(self) -> str:
        """Return everyone who registers the name, with what each would load."""
        pairs = zip(self.owners, self.entry_points, strict=True)
        return " and by ".join(f"{owner} ({entry_point.value})" for owner, entry_point in pairs)


# No lock: two threads that miss a cache at once do the same work twice and agree on the result.
_found: dict[str, tuple[tuple[str, ...], tuple[Plugin, ...], tuple[str, ...]]] = {}


def registered(group: str) -> tuple[Plugin, ...]:
    """Return what every installed distribution registers in a group, without loading it."""
    return _scanned(group)[0]


def unreadable(group: str) -> tuple[str, ...]:
    """Return a sentence for each distribution whose entry points cannot be read: whatever it registers is lost."""
    return _scanned(group)[1]


def _scanned(group: str) -> tuple[tuple[Plugin, ...], tuple[str, ...]]:
    path = tuple(sys.path)
    if group not in _found or _found[group][0] != path:
        _found[group] = (path, *_scan(group))
    return _found[group][1:]


def _scan(group: str) -> tuple[tuple[Plugin, ...], tuple[str, ...]]:
    by_name: dict[str, dict[tuple[str, str], EntryPoint]] = {}
    problems = []
    for place, read in _distributions():
        text = read("entry_points.txt")
        if not text:
            continue
        try:
            found = [entry_point for section, entry_point in _parsed(text) if section == group]
        except ValueError as error:
            problems.append(
                f"{_identity(place, read)}: its entry points cannot be read ({described(error)}), so nothing that it "
                "registers is found; try: reinstall it, or uninstall it"
            )
            continue
        owner = _identity(place, read) if found else ""
        for entry_point in found:
            # One distribution may be seen twice, through an editable install and its build folder.
            by_name.setdefault(entry_point.name, {})[owner, entry_point.value] = entry_point
    plugins = [
        Plugin(name, tuple(found.values()), tuple(owner for owner, _ in found)) for name, found in by_name.items()
    ]
    return tuple(plugins), tuple(problems)


def _parsed(text: str) -> Iterator[tuple[str, EntryPoint]]:
    """Yield section and entry point of each line of an `entry_points.txt`.

    Raises:
        ValueError: a line of a section is none.
    """
    section = None
    for line in map(str.strip, text.splitlines()):
        if line.startswith("["):
            section = line.strip("[] ")
        elif section is not None and line and not line.startswith("#"):
            name, equals, value = line.partition("=")
            if not equals:
                raise ValueError(f"{line!r} is no `name = module:attribute`")
            yield section, EntryPoint(name.strip(), value.strip())


# Installed distributions -------------------------------------------------------------------------------------------

_Read = Callable[[str], str | None]
"""Returns the text of one of a distribution's files, None if there is no such file."""


def _identity(place: str, read: _Read) -> str:
    """Return name and version, or where it lies if it does not say."""
    headers = (read("METADATA") or read("PKG-INFO") or "").partition("\n\n")[0]
    said = dict(re.findall(r"^(Name|Version):[ \t]*(\S.*?)\s*$", headers, re.MULTILINE))
    return f"{said['Name']} {said['Version']}" if len(said) == 2 else f"{place} (without a name)"


def _distributions() -> Iterator[tuple[str, _Read]]:
    """Yield for each installed distribution where it lies, and what reads its files."""
    folders = [os.path.abspath(folder) for folder in sys.path]  # noqa: PTH100  pathlib costs more than all of this
    others = any(hasattr(finder, "find_distributions") and getattr(finder, "registers", True)
                 for finder in sys.meta_path if finder is not PathFinder)  # fmt: skip
    if others or any(folder.endswith(".egg") or os.path.isfile(folder) for folder in folders):  # noqa: PTH113
        yield from _distributions_elsewhere()
        return
    seen = set()
    for folder in folders:
        for child in _listed(folder):
            stem, kind = os.path.splitext(child.lower())  # noqa: PTH122
            name = re.sub("[-_.]+", "_", stem.partition("-")[0])
            if kind in (".dist-info", ".egg-info") and name not in seen:  # the first on the path is the installed one
                seen.add(name)
                yield folder, partial(_text, os.path.join(folder, child))  # noqa: PTH118


def _distributions_elsewhere() -> Iterator[tuple[str, _Read]]:
    """Let Python's own search look into archives, and wherever an importer of somebody's keeps distributions."""
    from importlib import metadata

    seen = set()
    for distribution in metadata.distributions():
        place = str(distribution.locate_file(""))
        name = _identity(place, distribution.read_text).partition(" ")[0]
        if name not in seen:
            seen.add(name)
            yield place, distribution.read_text


def _listed(folder: str) -> list[str]:
    try:
        return os.listdir(folder)  # noqa: PTH208
    except OSError:
        return []


def _text(folder: str, name: str) -> str | None:
    try:
        with open(os.path.join(folder, name), encoding="utf-8", errors="replace") as file:  # noqa: PTH118, PTH123
            return file.read()
    except OSError:
        return None
