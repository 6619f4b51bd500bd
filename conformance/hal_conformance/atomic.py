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
        ConfigError: its folder does not exist or is not writable, or it is itself a folder.
    """
    folder = path.parent
    if not folder.is_dir():
        raise ConfigError(f"cannot write {path}: there is no folder {folder}")
    if path.is_dir():
        raise ConfigError(f"cannot write {path}: it is a folder", expected="a file name")
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"cannot write {path}: the folder {folder} is not writable")


def write(path: Path, data: bytes) -> None:
    """Write a whole file, or nothing: readers see the old content or the new one.

    Raises:
        OSError: the disk is full, or the folder is not writable; no partial file is left.
    """
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
