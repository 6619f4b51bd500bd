# SPDX-License-Identifier: Apache-2.0
"""torch's doors that name no vendor, through which a program reaches CUDA all the same; and what loads and saves."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hal.launch.api import api
from hal.launch.patches import Patches
from hal.launch.redirection import Redirection

if TYPE_CHECKING:
    import torch


@api("torch.accelerator.is_available", belief=True)
def is_available(r: Redirection) -> bool:
    """There is one."""
    return bool(r.devices)


@api("torch.accelerator.current_accelerator", belief=True)
def current_accelerator(r: Redirection, check_available: bool = False) -> torch.device:
    """CUDA."""
    import torch

    return torch.device("cuda")


@api("torch.accelerator.device_count", belief=True)
def device_count(r: Redirection) -> int:
    """As `torch.cuda.device_count`."""
    return len(r.devices)


@api("torch.accelerator.get_device_capability", verdict="emulated")
def get_device_capability(r: Redirection, device: Any = None, /) -> dict[str, Any]:
    """The dtypes that torch knows."""
    import torch

    return {"supported_dtypes": {value for value in vars(torch).values() if isinstance(value, torch.dtype)}}


@api("torch.get_device_module")
def get_device_module(r: Redirection, device: Any = None) -> Any:
    """For CUDA the module that the program sees as `torch.cuda`."""
    import torch

    from hal.launch.stand_ins import seen

    if device is None or r.index(device) is not None:
        return seen(torch.cuda)
    return torch.get_device_module(device)


@api("torch._utils._get_available_device_type", belief=True)
def _get_available_device_type(r: Redirection) -> str:
    """CUDA; torchtitan and others ask here."""
    return "cuda"


@api("torch._utils._get_device_module")
def _get_device_module(r: Redirection, device_type: str) -> Any:
    """As `torch.get_device_module`."""
    return get_device_module(r, device_type)


@api("torch.get_device")
def get_device(r: Redirection, input: Any) -> int:
    """The index of a tensor's CUDA device; -1 on the host."""
    if r.hosts is not None and input in r.hosts:
        return -1
    index = r.present(input.device).index
    return -1 if index is None else index


@api("torch.load")
def load(r: Redirection, f: Any, map_location: Any = None, *args: Any, **kwargs: Any) -> Any:
    """Put what was saved on CUDA onto the device, and what is mapped to CUDA, too; a path is never touched."""
    import torch

    try:
        return torch.load(f, _map_location(r, map_location), *args, **kwargs)
    except ValueError as error:
        if _Mapped.__name__ not in str(error):
            raise
    # A script that was saved, which torch hands on to `torch.jit.load`.
    return _placed(r, torch.load(f, r.translate(map_location), *args, **kwargs), map_location)


def install(redirection: Redirection, patches: Patches) -> None:
    """Let tensors that wrap others, which torch puts where the file or the program says, meet what the rest meets."""
    import torch

    original: Any = torch._utils._get_restore_location

    def restore_location(device: Any) -> Any:
        asked = torch.serialization._serialization_tls.map_location
        return asked.of_device(device) if isinstance(asked, _Mapped) else original(device)

    patches.set(torch._utils, "_get_restore_location", restore_location)


class _Mapped:
    """Where torch puts what it loads, for each storage and for a tensor that has none of its own.

    Args:
        r: in force.
        location_of: given where something was saved, as text, returns where it goes; None: it stays.
    """

    def __init__(self, r: Redirection, location_of: Callable[[str], Any]) -> None:
        self._r = r
        self._location_of = location_of

    def __call__(self, storage: Any, location: str) -> Any:
        return _moved(self._r, storage, self._location_of(location))

    def of_device(self, device: Any) -> Any:
        """Return the true device of a tensor that was saved on one."""
        location = self._location_of(str(device))
        return self._r.translate(device if location is None else location)


def _map_location(r: Redirection, asked: Any) -> Any:
    if asked is None:
        # What was saved on CUDA comes to the device of that number; the rest goes where torch would put it.
        return _Mapped(r, lambda location: location if location.startswith("cuda") else None)
    if isinstance(asked, dict):
        return _Mapped(r, lambda location: _by_dict(r, asked, location))
    if callable(asked):

        def answer(storage: Any, location: str) -> Any:
            given = asked(storage, location)
            if given is storage and r.hosts is not None:
                r.hosts.add_storage(storage)
            return storage if given is None and location.startswith("cuda") else given

        return answer
    if r.hosts is not None:
        return _Mapped(r, lambda _: asked)
    return r.translate(asked)


def _by_dict(r: Redirection, asked: dict[str, str], location: str) -> str | None:
    """Return where a dict sends what was saved at a location; None: it is not said, and nothing is known.

    What this program saved on CUDA says "cpu" in the file, where CUDA is a CPU.
    """
    if location in asked or r.hosts is None or location != "cpu":
        return asked.get(location, location)
    return asked.get(f"cuda:{r.current}")


def _moved(r: Redirection, storage: Any, location: Any) -> Any:
    if location is None:
        return storage
    true = r.translate(location)
    if r.hosts is not None:
        if true is not location:
            r.hosts.add_storage(storage, False)
        elif r.is_host(location):
            r.hosts.add_storage(storage)
    if str(true).partition(":")[0] == "cpu":
        return storage
    import torch

    return torch.serialization.default_restore_location(storage, str(true))


@api("torch.jit.load")
def jit_load(r: Redirection, f: Any, map_location: Any = None, *args: Any, **kwargs: Any) -> Any:
    """Put a saved script where it is wanted."""
    import torch

    return _placed(r, torch.jit.load(f, r.translate(map_location), *args, **kwargs), map_location)


def _placed(r: Redirection, made: Any, map_location: Any) -> Any:
    """Return a script whose tensors are known to be where the program wanted them."""
    if r.hosts is not None and map_location is not None:
        for tensor in (*made.parameters(), *made.buffers()):
            r.hosts.add(tensor) if r.is_host(map_location) else r.hosts.add_device(tensor)
    return made


@api("torch.hub.load_state_dict_from_url", "torch.utils.model_zoo.load_url")
def load_state_dict_from_url(
    r: Redirection, url: str, model_dir: str | None = None, map_location: Any = None, *args: Any, **kwargs: Any
) -> Any:
    """As `torch.load`, of what is at a URL."""
    import torch

    return torch.hub.load_state_dict_from_url(url, model_dir, _map_location(r, map_location), *args, **kwargs)


@api("torch.random.fork_rng")
def fork_rng(r: Redirection, devices: Any = None, enabled: bool = True, *args: Any, **kwargs: Any) -> Any:
    """Of the host, and of the devices that are asked for."""
    import torch

    if kwargs.get("device_type") == "cuda":
        kwargs["device_type"] = r.type
    if r.hosts is not None:
        devices, _ = [], kwargs.pop("device_type", None)  # the host's generator is the device's
    elif devices is not None:
        devices = [r.targets[i].index for i in (r.index(d) for d in devices) if i is not None]
    return torch.random.fork_rng(devices, enabled, *args, **kwargs)
