# SPDX-License-Identifier: Apache-2.0
"""What a redirected program did: each API with the lines that called it, and what was not as on CUDA.

Counting must cost next to nothing, since it happens on every call: a call is counted under its code object and
instruction, and lines are looked up when the report is made.
"""

from __future__ import annotations

import dis
import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, Literal

from hal.launch.caller import inside, outside

Kind = Literal["redirected", "belief", "change", "idle", "fallback", "refused"]
"""What an entry of the report is about.

redirected: the call was answered by the device.
belief: an answer by which the program may choose a branch, such as `torch.cuda.is_available()`.
change: the result may differ from what CUDA computes, or something else was used in place of what was asked for.
idle: the call does nothing on this device.
fallback: an operator that the device lacks ran another way: on the CPU, or in another dtype.
refused: an error was raised.
"""


@dataclass(frozen=True)
class Entry:
    """One line of the program, and what happened there.

    Attributes:
        kind: see `Kind`.
        api: what was called, as in the documentation of torch.
        file: of the caller; None if no frame of the program was on the stack.
        line: in that file, or None.
        calls: how often.
        note: what differs, in words.
        nbytes: moved by fallbacks.
    """

    kind: Kind
    api: str
    file: str | None
    line: int | None
    calls: int
    note: str = ""
    nbytes: int = 0

    def as_json(self) -> dict[str, Any]:
        """Return plain types for JSON."""
        return asdict(self)


@dataclass
class _Noted:
    calls: int = 0
    nbytes: int = 0


@dataclass
class Audit:
    """Counts of one process. Thread-safe where a count may not be lost; see `count`."""

    # By the identity of the code, whose hash takes as long as the code is; `_codes` keeps it alive.
    _calls: dict[tuple[str, bool, int, int], int] = field(default_factory=dict)
    _codes: dict[int, CodeType] = field(default_factory=dict)
    _noted: dict[tuple[Kind, str, str, CodeType | None, int], _Noted] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _local: threading.local = field(default_factory=threading.local)

    def count(self, api: str, frame: FrameType, belief: bool = False) -> None:
        """Count one call of an API from a frame; threads that call the same line at once may lose one."""
        code = frame.f_code
        key = api, belief, id(code), frame.f_lasti
        calls = self._calls.get(key)
        if calls is None:
            self._codes[id(code)] = code
            calls = 0
        self._calls[key] = calls + 1

    def count_outside(self, api: str, frame: FrameType, belief: bool = False) -> None:
        """Count a call as `count` does, unless it is torch's own or ours."""
        if not inside(frame):
            self.count(api, frame, belief)

    def count_nearest(self, api: str, frame: FrameType) -> None:
        """Count something of torch's own that the program set going, under the program's nearest frame."""
        nearest = outside(frame)
        if nearest is not None:
            self.count(api, nearest)

    def count_traced(self, api: str, code: CodeType, line: int | None, belief: bool = False) -> None:
        """Count a call that the compiler traces, under the line that it is at."""
        key = api, belief, id(code), _start(code, line)
        self._codes[id(code)] = code
        self._calls[key] = self._calls.get(key, 0) + 1

    @contextmanager
    def traced_at(self, code: CodeType, line: int | None) -> Iterator[None]:
        """Let what this thread notes meanwhile stand under a line that the compiler traces: no frame is there."""
        before, self._local.at = getattr(self._local, "at", None), (code, _start(code, line))
        try:
            yield
        finally:
            self._local.at = before

    def where(self, frame: FrameType | None) -> str:
        """Return `file:line` of the nearest frame of the program, or of what is traced, for messages."""
        at = getattr(self._local, "at", None)
        if at is not None:
            return f"{at[0].co_filename}:{_line(*at)}"
        frame = outside(frame)
        return "an unknown line" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"

    def note(self, kind: Kind, api: str, note: str, frame: FrameType | None, nbytes: int = 0) -> bool:
        """Note something that is not as on CUDA, under the nearest frame of the program.

        Returns:
            Whether this is the first of its kind at this line.
        """
        at = getattr(self._local, "at", None)
        if at is None and (frame := outside(frame)) is not None:
            at = frame.f_code, frame.f_lasti
        key = (kind, api, note, *(at or (None, 0)))
        with self._lock:
            first = key not in self._noted
            noted = self._noted.setdefault(key, _Noted())
            noted.calls += 1
            noted.nbytes += nbytes
        return first

    def clear(self) -> None:
        """Forget everything: a child that was forked counts anew."""
        self._calls.clear()
        self._codes.clear()
        self._noted.clear()
        self._lock = threading.Lock()

    def entries(self) -> list[Entry]:
        """Return everything that was counted, one entry for each kind, API and line, by file and line."""
        merged: dict[tuple[Kind, str, str | None, int | None, str], _Noted] = {}

        def add(key: tuple[Kind, str, str | None, int | None, str], calls: int, nbytes: int = 0) -> None:
            noted = merged.setdefault(key, _Noted())
            noted.calls += calls
            noted.nbytes += nbytes

        for (api, belief, identity, instruction), calls in list(self._calls.items()):
            kind: Kind = "belief" if belief else "redirected"
            code = self._codes[identity]
            add((kind, api, _file(code.co_filename), _line(code, instruction), ""), calls)
        for (noted_kind, api, note, where, instruction), noted in list(self._noted.items()):
            file, line = (None, None) if where is None else (_file(where.co_filename), _line(where, instruction))
            add((noted_kind, api, file, line, note), noted.calls, noted.nbytes)
        found = [Entry(kind, api, file, line, noted.calls, note, noted.nbytes)
                 for (kind, api, file, line, note), noted in merged.items()]  # fmt: skip
        return sorted(found, key=lambda e: (e.file or "", e.line or 0, e.api, e.kind, e.note))


@functools.lru_cache(maxsize=4096)
def _lines(code: CodeType) -> tuple[tuple[int, int], ...]:
    return tuple((start, line) for start, line in dis.findlinestarts(code) if line is not None)


def _start(code: CodeType, line: int | None) -> int:
    """Return the first instruction of a line."""
    return next((start for start, found in _lines(code) if found == line), 0)


def _line(code: CodeType, instruction: int) -> int | None:
    found = None
    for start, line in _lines(code):
        if start > instruction:
            break
        found = line
    return found


@functools.lru_cache(maxsize=4096)
def _file(name: str) -> str:
    """Return a file's name as an absolute path; a name such as `<string>` stays as it is."""
    return name if name.startswith("<") else str(Path(name).absolute())
