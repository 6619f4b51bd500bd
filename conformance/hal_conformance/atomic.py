# SPDX-License-Identifier: Apache-2.0
"""Files that are either complete or not there."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from hal.errors import ConfigError


def check_writable(path: Path) -> None:
    """Refuse a target that cannot be written, before an hour of work is spent on what should go there.

    Raises:
        ConfigError: its folder does not exist or is not writable, it is itself a folder, or it is there and cannot be
            written into.
    """
    target = _target(path)
    folder = target.parent
    if not folder.is_dir():
        raise ConfigError(f"cannot write {path}: there is no folder {folder}")
    if target.is_dir():
        raise ConfigError(f"cannot write {path}: it is a folder", expected="a file name")
    if target.exists() and not os.access(target, os.W_OK):
        raise ConfigError(f"cannot write {path}: it is not writable")
    if not _is_stream(target) and not os.access(folder, os.W_OK):
        raise ConfigError(f"cannot write {path}: the folder {folder} is not writable")


def same(one: Path, other: Path) -> bool:
    """Tell whether two targets are one file, however they are spelt."""
    return _target(one) == _target(other) or (one.exists() and other.exists() and one.samefile(other))


def _target(path: Path) -> Path:
    """Return the file that a path leads to, which need not be there: a link stays one, and what it points to is new.

    Raises:
        ConfigError: the path leads nowhere: links that point to each other, or a name that no file can have.
    """
    try:
        path.stat()
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error
    return Path(os.path.realpath(path))


def _is_stream(target: Path) -> bool:
    """Tell whether it is a device, a pipe or a socket: written into, since another file cannot take its place."""
    return target.exists() and not target.is_file()


def write(path: Path, data: bytes) -> None:
    """Write a whole file, or nothing: readers see the old content or the new one.

    Raises:
        OSError: the disk is full, or the folder is not writable; no partial file is left. Its name is the path's.
    """
    try:
        _write(_target(path), data)
    except OSError as error:  # of a file beside it, whose name nobody has given
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def _write(path: Path, data: bytes) -> None:
    if _is_stream(path):
        with path.open("wb", buffering=0) as stream:
            view = memoryview(data)
            while view:  # a pipe takes what it has room for
                view = view[stream.write(view) :]
        return
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        if os.name == "posix":
            # mkstemp makes the file private; give it what an ordinary open() would have given.
            umask = os.umask(0)
            os.umask(umask)
            Path(name).chmod(0o666 & ~umask)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
