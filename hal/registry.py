# SPDX-License-Identifier: Apache-2.0
"""Listing devices, choosing one, and opening it.

Listing is cheap and opens nothing; a broken plug-in is left out of the list with a warning in the log, and
`hal.explain` tells what is wrong with it.
"""

from __future__ import annotations

import itertools
import logging
import os
import sys
import threading
from collections.abc import Mapping

from hal import plugins
from hal.allocator_plan import AllocatorPlan
from hal.autoload import AUTOLOAD
from hal.backend import Backend, DeviceInfo
from hal.changes import Changes
from hal.device import Device
from hal.entry_points import Plugin
from hal.errors import Absent, Broken, ConfigError, DeviceError, HalError, UnknownDevice, described
from hal.facets import Facets
from hal.surveys import on_host, settle, survey, take_surveys, undecided

log = logging.getLogger("hal")

_handles = itertools.count(1)
_importing = threading.RLock()


def list_devices() -> list[DeviceInfo]:
    """Return the devices of all admitted backends, without opening one.

    Simulated devices are included and marked. A backend that is broken and a device that two backends claim equally
    are left out, with a warning in the log.

    Raises:
        ConfigError: HAL_BACKENDS cannot be read.
    """
    surveys = take_surveys()
    for answer in surveys:
        if answer.broken:
            log.warning("backend %s is left out: %s", answer.name, answer.error)
    for problem in (*undecided(surveys), *plugins.unreadable()):
        log.warning("%s", problem)
    return settle(surveys)[0]


def open_device(name: str | None = None, *, allocator: AllocatorPlan | None = None) -> Device:
    """Open a device.

    Args:
        name: `backend` or `backend:index` as `list_devices` gives it, or "auto": the first real accelerator that is
            not absent, otherwise the CPU. Without a name, HAL_DEVICE decides, and without that, "auto". A process
            that torchrun started takes, of several devices of a backend, that of its LOCAL_RANK; only an index names
            one device for all.
        allocator: allocator settings. They act through environment variables, so torch must not be imported yet.

    Raises:
        UnknownDevice: no admitted backend has this name.
        Absent: the backend is there, and the device is not.
        Broken: the device or its backend does not work; the original error is the cause.
        ConfigError: the name is no text or empty; a setting cannot be read or comes too late.
    """
    because = "asked for by name"
    if name is None:
        name = os.environ.get("HAL_DEVICE")
        because = f"HAL_DEVICE={name}"
        if name is not None and not name.strip():
            raise ConfigError(
                f"HAL_DEVICE is {name!r}, which names no device", expected="a name that `hal devices` lists, or auto",
                hint="unset HAL_DEVICE to open the first accelerator, or the CPU without one",
            )  # fmt: skip
    if name is None or name == "auto":
        return _open_automatic(allocator)
    try:
        found, rank = find_device(name)
        because += rank
    except UnknownDevice as error:
        if not because.startswith("HAL_DEVICE"):
            raise
        raise UnknownDevice(
            f"{error.reason}, and {because} asks for it", device=error.device, expected=error.expected, hint=error.hint
        ) from None
    return _open(found, because, allocator)


def _open(info: DeviceInfo, because: str, allocator: AllocatorPlan | None) -> Device:
    backend = plugins.load(find_plugin(info.backend))
    if allocator is not None and not isinstance(allocator, AllocatorPlan):
        raise ConfigError(f"allocator is a {type(allocator).__name__}, not a hal.AllocatorPlan")
    changes = Changes(f"{info.id} (handle {next(_handles)})")
    try:
        _import_torch(backend, changes, allocator)
        facets = backend.open(info, changes)
        if not isinstance(facets, Facets):
            raise TypeError(f"open() returned a {type(facets).__name__}, not hal.Facets")
        return Device(info, because, backend, facets, changes)
    except (HalError, KeyboardInterrupt):
        changes.close()
        raise
    except BaseException as error:
        changes.close()
        raise Broken(f"opening it raised {described(error)}", device=info.id) from error


def _import_torch(backend: Backend, changes: Changes, allocator: AllocatorPlan | None) -> None:
    """Import torch, if nobody has yet, with what it reads from the environment while it is imported."""
    # One thread at a time: another's import between the look at sys.modules and ours would come without the settings.
    with _importing:
        if "torch" in sys.modules:
            if allocator is not None and allocator.settings():
                raise ConfigError(
                    f"allocator settings for {changes.owner} come too late: torch is already imported",
                    hint="open the device before the first `import torch`",
                )
            return
        if allocator is not None:
            for variable, value in backend.allocator_environment(allocator, os.environ).items():
                changes.set_environment(variable, value)
        backend.prepare_import(changes)
        # One broken plug-in in torch's own group makes `import torch` fail; a backend loads its vendor's package
        # itself. Only for this moment: a child process of the user's may count on what torch loads by itself.
        only_now = Changes(f"{changes.owner}, while torch is imported")
        only_now.set_environment(AUTOLOAD, "0")
        try:
            import torch  # noqa: F401
        finally:
            only_now.close()


def plan_environment(backend: str, plan: AllocatorPlan, environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment variables that put an allocator plan into force for a child process.

    Args:
        backend: name of the backend.
        plan: what is wanted.
        environ: what the child would inherit; this process's environment by default. It is merged, never
            overwritten.

    Raises:
        UnknownDevice: no such backend.
        ConfigError: the plan contradicts what is set, or the allocator has no such setting.
    """
    loaded = plugins.load(find_plugin(backend))
    return dict(loaded.allocator_environment(plan, os.environ if environ is None else environ))


def find_plugin(name: str) -> Plugin:
    """Return the admitted backend of this name.

    Raises:
        UnknownDevice: it is not registered, or HAL_BACKENDS does not admit it.
        ConfigError: the name is no text or empty, or HAL_BACKENDS cannot be read.
    """
    _check_text("a backend", name)
    admitted = plugins.allowed()
    for plugin in admitted:
        if plugin.name == name:
            return plugin
    elsewhere = name in {plugin.name for plugin in plugins.registered()}
    raise UnknownDevice(
        "HAL_BACKENDS does not admit this backend" if elsewhere else "no backend of this name is registered",
        device=name,
        expected=", ".join(sorted(plugin.name for plugin in admitted)) + ", or auto",
        hint="`hal devices` lists what is here" if elsewhere else "install its plug-in, or see `hal doctor`",
    )


def _check_text(what: str, name: object) -> None:
    if not isinstance(name, str) or not name.strip():
        raise ConfigError(f"{what} is named by {name!r}", expected="its name as `hal devices` lists it, such as 'cpu'")


def _of_rank(devices: list[DeviceInfo], rank: str | None = None) -> tuple[DeviceInfo, str]:
    """Return which of a backend's devices is that of this process, or of a rank, and why if it is not the first.

    A launcher may show each rank one device only, which is then the rank's own.

    Raises:
        Absent: there are several, and fewer than ranks.
    """
    rank = os.environ.get("LOCAL_RANK", "") if rank is None else rank
    if len(devices) == 1 or not rank.isdecimal():
        return devices[0], ""
    if int(rank) >= len(devices):
        raise Absent(
            f"a process is rank {rank} of its host, and there are {len(devices)} devices", device=devices[0].backend,
            hint="start one process for each device, or name a device with its index",
        )  # fmt: skip
    return devices[int(rank)], f", of LOCAL_RANK={rank}"


def find_device(name: str, rank: int | None = None) -> tuple[DeviceInfo, str]:
    """Return the device that a name means, and why that one where a backend has several; opens nothing.

    Args:
        name: as for `open_device`, "auto" apart.
        rank: of the process on its host whose device is meant; None means this one.

    Raises:
        UnknownDevice, Absent, Broken, ConfigError: as `open_device` does.
    """
    _check_text("a device", name)
    backend_name, colon, index = name.partition(":")
    plugin = find_plugin(backend_name)
    own = survey(plugin)
    if own.error is not None:
        if isinstance(own.error, DeviceError):
            raise own.error
        raise Broken(str(own.error), device=name) from own.error
    candidates = [claim.info for claim in own.discovery.claims]
    wanted = [
        info for info in candidates
        if info.id == name or not colon or (index == "0" and info.id == backend_name)
    ]  # fmt: skip
    if not wanted and colon and (variant := plugins.load(plugin).variant(index)) is not None:
        wanted = [variant]
    if not wanted:
        there = ", ".join(info.id for info in candidates) or "none"
        reasons = f" ({'; '.join(own.discovery.left)})" if own.discovery.left else ""
        raise Absent(f"there is no such device{reasons}", device=name, expected=f"one of: {there}")
    info, why = (wanted[0], "") if colon else _of_rank(wanted, None if rank is None else str(rank))
    if not info.simulated and not on_host(info):
        # Another backend may know better what this device is.
        others = [own if p.name == plugin.name else survey(p) for p in plugins.allowed()]
        lost = settle(others)[1].get(info.id)
        if lost is not None:
            raise Absent(lost, device=name)
    return info, why


def _open_automatic(allocator: AllocatorPlan | None) -> Device:
    """Open the first real accelerator that is not absent, otherwise the CPU.

    What is broken is never passed over in silence: a backend that cannot list its devices is named in `because` and in
    the log, and a device that is listed and does not open is an error.
    """
    surveys = take_surveys()
    passed = []
    for answer in surveys:
        if answer.error is not None:
            passed.append(f"{answer.name}: {'BROKEN' if answer.broken else 'absent'}")
        if answer.broken:
            log.warning("auto passed over backend %s, which is broken: %s", answer.name, answer.error)
    for contest in undecided(surveys):
        passed.append(f"{contest}; limit HAL_BACKENDS to one of them")
        log.warning("auto passed over a device: %s", passed[-1])
    real = [info for info in settle(surveys)[0] if not info.simulated]
    # Accelerators first, and of all that work on the host's CPU the one that is nothing else.
    for info in sorted(real, key=lambda info: (on_host(info), info.id != "cpu")):
        kind = "no accelerator was found" if on_host(info) else "the first accelerator"
        own, rank = _of_rank([other for other in real if other.backend == info.backend])
        if rank and own.id != info.id:
            continue  # another rank's
        try:
            return _open(info, f"auto: {kind}{rank}" + (f" ({', '.join(passed)})" if passed else ""), allocator)
        except Absent as error:
            passed.append(f"{info.id}: absent on opening: {error.reason}")
        except Broken as error:
            another = "name another device, such as HAL_DEVICE=cpu: auto passes over what is absent, not what is broken"
            raise Broken(
                error.reason, device=error.device, expected=error.expected,
                hint=f"{error.hint}; or {another}" if error.hint else another,
            ) from (error.__cause__ or error)  # fmt: skip
    raise Absent(
        "no backend found a real device" + "".join(f"\n  {reason}" for reason in passed), device="auto",
        hint="see `hal doctor`",
    )  # fmt: skip
