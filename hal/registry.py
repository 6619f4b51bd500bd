# SPDX-License-Identifier: Apache-2.0
"""Which devices are here, which one is meant, and opening it.

Several chips answer to one torch device type, so a device goes to the backend with the most specific claim.
Listing is cheap and opens nothing; a broken plug-in is left out of the list with a warning in the log, and
`hal.explain` tells what is wrong with it.
"""

from __future__ import annotations

import itertools
import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from hal import plugins
from hal.backend import Backend, Claim, DeviceInfo, Discovery
from hal.changes import Changes
from hal.device import Device, Facets
from hal.errors import Absent, Broken, ConfigError, DeviceError, HalError, UnknownDevice
from hal.memory import AllocatorPlan

log = logging.getLogger("hal")

AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"
_handles = itertools.count(1)


@dataclass(frozen=True)
class Survey:
    """What one backend answered when it was asked which devices are here.

    Attributes:
        name: of the backend.
        owners: the distributions that register it.
        discovery: what it found; empty if it failed.
        error: `Absent`, `Broken` or what else it raised, or None.
    """

    name: str
    owners: tuple[str, ...]
    discovery: Discovery
    error: HalError | None

    @property
    def broken(self) -> bool:
        """Whether the backend failed in another way than by having no hardware here."""
        return self.error is not None and not isinstance(self.error, Absent)


def survey(plugin: plugins.Plugin) -> Survey:
    """Load one plug-in and ask it for its devices. Never raises."""
    nothing = Discovery(())
    try:
        found = plugins.load(plugin).discover()
        if not isinstance(found, Discovery):
            raise TypeError(f"discover() returned a {type(found).__name__}, not a hal.Discovery")
        _check_claims(found, plugin.name)
    except HalError as error:
        return Survey(plugin.name, plugin.owners, nothing, error)
    except (Exception, SystemExit) as error:  # noqa: BLE001  one bad plug-in must not end the listing
        broken = Broken(f"discover() raised {type(error).__name__}: {error}", device=plugin.name)
        broken.__cause__ = error
        return Survey(plugin.name, plugin.owners, nothing, broken)
    return Survey(plugin.name, plugin.owners, found, None)


def take_surveys() -> list[Survey]:
    """Ask every admitted backend for its devices.

    Raises:
        ConfigError: HAL_BACKENDS cannot be read.
    """
    return [survey(plugin) for plugin in plugins.allowed()]


def _check_claims(discovery: Discovery, name: str) -> None:
    ids = []
    for claim in discovery.claims:
        info = claim.info
        if not isinstance(info, DeviceInfo) or info.backend != name or info.id.partition(":")[0] != name:
            raise TypeError(f"discover() claims {info!r}, whose id and backend must begin with {name!r}")
        ids.append(info.id)
    twice = sorted({id for id in ids if ids.count(id) > 1})
    if twice:
        raise ValueError(f"discover() claims {', '.join(twice)} more than once")


def settle(surveys: list[Survey]) -> tuple[list[DeviceInfo], dict[str, str]]:
    """Give each device to its most specific claim.

    Real devices with one torch device string are one device. Returns the devices in the order of the surveys,
    and for each id that lost the reason. Two equal claims lose both: guessing would be worse than refusing.
    """
    claims = [claim for answer in surveys for claim in answer.discovery.claims]
    contested: dict[str, list[Claim]] = {}
    for claim in claims:
        if not claim.info.simulated:
            contested.setdefault(claim.info.torch_device, []).append(claim)
    lost: dict[str, str] = {}
    for device, rivals in contested.items():
        best = max(claim.specificity for claim in rivals)
        winners = [claim for claim in rivals if claim.specificity == best]
        for claim in rivals:
            if len(winners) > 1 and claim in winners:
                others = ", ".join(w.info.id for w in winners if w is not claim)
                lost[claim.info.id] = f"{device} is claimed equally by {others}; limit HAL_BACKENDS to one of them"
            elif claim not in winners:
                lost[claim.info.id] = f"{device} is {winners[0].info.id}, a more specific claim"
    return [claim.info for claim in claims if claim.info.id not in lost], lost


def list_devices() -> list[DeviceInfo]:
    """Return the devices of all admitted backends, without opening one.

    Simulated devices are included and marked. A backend that is broken is left out, with a warning in the log.

    Raises:
        ConfigError: HAL_BACKENDS cannot be read.
    """
    surveys = take_surveys()
    for answer in surveys:
        if answer.broken:
            log.warning("backend %s is left out: %s", answer.name, answer.error)
    return settle(surveys)[0]


def open_device(name: str | None = None, *, allocator: AllocatorPlan | None = None) -> Device:
    """Open a device.

    Args:
        name: `backend` or `backend:index` as `list_devices` gives it, or "auto": the first real accelerator,
            otherwise the CPU. Without a name, HAL_DEVICE decides, and without that, "auto".
        allocator: allocator settings. They act through environment variables, so torch must not be imported yet.

    Raises:
        UnknownDevice: no admitted backend has this name.
        Absent: the backend is there, and the device is not.
        Broken: the device or its backend does not work; the original error is the cause.
        ConfigError: a setting cannot be read or comes too late.
    """
    because = "asked for by name"
    if name is None:
        name = os.environ.get("HAL_DEVICE")
        because = f"HAL_DEVICE={name}"
    if name is None or name == "auto":
        info, because = _automatic()
    else:
        info = _find(name)
    backend = plugins.load(next(p for p in plugins.allowed() if p.name == info.backend))
    changes = Changes(f"{info.id} (handle {next(_handles)})")
    try:
        _before_torch(backend, changes, allocator)
        facets = backend.open(info, changes)
        if not isinstance(facets, Facets):
            raise TypeError(f"open() returned a {type(facets).__name__}, not hal.Facets")
    except HalError:
        changes.release()
        raise
    except (Exception, SystemExit) as error:
        changes.release()
        raise Broken(f"opening it raised {type(error).__name__}: {error}", device=info.id) from error
    except BaseException:
        changes.release()
        raise
    return Device(info, because, backend, facets, changes)


def _before_torch(backend: Backend, changes: Changes, allocator: AllocatorPlan | None) -> None:
    if "torch" in sys.modules:
        if allocator is not None and allocator.settings():
            raise ConfigError(
                f"allocator settings for {changes.owner} come too late: torch is already imported",
                hint="open the device before the first `import torch`",
            )
        return
    # One broken plug-in in torch's own group makes `import torch` fail; we load the vendor's package ourselves.
    changes.set_environment(AUTOLOAD, "0")
    if allocator is not None:
        for variable, value in backend.allocator_environment(allocator, os.environ).items():
            changes.set_environment(variable, value)
    backend.prepare_import(changes)


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


def find_plugin(name: str) -> plugins.Plugin:
    """Return the admitted backend of this name.

    Raises:
        UnknownDevice: it is not registered, or HAL_BACKENDS does not admit it.
        ConfigError: HAL_BACKENDS cannot be read.
    """
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


def _find(name: str) -> DeviceInfo:
    backend_name, _, index = name.partition(":")
    plugin = find_plugin(backend_name)
    own = survey(plugin)
    if own.error is not None:
        if isinstance(own.error, DeviceError):
            raise own.error
        raise Broken(str(own.error), device=name) from own.error
    candidates = [claim.info for claim in own.discovery.claims]
    wanted = [
        info for info in candidates
        if info.id == name or not index or (index == "0" and info.id == backend_name)
    ]  # fmt: skip
    if not wanted:
        there = ", ".join(info.id for info in candidates) or "none"
        reasons = f" ({'; '.join(own.discovery.left)})" if own.discovery.left else ""
        raise Absent(f"there is no such device{reasons}", device=name, expected=f"one of: {there}")
    info = wanted[0]
    if not info.simulated and info.torch_device != "cpu":
        # Another backend may know better what this device is. The CPU is nobody else's, and opening it is cheap.
        others = [own if p.name == plugin.name else survey(p) for p in plugins.allowed()]
        lost = settle(others)[1].get(info.id)
        if lost is not None:
            raise Absent(lost, device=name)
    return info


def _automatic() -> tuple[DeviceInfo, str]:
    surveys = take_surveys()
    devices, _ = settle(surveys)
    real = [info for info in devices if not info.simulated]
    if not real:
        raise Absent("no backend found a real device", device="auto", hint="see `hal doctor`")
    accelerators = [info for info in real if info.torch_device != "cpu"]
    chosen = (accelerators or real)[0]
    passed = [
        f"{answer.name}: {'BROKEN' if answer.broken else 'absent'}" for answer in surveys if answer.error is not None
    ]
    for answer in filter(lambda answer: answer.broken, surveys):
        log.warning("auto passed over backend %s, which is broken: %s", answer.name, answer.error)
    kind = "the first accelerator" if accelerators else "no accelerator was found"
    return chosen, f"auto: {kind}" + (f" ({', '.join(passed)})" if passed else "")
