# SPDX-License-Identifier: Apache-2.0
"""Where a backend looks for evidence of its hardware before it opens anything: files and environment variables."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Machine:
    """Files and environment of this machine. The fields are what a test replaces; backends add their own.

    Attributes:
        root: of the file system.
        environ: environment variables; None: those of this process, at each reading.
    """

    root: Path = Path("/")
    environ: Mapping[str, str] | None = None

    def variable(self, name: str) -> str | None:
        """Return an environment variable."""
        return (os.environ if self.environ is None else self.environ).get(name)

    def files(self, pattern: str) -> list[str]:
        """Return the files that match, `/dev/chip[0-9]*` say, by their numbers."""
        found = ["/" + str(path.relative_to(self.root)) for path in self.root.glob(pattern.lstrip("/"))]
        return sorted(found, key=lambda name: [int(n) for n in re.findall(r"\d+", name)])

    def read(self, path: str) -> str | None:
        """Return a file's text, None if there is no such file."""
        try:
            return (self.root / path.lstrip("/")).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None
