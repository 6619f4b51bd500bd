# SPDX-License-Identifier: Apache-2.0
"""Limits of control groups, on made-up file systems as containers, Slurm and systemd show them."""

import pytest

from hal_cpu.control_group import limited_groups

GIB = 2**30
V2 = "30 23 0:26 {inside} /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"
V1 = "35 23 0:31 {inside} /sys/fs/cgroup/memory rw,nosuid - cgroup cgroup rw,memory"
HYBRID = "36 23 0:32 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n" + V1


@pytest.fixture
def machine(tmp_path):
    """Write the files of a machine: what the process belongs to, what is mounted, and the groups' own files."""

    def write(memberships, mounts, groups):
        for name, text in {"proc/self/cgroup": memberships, "proc/self/mountinfo": mounts, **groups}.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text}\n")
        return tmp_path

    return write


def v2(folder, limit, used=0, cache=0):
    return {
        f"sys/fs/cgroup{folder}/memory.max": limit,
        f"sys/fs/cgroup{folder}/memory.current": used,
        f"sys/fs/cgroup{folder}/memory.stat": f"anon 1\ninactive_file {cache}\nactive_file 7",
    }


def v1(folder, limit, used=0, cache=0):
    return {
        f"sys/fs/cgroup/memory{folder}/memory.limit_in_bytes": limit,
        f"sys/fs/cgroup/memory{folder}/memory.usage_in_bytes": used,
        f"sys/fs/cgroup/memory{folder}/memory.stat": f"inactive_file 1\ntotal_inactive_file {cache}",
    }


UNLIMITED_V1 = 9223372036854771712

CASES = {
    "a container sees its own group as the root": ("0::/", V2.format(inside="/"), v2("", 8 * GIB), [8]),
    "systemd limits the service and its slice": (
        "0::/system.slice/train.service", V2.format(inside="/"),
        {**v2("", "max"), **v2("/system.slice", 64 * GIB), **v2("/system.slice/train.service", 16 * GIB)}, [16, 64],
    ),
    "Slurm on version 1 limits the job and not the step": (
        "9:cpuset:/\n4:memory:/slurm/uid_1/job_2/step_0\n0::/", HYBRID.format(inside="/"),
        {**v1("", UNLIMITED_V1), **v1("/slurm/uid_1/job_2", 32 * GIB),
         **v1("/slurm/uid_1/job_2/step_0", UNLIMITED_V1)}, [32],
    ),
    "a container on version 1 is named by its path on the host": (
        "4:cpu,memory:/docker/abc", V1.format(inside="/docker/abc"), v1("", 4 * GIB), [4],
    ),
    "a group inside such a container": (
        "4:memory:/docker/abc/job", V1.format(inside="/docker/abc"), {**v1("", 4 * GIB), **v1("/job", 2 * GIB)}, [2, 4],
    ),
    "a group outside the namespace leaves the mount point": (
        "0::/../../other", V2.format(inside="/"), v2("", 8 * GIB), [8],
    ),
    "no limit anywhere": ("0::/user.slice", V2.format(inside="/"), v2("/user.slice", "max"), []),
    "a membership without a mounted hierarchy": ("0::/", "22 1 8:1 / / rw - ext4 /dev/sda1 rw", {}, []),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_limits_around_a_process_are_found_from_the_inside_out(machine, name):
    *files, expected = CASES[name]
    assert [group.limit() / GIB for group in limited_groups(machine(*files))] == expected


def test_a_machine_without_control_groups_has_no_limits(tmp_path):
    assert limited_groups(tmp_path) == ()


@pytest.mark.parametrize("make", [v1, v2])
def test_file_cache_that_gives_way_counts_as_free(machine, make):
    memberships, mount = ("4:memory:/", V1) if make is v1 else ("0::/", V2)
    (group,) = limited_groups(machine(memberships, mount.format(inside="/"), make("", 8 * GIB, 6 * GIB, 5 * GIB)))
    assert group.free() == 7 * GIB


def test_a_group_above_its_limit_has_nothing_free(machine):
    (group,) = limited_groups(machine("0::/", V2.format(inside="/"), v2("", GIB, 2 * GIB)))
    assert group.free() == 0
