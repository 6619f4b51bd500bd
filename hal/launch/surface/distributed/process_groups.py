# SPDX-License-Identifier: Apache-2.0
"""torch.distributed: NCCL is the device's own library, and the program that asked for NCCL is told that it has it."""

from __future__ import annotations

import collections
import contextlib
import weakref
from collections.abc import Iterator, MutableMapping
from typing import Any

from hal.launch.api import api
from hal.launch.redirection import Redirection
from hal.launch.surface.distributed.nccl import Options

# Names of libraries ------------------------------------------------------------------------------------------------


def library(r: Redirection) -> str:
    """Return the name under which torch.distributed knows the device's library."""
    return r.device.collectives.torch_name


def _backend(r: Redirection, asked: Any) -> Any:
    """Return the backend in place of one that the program asks for: `nccl`, or pairs such as `cpu:gloo,cuda:nccl`."""
    if not isinstance(asked, str):
        return asked
    name = asked.lower()
    if name == "nccl":
        return library(r)
    if ":" not in name:
        return asked
    pairs = dict(pair.split(":", 1) for pair in name.split(","))
    if "cuda" not in pairs:
        return asked
    own = _backend(r, pairs.pop("cuda"))
    pairs[r.type] = own
    return own if len(pairs) == 1 else ",".join(f"{device}:{backend}" for device, backend in pairs.items())


def _asked(r: Redirection) -> MutableMapping[Any, str]:
    """What the program asked for, by process group; torch forgets its groups, and this must not keep them."""
    return r.groups


_bound: weakref.WeakSet[Any] = weakref.WeakSet()
"""Groups that were given a device; they may outlive an adoption, as what was asked for does."""
_splits: collections.Counter[str] = collections.Counter()
"""How often each group was split, by its name: a name that one split had no other may have in this process."""


def _bind(r: Redirection, arguments: dict[str, Any]) -> None:
    """Translate the device that a group is bound to, where there is an index: a CPU has none, and gloo needs none.

    Options of NCCL's say nothing to another library.
    """
    if arguments.get("device_id") is not None:
        arguments["device_id"] = r.translate(arguments["device_id"]) if r.hosts is None else None
    if isinstance(arguments.get("pg_options"), Options):
        arguments["pg_options"] = None


@api("torch.distributed.init_process_group", "torch.distributed.distributed_c10d.init_process_group")
def init_process_group(r: Redirection, backend: Any = None, *args: Any, **kwargs: Any) -> None:
    """With the device's own library in NCCL's place."""
    import torch.distributed as dist

    bound = kwargs.get("device_id") is not None
    _bind(r, kwargs)
    dist.init_process_group(_backend(r, backend), *args, **kwargs)
    if bound:
        _bound.add(dist.group.WORLD)
    if isinstance(backend, str):
        _asked(r)[dist.group.WORLD] = backend.lower()


@api("torch.distributed.new_group", "torch.distributed.distributed_c10d.new_group")
def new_group(r: Redirection, ranks: Any = None, timeout: Any = None, backend: Any = None, *args: Any,
              **kwargs: Any) -> Any:  # fmt: skip
    """With the device's own library in NCCL's place."""
    import torch.distributed as dist

    _bind(r, kwargs)
    group = dist.new_group(ranks, timeout, _backend(r, backend), *args, **kwargs)
    asked = backend if isinstance(backend, str) else _asked(r).get(dist.group.WORLD)
    if asked is not None and isinstance(group, dist.ProcessGroup):  # other ranks get a number, or None
        _asked(r)[group] = asked.lower()
    return group


@api("torch.distributed.new_subgroups", "torch.distributed.distributed_c10d.new_subgroups")
def new_subgroups(r: Redirection, group_size: int | None = None, group: Any = None, timeout: Any = None,
                  backend: Any = None, *args: Any, **kwargs: Any) -> Any:  # fmt: skip
    """By default as many ranks in each as a host has devices."""
    import torch.distributed as dist

    _bind(r, kwargs)
    size = group_size if group_size is not None else len(r.devices) or None  # without one, torch's own error
    found = dist.new_subgroups(size, group, timeout, _backend(r, backend), *args, **kwargs)
    return _known(r, found, backend)


@api("torch.distributed.new_subgroups_by_enumeration",
     "torch.distributed.distributed_c10d.new_subgroups_by_enumeration")  # fmt: skip
def new_subgroups_by_enumeration(r: Redirection, ranks_per_subgroup_list: Any, timeout: Any = None, backend: Any = None,
                                 *args: Any, **kwargs: Any) -> Any:  # fmt: skip
    """With the device's own library in NCCL's place."""
    import torch.distributed as dist

    _bind(r, kwargs)
    found = dist.new_subgroups_by_enumeration(ranks_per_subgroup_list, timeout, _backend(r, backend), *args, **kwargs)
    return _known(r, found, backend)


def _known(r: Redirection, found: tuple[Any, list[Any]], backend: Any) -> tuple[Any, list[Any]]:
    """Remember what the program asked for, of this rank's group and of all; of others' there is a number, or None."""
    import torch.distributed as dist

    asked = backend if isinstance(backend, str) else _asked(r).get(dist.group.WORLD)
    for group in (found[0], *found[1]):
        if asked is not None and isinstance(group, dist.ProcessGroup):
            _asked(r)[group] = asked.lower()
    return found


@api("torch.distributed.split_group", "torch.distributed.distributed_c10d.split_group")
def split_group(r: Redirection, parent_pg: Any = None, split_ranks: Any = None, timeout: Any = None,
                pg_options: Any = None, group_desc: str | None = None, backend: Any = None) -> Any:  # fmt: skip
    """A new group of the same ranks, where the device's library does not split its own."""
    import torch.distributed as dist

    if r.hosts is None:
        options = None if isinstance(pg_options, Options) else pg_options
        more = {} if backend is None else {"backend": _backend(r, backend)}  # which torch before 2.13 does not take
        return dist.split_group(parent_pg, split_ranks, timeout, options, group_desc, **more)
    if not split_ranks:
        raise ValueError("split_ranks cannot be None or empty")
    if dist.distributed_c10d._get_default_group() not in _bound:  # as torch's own
        raise RuntimeError("No device associated with the default pg, not safe to split any process groups")
    parent: Any = dist.group.WORLD if parent_pg is None else parent_pg
    try:
        of_parent = dist.get_process_group_ranks(parent)
    except KeyError:
        raise ValueError(f"Group {parent} is not registered") from None
    asked = _asked(r).get(parent)
    if backend is not None:
        _check_subset(asked or "gloo", backend)
    for part in split_ranks:
        if len(part) != len(set(part)) or not part or not set(part) <= set(range(len(of_parent))):
            raise ValueError(f"a split of {len(of_parent)} ranks has some of them, each once, and not {list(part)}")
    _splits[parent.group_name] += 1
    count, mine = _splits[parent.group_name], None
    for part in split_ranks:
        ranks = sorted(of_parent[rank] for rank in part)
        if mine is None and dist.get_rank() in ranks:
            name = f"{parent.group_name}:split:{count}:{'-'.join(map(str, ranks))}"
            with _named(name):
                mine = new_group(r, ranks, timeout, backend or asked, use_local_synchronization=True,
                                 group_desc=group_desc or f"{parent.group_desc}:split:{count - 1}")  # fmt: skip
    return mine


def _check_subset(of_parent: str, backend: str) -> None:
    """Refuse libraries that a group's parent has not, as torch does."""
    from torch.distributed import distributed_c10d

    parse: Any = distributed_c10d._parse_backend_string
    have = parse(of_parent)
    for device, name in parse(backend).items():
        if device not in have:
            raise ValueError(f"Requested backend for device '{device}' is not present in the parent process group "
                             f"(parent backends: {have})")  # fmt: skip
        if have[device] != name:
            raise ValueError(f"Backend mismatch for device '{device}': parent has '{have[device]}', requested '{name}'")


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Give the next process group a name that all of its ranks know, and that no other has.

    torch makes one of the ranks, and of how many groups with the same ones this process is in, of which others may be
    in more, or less; and a group that was destroyed leaves what it put down under it.
    """
    from torch.distributed import distributed_c10d

    own: Any = distributed_c10d
    before = own._process_group_name
    own._process_group_name = lambda ranks, use_hashed_name: name
    try:
        yield
    finally:
        own._process_group_name = before


@api("torch.distributed.get_backend", "torch.distributed.distributed_c10d.get_backend", belief=True)
def get_backend(r: Redirection, group: Any = None) -> Any:
    """What the program asked for; of a group that a library of torch's made, what it really is."""
    import torch.distributed as dist

    true = dist.get_backend(group)
    asked = _asked(r).get(dist.group.WORLD if group is None else group)
    if asked is not None:
        return dist.Backend(asked) if ":" not in asked else asked
    return dist.Backend("nccl") if true == library(r) and library(r) != "gloo" else true


@api("torch.distributed.get_backend_config", "torch.distributed.distributed_c10d.get_backend_config", belief=True)
def get_backend_config(r: Redirection, group: Any = None) -> str:
    """What the program asked for, by type of device; of a group that a library of torch's made, what it really is."""
    import torch.distributed as dist

    asked = _asked(r).get(dist.group.WORLD if group is None else group)
    if asked is None:
        return str(dist.get_backend_config(group))
    config: Any = dist.distributed_c10d.BackendConfig
    return str(config(dist.Backend(asked) if ":" not in asked else asked))


@api("torch.distributed.monitored_barrier", "torch.distributed.distributed_c10d.monitored_barrier")
def monitored_barrier(r: Redirection, group: Any = None, *args: Any, **kwargs: Any) -> Any:
    """For a group that the program asked gloo for; with NCCL there is none, and a program would fail on the GPU."""
    import torch.distributed as dist

    whose = dist.group.WORLD if group is None else group
    if isinstance(whose, dist.ProcessGroup) and _asked(r).get(whose, "gloo") != "gloo":
        raise ValueError("monitored_barrier is only implemented for GLOO backend.")
    return dist.monitored_barrier(group, *args, **kwargs)


@api("torch.distributed.is_nccl_available", "torch.distributed.distributed_c10d.is_nccl_available", belief=True)
def is_nccl_available(r: Redirection) -> bool:
    """The device's own library stands in."""
    return True


@api("torch.distributed.is_backend_available", belief=True)
def is_backend_available(r: Redirection, backend: str) -> bool:
    """NCCL, and what there is."""
    import torch.distributed as dist

    return backend.lower() == "nccl" or dist.is_backend_available(backend)


@api("torch.distributed.get_default_backend_for_device", belief=True)
def get_default_backend_for_device(r: Redirection, device: Any) -> str:
    """NCCL for CUDA."""
    import torch.distributed as dist

    return "nccl" if r.index(device) is not None else dist.get_default_backend_for_device(device)


@api("torch.distributed.init_device_mesh", "torch.distributed.device_mesh.init_device_mesh")
def init_device_mesh(r: Redirection, device_type: str, *args: Any, **kwargs: Any) -> Any:
    """A mesh of the true devices."""
    from torch.distributed.device_mesh import init_device_mesh as own

    return own(r.translate_type(device_type), *args, **kwargs)


@api("torch.cuda.nccl.version", verdict="emulated", belief=True, note="2.21.5 on every device")
def nccl_version(r: Redirection) -> tuple[int, int, int]:
    """A version that has everything that training code asks for."""
    return 2, 21, 5


@api("torch.cuda.nccl.is_available", verdict="emulated", belief=True)
def nccl_is_available(r: Redirection, tensors: Any) -> bool:
    """False: these are the functions for one process with several GPUs."""
    return False
