# SPDX-License-Identifier: Apache-2.0
"""The sites of a file or of a whole repository."""

from __future__ import annotations

import ast
import os
import tokenize
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from hal.launch.scan.outlook import known
from hal.launch.scan.sites import Site, sites

_NOT_ENTERED = {"__pycache__", "node_modules", "site-packages", "build", "dist"}
_SOURCES = (".cu", ".cuh")


@dataclass
class Program:
    """What a scan read.

    Attributes:
        path: that was scanned.
        files: Python files that were read.
        sites: by file and line; files are relative to `path`, or its own name if it is a file.
        unreadable: files that could not be read, each with the reason.
        notebooks: files of Jupyter, which are not read.
    """

    path: Path
    files: int = 0
    sites: list[Site] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)
    notebooks: list[str] = field(default_factory=list)


def scan(path: Path) -> Program:
    """Read a file, or all files below a folder, and run none of them.

    Folders with a point first, and those of installed or built packages, are left out; so are links to folders.

    Raises:
        FileNotFoundError: there is no such path.
    """
    if not path.exists():
        raise FileNotFoundError(path)
    program = Program(path)
    redirected = known()
    for file in _files(path):
        name = str(file.relative_to(path)) if path.is_dir() else file.name
        if file.suffix in _SOURCES:
            program.sites.append(Site(name, 1, f"file:{file.suffix}", "library"))
            continue
        if file.suffix == ".ipynb":
            program.notebooks.append(name)
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a program's own doubtful escapes
                with tokenize.open(file) as opened:  # in the encoding that the file declares
                    tree = ast.parse(opened.read())
            program.sites += sites(name, tree, redirected)
        except (OSError, SyntaxError, ValueError, RecursionError, MemoryError) as error:
            program.unreadable[name] = f"{type(error).__name__}: {error}"
            continue
        program.files += 1
    program.sites.sort()
    return program


def _files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
        return
    for folder, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if name not in _NOT_ENTERED and not name.startswith("."))
        for name in sorted(names):
            file = Path(folder) / name
            if file.suffix in (".py", ".ipynb", *_SOURCES) and file.is_file():
                yield file
