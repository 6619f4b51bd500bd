# SPDX-License-Identifier: Apache-2.0
"""The compiled library: built at first use by the system's compiler, kept in a folder of the user's, checked when read.

A folder in the cache is named after what was compiled, by what, with which flags and for which processor, and holds the
library and its digest. It is made under another name and renamed, so that two processes that build at once do not
disturb each other, and one that is killed leaves nothing that looks complete.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger("hal")

_FOLDER = Path(__file__).parent
SOURCES = (_FOLDER / "matrix_unit.cpp", *sorted(_FOLDER.glob("*.hpp")))
"""What is compiled, first, and all that it may include."""
LIBRARY, DIGEST = "matrix_unit.so", "sha256"

_FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-shared",
    "-pthread",
    "-fwrapv",
    "-fno-fast-math",
    "-ffp-contract=off",
)  # fmt: skip  (a user's CXXFLAGS are not ours to trust with rounding)
_TIMEOUT_S = 300.0
_MESSAGE = 200
"""Characters of a compiler's message that are passed on."""
_UNFINISHED = ".building-"


class BuildFailed(Exception):
    """No library: why is the text."""


def compiled(*, anew: bool = False) -> Path:
    """Return the path of the library, which is compiled if no earlier process has left it.

    Args:
        anew: compile it in any case, and replace what was left.

    Raises:
        BuildFailed: there is no compiler, or it fails.
    """
    compiler = _compiler()
    target = _target()
    key = hashlib.sha256()
    texts = (_version(compiler), " ".join((*_FLAGS, *target)), _processor())
    said = (text.encode(errors="surrogateescape") for text in texts)
    for part in (*(source.read_bytes() for source in SOURCES), *said):
        key.update(len(part).to_bytes(8, "little") + part)
    kept = f"sim-{key.hexdigest()[:24]}"
    for folder in _folders():
        complete = folder / kept
        if not anew and _is_intact(complete):
            return complete / LIBRARY
        try:
            return _build(compiler, target, folder, complete, anew=anew)
        except OSError as error:  # read-only, say: the next one; a compiler that finds no space there has failed
            _pass_over(folder, str(error))
    raise BuildFailed("no folder can be written to, neither the cache nor a temporary one")


def _build(compiler: list[str], target: tuple[str, ...], folder: Path, complete: Path, *, anew: bool) -> Path:
    for left in folder.glob(f"{_UNFINISHED}*"):  # by a process that was killed: nothing takes so long
        with contextlib.suppress(OSError):  # or by one that has just ended
            if time.time() - left.stat().st_mtime > 2 * _TIMEOUT_S:
                shutil.rmtree(left, ignore_errors=True)
    made = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=folder))  # mode 0700
    replaced = made.with_name(f"{made.name}-replaced")
    try:
        command = [*compiler, *_FLAGS, *target, str(SOURCES[0]), "-o", str(made / LIBRARY)]
        try:
            done = _run(command, _TIMEOUT_S)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise BuildFailed(f"{compiler[0]} cannot be run: {error}") from error
        if done.returncode:
            said = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
            raise BuildFailed(f"{compiler[0]} ended with status {done.returncode}: {said[0][:_MESSAGE]}")
        if not (made / LIBRARY).is_file():
            raise BuildFailed(f"{compiler[0]} ended with status 0 and made no library")
        (made / DIGEST).write_text(_digest(made / LIBRARY))
        if complete.exists() and (anew or not _is_intact(complete)):
            # Away before it is removed: another process may have put a good one there meanwhile, and be loading it.
            with contextlib.suppress(OSError):
                complete.rename(replaced)
        try:
            made.rename(complete)
        except OSError:
            if not _is_intact(complete):  # and not another process that was faster
                raise
        return complete / LIBRARY
    finally:
        shutil.rmtree(made, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def _run(command: list[str], timeout_s: float) -> subprocess.CompletedProcess[str]:
    # A compiler's messages are in whatever encoding its locale has.
    return subprocess.run(
        command, capture_output=True, encoding="utf-8", errors="replace", timeout=timeout_s, check=False
    )


def _is_intact(complete: Path) -> bool:
    try:
        return _mistrust(complete) is None and (complete / DIGEST).read_text().strip() == _digest(complete / LIBRARY)
    except (OSError, ValueError):
        return False


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


# Where ---------------------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Return the folder for what is compiled: `$HAL_CACHE`, or `moe-hal` among the user's caches."""
    named = os.environ.get("HAL_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moe-hal"


def _folders() -> Iterator[Path]:
    """Yield folders of which nobody else can write to: the cache, and if it is not to be had, one for this process."""
    with contextlib.suppress(RuntimeError):  # there is no home
        folder = cache_folder()
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            why = _mistrust(folder)
        except OSError as error:
            why = str(error)
        if why is None:
            yield folder
        else:
            _pass_over(folder, why)
    with contextlib.suppress(OSError):
        import atexit

        temporary = Path(tempfile.mkdtemp(prefix="moe-hal-"))
        atexit.register(shutil.rmtree, temporary, ignore_errors=True)
        yield temporary


def _mistrust(folder: Path) -> str | None:
    """Return why somebody else than this user and root can put a library there, or None."""
    found = folder.stat()
    if not hasattr(os, "getuid"):
        return None
    if found.st_uid not in (os.getuid(), 0):
        return f"it belongs to another user ({found.st_uid})"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others can write to it (mode {stat.S_IMODE(found.st_mode):o})"
    return None


def _pass_over(folder: Path, why: str) -> None:
    named = os.environ.get("HAL_CACHE")
    if named and folder == Path(named):  # the default one may be missing: not a user's mistake
        _warn(f"HAL_CACHE cannot be used: {folder}: {why}; each process compiles the simulated matrix units for itself")


@functools.cache
def _warn(text: str) -> None:
    log.warning("%s", text)


# By what -------------------------------------------------------------------------------------------------------------


def _compiler() -> list[str]:
    named = os.environ.get("CXX")
    if named:
        try:
            words = shlex.split(named)
        except ValueError as error:
            raise BuildFailed(f"CXX names no compiler: {named!r}: {error}") from error
        if not words or shutil.which(words[0]) is None:
            raise BuildFailed(f"CXX names no compiler: {named!r}")
        return words
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name) is not None:
            return [name]
    raise BuildFailed("there is no C++ compiler (c++, g++, clang++; CXX names another)")


def _version(compiler: list[str]) -> str:
    try:
        done = _run([*compiler, "--version"], 60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildFailed(f"{compiler[0]} cannot be run: {error}") from error
    return f"{compiler} {shutil.which(compiler[0])} {done.stdout}"


def _target() -> tuple[str, ...]:
    """Return the flags for this processor: the cache is for it alone, since its name is part of the key.

    `HAL_SIM_TARGET` names another one that this can stand in for, as the compiler's -march or -mcpu does: x86-64-v3.
    """
    named = os.environ.get("HAL_SIM_TARGET")
    if named:
        return (f"-mcpu={named}",) if platform.machine() in ("aarch64", "arm64") else (f"-march={named}",)
    return ("-mcpu=native",) if platform.machine() in ("aarch64", "arm64") else ("-march=native",)


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:  # noqa: PTH123  a pseudo-file
            wanted = ("model name", "flags", "Features", "CPU part")
            return "".join(sorted({line for line in lines if line.startswith(wanted)}))
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
