# SPDX-License-Identifier: Apache-2.0
"""Which cases run: the selection that a user makes, and the tasks that follow from it, in a fixed order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import ModuleType
from typing import TYPE_CHECKING

from hal.errors import ConfigError
from hal_conformance.case import DTYPES, Params
from hal_conformance.text import plain

if TYPE_CHECKING:
    from hal_conformance.case import Case, Scale


MAX_GLOBS = 100
MAX_GLOB = 200
"""Globs of a selection, and characters of one: a selection is part of a recording, which may be hostile."""


@dataclass(frozen=True)
class Selection:
    """What a user asked for.

    Attributes:
        cases: globs; a case is in if one of them matches. Empty: every case.
        dtypes: storage dtypes; empty: every one.
        scale: size of the shapes.
        seed: of every input.
    """

    cases: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    scale: Scale = "small"
    seed: int = 0

    def as_json(self) -> dict[str, object]:
        """Return the selection as plain JSON values."""
        return {"cases": list(self.cases), "dtypes": list(self.dtypes), "scale": self.scale, "seed": self.seed}


@dataclass(frozen=True)
class Task:
    """One case with its parameters: what becomes one result for each subject."""

    case: Case
    params: Params

    @property
    def name(self) -> str:
        """Name of the result, such as `router.topk_set[mixtral-8x7b]`."""
        return f"{self.case.name}[{self.params.preset}]"

    def __str__(self) -> str:
        return f"{self.name} {self.params.dtype}"


@dataclass(frozen=True)
class Catalogue:
    """The cases that a suite has; a worker finds the same ones by the module's name.

    Attributes:
        module: dotted name of a module with `ALL` and `by_name`.
    """

    module: str = "hal_conformance.cases"

    def _load(self) -> ModuleType:
        import importlib

        return importlib.import_module(self.module)

    def all(self) -> tuple[Case, ...]:
        """Return every case."""
        cases: tuple[Case, ...] = self._load().ALL
        return cases

    def by_name(self, name: str) -> Case:
        """Return one case. Raises KeyError if there is none of that name."""
        find: Callable[[str], Case] = self._load().by_name
        return find(name)


def matches(glob: str, case: Case, preset: str) -> bool:
    """Tell whether a glob means this case: by its name, its family, or its name with the preset.

    Only `*` and `?` are special: brackets are part of a result's name.
    """
    # fnmatch, since its patterns never backtrack for long: a glob may come from a forged recording.
    pattern = glob.replace("[", "[[]")
    return any(fnmatchcase(text, pattern) for text in (case.name, case.family, f"{case.name}[{preset}]"))


def plan(selection: Selection, cases: Iterable[Case]) -> list[Task]:
    """Return the tasks, ordered by family, preset, dtype and case: neighbours have the same weights (`kept.Kept`).

    Raises:
        ConfigError: a glob matches no case, there are too many, or the seed is out of range.
    """
    if len(selection.cases) > MAX_GLOBS or any(len(glob) > MAX_GLOB for glob in selection.cases):
        raise ConfigError(f"more than {MAX_GLOBS} globs of cases, or one of more than {MAX_GLOB} characters")
    if not 0 <= selection.seed < 2**32:
        raise ConfigError(f"seed {selection.seed} is out of range", expected="0 <= seed < 2**32")
    known = [(case, preset) for case in cases for preset in case.presets()]
    for glob in selection.cases:
        if not any(matches(glob, case, preset) for case, preset in known):
            raise ConfigError(f"no case matches {plain(glob)!r}", hint="hal conformance list")
    chosen = [
        Task(case, Params(preset, dtype, selection.scale, selection.seed))
        for case, preset in known
        if not selection.cases or any(matches(glob, case, preset) for glob in selection.cases)
        if selection.scale in case.scales(preset)
        for dtype in case.dtypes()
        if not selection.dtypes or dtype in selection.dtypes
    ]
    if known and not chosen:
        asked = " ".join(selection.cases) or "all cases"
        dtypes = f" in {plain(', '.join(selection.dtypes))}" if selection.dtypes else ""
        raise ConfigError(
            f"{plain(asked)}: nothing of it runs at scale {selection.scale}{dtypes}",
            hint="hal conformance explain NAME says what runs where",
        )
    families, presets = _places(case.family for case, _ in known), _places(preset for _, preset in known)
    return sorted(
        chosen,
        key=lambda t: (families[t.case.family], presets[t.params.preset], DTYPES.index(t.params.dtype)),
    )


def complete(selection: Selection, cases: Iterable[Case]) -> dict[str, list[tuple[str, str]]]:
    """Return, for each dtype, name and family of every result that a complete run at this scale and seed has."""
    found: dict[str, list[tuple[str, str]]] = {}
    for task in plan(Selection(scale=selection.scale, seed=selection.seed), cases):
        found.setdefault(task.params.dtype, []).append((task.name, task.case.family))
    return found


def _places(texts: Iterable[str]) -> dict[str, int]:
    """Return the place of each text's first occurrence."""
    places: dict[str, int] = {}
    for place, text in enumerate(texts):
        places.setdefault(text, place)
    return places


def closest(name: str, cases: Sequence[Case]) -> list[str]:
    """Return the names of cases that a mistyped name may have meant."""
    import difflib

    return difflib.get_close_matches(name, [case.name for case in cases], n=3)
