# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import importlib.machinery
import sys
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from hal import entry_points


def found(group: str) -> set[tuple[str, str, str]]:
    return {
        (plugin.name, entry_point.value, owner)
        for plugin in entry_points.registered(group)
        for entry_point, owner in zip(plugin.entry_points, plugin.owners, strict=True)
    }


@pytest.mark.parametrize("group", ["hal.backends", "hal.commands", "hal.replacements", "console_scripts", "pytest11"])
def test_python_itself_finds_the_same(group: str) -> None:
    python = {
        (e.name, e.value, f"{e.dist.name} {e.dist.version}") for e in metadata.entry_points(group=group) if e.dist
    }
    assert found(group) == python != set()


def test_an_archive_and_an_egg_on_the_path_are_searched_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, distributions: Any
) -> None:
    distributions.stub("mychip")
    with zipfile.ZipFile(tmp_path / "packed.zip", "w") as archive:
        archive.writestr(
            "packed-2.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: packed\nVersion: 2.0\n\nName: no"
        )
        archive.writestr("packed-2.0.dist-info/entry_points.txt", "[hal.backends]\nother = packed:backend\n")
    egg = tmp_path / "old-0.1.egg" / "EGG-INFO"
    egg.mkdir(parents=True)
    (egg / "PKG-INFO").write_text("Metadata-Version: 1.1\nName: old\nVersion: 0.1\n")
    (egg / "entry_points.txt").write_text("[hal.backends]\nelder = old:backend\n")
    before = found("hal.backends")
    monkeypatch.syspath_prepend(tmp_path / "packed.zip")
    monkeypatch.syspath_prepend(egg.parent)
    added = {("other", "packed:backend", "packed 2.0"), ("elder", "old:backend", "old 0.1")}
    assert found("hal.backends") == before | added


def test_an_importer_that_keeps_distributions_of_its_own_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "kept-3.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kept\nVersion: 3.0\n")
    (info / "entry_points.txt").write_text("[hal.backends]\nkept = kept:backend\n")

    class Importer(importlib.machinery.PathFinder):
        @classmethod
        def find_distributions(cls, context: Any = metadata.DistributionFinder.Context()) -> Any:  # noqa: B008
            return [metadata.PathDistribution(info)]

    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, Importer])
    monkeypatch.syspath_prepend(
        tmp_path / "nothing here"
    )  # what is found is remembered as long as the path is the same
    assert ("kept", "kept:backend", "kept 3.0") in found("hal.backends")


@pytest.mark.parametrize(
    ("value", "expected"),
    [("os.path:join", "join"), ("os.path : join [fast]", "join"), ("os", "os"), ("os:path.join", "join")],
)
def test_an_entry_point_leads_where_pythons_own_does(value: str, expected: str) -> None:
    loaded: Any = entry_points.EntryPoint("name", value).load()
    assert loaded is metadata.EntryPoint("name", value, "group").load()
    assert loaded.__name__ == expected
