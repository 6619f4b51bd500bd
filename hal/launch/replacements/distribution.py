# SPDX-License-Identifier: Apache-2.0
"""What `importlib.metadata` says of a library that is replaced: programs ask it whether there is one, and which."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path


class Replaced(importlib.metadata.Distribution):
    """The distribution of a library that nobody installed.

    Args:
        library: the name under which it is imported.
        version: of the library, whose functions the replacement has.
    """

    def __init__(self, library: str, version: str) -> None:
        self._files = {
            "METADATA": f"Metadata-Version: 2.1\nName: {library.replace('_', '-')}\nVersion: {version}\n",
            "top_level.txt": f"{library}\n",
        }

    def read_text(self, filename: str) -> str | None:
        """Return the text of one of the files that a distribution has, or None."""
        return self._files.get(filename)

    def locate_file(self, path: str | os.PathLike[str]) -> Path:
        """Return where a file would lie: beside the replacement."""
        return Path(__file__).parent / path
