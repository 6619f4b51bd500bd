# SPDX-License-Identifier: Apache-2.0
"""How a child of `hal._process` tells its parent what it found: one JSON object a line, each sent at once.

The next step may kill the child, and what it said before must have arrived by then.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from typing import Any


class Reporter:
    """The child's end. It takes stdout for itself; whatever else writes there lands on stderr.

    A plug-in may print, and so may a library below it: neither can be taken for a report, nor cut one in two.
    """

    def __init__(self) -> None:
        sys.stdout.flush()
        self._file = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

    def say(self, **facts: Any) -> None:
        """Report facts now."""
        self._file.write(json.dumps(facts) + "\n")
        self._file.flush()


def read_reports(output: str) -> list[dict[str, Any]]:
    """Return what a child said, in order.

    Left out is what is no report: a last line that a dying child did not finish, and what the interpreter's own
    start (`sitecustomize`, `.pth` files) printed before the child could take its stdout.
    """
    reports = []
    for line in output.splitlines():
        with contextlib.suppress(ValueError):
            said = json.loads(line)
            if isinstance(said, dict):
                reports.append(said)
    return reports
