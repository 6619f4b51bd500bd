# SPDX-License-Identifier: Apache-2.0
"""Asking every backend which devices are here, and giving each device to the one that knows best what it is.

Several chips answer to one torch device type, so a device goes to the backend with the most specific claim. The host's
CPU is nobody's alone: any backend may work on it, and none can take it from another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from hal import plugins
from hal.backend import Claim, DeviceInfo, Discovery
from hal.entry_points import Plugin
from hal.errors import Absent, Broken, HalError, described


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


def survey(plugin: Plugin, stage: Callable[[str], object] = lambda what: None) -> Survey:
    """Load one plug-in and ask it for its devices. Never raises.

    Args:
        plugin: whom to ask.
        stage: told what is done next, for a caller that may not live to see the end of it.
    """
    nothing = Discovery(())
    try:
        stage("importing it")
        backend = plugins.load(plugin)
        stage("listing its devices")
        found = backend.discover()
        if not isinstance(found, Discovery):
            raise TypeError(f"discover() returned a {type(found).__name__}, not a hal.Discovery")
        _check_ids(found, plugin.name)
    except HalError as error:
        return Survey(plugin.name, plugin.owners, nothing, error)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001  one bad plug-in must not end the listing
        broken = Broken(f"discover() raised {described(error)}", device=plugin.name)
        broken.__cause__ = error
        return Survey(plugin.name, plugin.owners, nothing, broken)
    return Survey(plugin.name, plugin.owners, found, None)


def take_surveys() -> list[Survey]:
    """Ask every admitted backend for its devices.

    Raises:
        ConfigError: HAL_BACKENDS cannot be read.
    """
    return [survey(plugin) for plugin in plugins.allowed()]


def _check_ids(discovery: Discovery, name: str) -> None:
    ids = [claim.info.id for claim in discovery.claims]
    for claim in discovery.claims:
        if claim.info.backend != name or claim.info.id.partition(":")[0] != name:
            raise ValueError(f"discover() claims {claim.info!r}, whose id and backend must begin with {name!r}")
    twice = sorted({id for id in ids if ids.count(id) > 1})
    if twice:
        raise ValueError(f"discover() claims {', '.join(twice)} more than once")


def on_host(info: DeviceInfo) -> bool:
    """Return whether a device is the host's CPU, as torch sees it."""
    return info.torch_device.partition(":")[0] == "cpu"


def settle(surveys: list[Survey]) -> tuple[list[DeviceInfo], dict[str, str]]:
    """Give each device to its most specific claim.

    Real devices with one torch device string are one device, the host's CPU apart. Returns the devices in the order
    of the surveys, and for each id that lost the reason. Two equal claims lose both: guessing would be worse than
    refusing.
    """
    lost: dict[str, str] = {}
    for device, best, rest in _contests(surveys):
        for claim in rest:
            lost[claim.info.id] = f"{device} is {best[0].info.id}, a more specific claim"
        for claim in best if len(best) > 1 else ():
            others = ", ".join(other.info.id for other in best if other is not claim)
            lost[claim.info.id] = f"{device} is claimed equally by {others}; limit HAL_BACKENDS to one of them"
    claims = (claim for answer in surveys for claim in answer.discovery.claims)
    return [claim.info for claim in claims if claim.info.id not in lost], lost


def undecided(surveys: list[Survey]) -> list[str]:
    """Return a sentence for each device that nobody gets, since the best claims to it are equal."""
    return [
        f"{device} is claimed equally by {' and '.join(claim.info.id for claim in best)}"
        for device, best, _ in _contests(surveys)
        if len(best) > 1
    ]


def _contests(surveys: list[Survey]) -> Iterator[tuple[str, list[Claim], list[Claim]]]:
    """Yield for each real device of torch the best claims, more than one if they are equal, and the others."""
    claims: dict[str, list[Claim]] = {}
    for answer in surveys:
        for claim in answer.discovery.claims:
            if not claim.info.simulated and not on_host(claim.info):
                claims.setdefault(claim.info.torch_device, []).append(claim)
    for device, rivals in claims.items():
        most = max(claim.specificity for claim in rivals)
        best = [claim for claim in rivals if claim.specificity == most]
        yield device, best, [claim for claim in rivals if claim not in best]
