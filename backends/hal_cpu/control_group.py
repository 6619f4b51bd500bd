# SPDX-License-Identifier: Apache-2.0
"""Memory limits of the control groups that this process runs in: a container, a batch job, a service.

A process lies in a hierarchy of groups, and the limit of each of them holds: Slurm limits the job and the step,
systemd the slice and the service. Both versions of the interface are in use, cgroups(7).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_UNLIMITED = 2**62  # version 1 says so with the largest multiple of a page below 2**63


@dataclass(frozen=True)
class Group:
    """The memory controller's files of one group.

    Attributes:
        folder: where they lie.
        version: 1 or 2 of the interface, which differ in the names.
    """

    folder: Path
    version: int

    def limit(self) -> int | None:
        """Return the most bytes that the group may hold, None without a limit."""
        limit = self._number("memory.limit_in_bytes" if self.version == 1 else "memory.max")
        return None if limit is None or limit >= _UNLIMITED else limit

    def used(self) -> int | None:
        """Return the bytes that the group holds, without the file cache that gives way to an allocation."""
        used = self._number("memory.usage_in_bytes" if self.version == 1 else "memory.current")
        key = "total_inactive_file" if self.version == 1 else "inactive_file"
        cached = re.search(rf"^{key} (\d+)$", _read(self.folder / "memory.stat"), re.MULTILINE)
        return None if used is None else max(0, used - (int(cached[1]) if cached else 0))

    def free(self) -> int | None:
        """Return the bytes that the group may still allocate, None without a limit."""
        limit, used = self.limit(), self.used()
        return None if limit is None or used is None else max(0, limit - used)

    def _number(self, name: str) -> int | None:
        text = _read(self.folder / name).strip()
        return int(text) if text.isdigit() else None  # "max" is no limit


def limited_groups(root: Path = Path("/")) -> tuple[Group, ...]:
    """Return the groups around this process that have a limit now, the innermost first; none beside Linux.

    Args:
        root: where /proc and the mounted hierarchies are looked for.
    """
    return tuple(group for group in _groups(root) if group.limit() is not None)


def _groups(root: Path) -> Iterator[Group]:
    memberships = [line.split(":", 2) for line in _read(root / "proc/self/cgroup").splitlines()]
    paths = {name: path for _, names, path in memberships for name in names.split(",")}
    version, path = (1, paths["memory"]) if "memory" in paths else (2, paths.get(""))
    for mounted, mount_point in _mounts(root, version):
        if path is None:
            return
        folder = mount_point / _inside(path, mounted)
        while True:
            if folder.is_dir():
                yield Group(folder, version)
            if folder == mount_point:
                return
            folder = folder.parent


def _mounts(root: Path, version: int) -> Iterator[tuple[str, Path]]:
    """Return for each mounted hierarchy of the memory controller which part of it is mounted, and where: proc(5)."""
    for line in _read(root / "proc/self/mountinfo").splitlines():
        place, _, kind = line.partition(" - ")
        fields, (filesystem, _, *options) = place.split(), kind.split()
        if filesystem == "cgroup2" if version == 2 else filesystem == "cgroup" and "memory" in options[-1].split(","):
            yield fields[3], root / fields[4].replace("\\040", " ").lstrip("/")


def _inside(path: str, mounted: str) -> PurePosixPath:
    """Return where a group lies inside what is mounted.

    A container may see its own group as the root of what is mounted, while the membership names the host's path, or
    one outside its namespace (`/../..`). Then the mount point is the closest group that can be seen.
    """
    try:
        inside = PurePosixPath(path).relative_to(mounted)
    except ValueError:
        return PurePosixPath()
    return PurePosixPath() if ".." in inside.parts else inside


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
