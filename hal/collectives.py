# SPDX-License-Identifier: Apache-2.0
"""Collectives of one device: the vendor's library through torch.distributed, with typed errors.

`Collectives` starts or joins the process group of a device; hal/group.py has the operations.
"""

from __future__ import annotations

import contextlib
import datetime
from typing import TYPE_CHECKING, NoReturn, final

from hal.arguments import integer, number
from hal.errors import CollectiveError, ConfigError, UnsupportedOperation
from hal.facet import Facet
from hal.group import Group, library_errors

if TYPE_CHECKING:
    import torch

DEFAULT_TIMEOUT_S = 600.0


@final
class Collectives(Facet):
    """Starts process groups on the library that belongs to one device.

    Args:
        device_id: for messages.
        torch_device: this rank's device.
        library: the library's own name, for people.
        torch_name: the name by which torch.distributed knows it.
    """

    def __init__(self, device_id: str, torch_device: torch.device, library: str, torch_name: str) -> None:
        super().__init__(device_id)
        self.torch_device = torch_device
        self.library = library
        self.torch_name = torch_name

    def init(
        self,
        *,
        rank: int | None = None,
        world_size: int | None = None,
        init_method: str | None = None,
        timeout_s: float | None = None,
    ) -> Group:
        """Join the default process group, or start it.

        A group that runs is joined as it is: what is asked for must be what it has. A group that is started is bound to
        this device, so that the library never takes another one of the same process.

        The group belongs to the process and not to the device: `Group.close()` ends it, `Device.close()` does not.
        Ending waits for the other ranks in some libraries, which must not hold up an error on its way out.

        Args:
            rank, world_size, init_method: as in `torch.distributed.init_process_group`; by default they come
                from the environment that torchrun sets.
            timeout_s: seconds after which a collective that has not completed is an error; by default 600, or
                what the running group has.

        Returns:
            The group of all ranks. `close()` ends it if this call started it.

        Raises:
            ConfigError: an argument is of the wrong type or out of range, or rank and world size are given by halves.
            CollectiveError: torch was built without distributed support or without this library, the group could
                not be started, or the running one differs from what was asked for.
            CollectiveTimeout: the other ranks did not come in time.
            UnsupportedOperation: the library does not serve this type of device.
            DeviceClosed: the device is closed.
        """
        import torch.distributed as dist

        self.check_open()
        self._check_arguments(rank, world_size, init_method, timeout_s)
        if not dist.is_available():
            raise CollectiveError("this build of torch has no torch.distributed", operation="init")
        served = dist.Backend.backend_capability.get(self.torch_name)
        if served is not None and self.torch_device.type not in served:
            raise UnsupportedOperation(
                f"{self.library} serves {', '.join(served)}, not {self.torch_device.type}", device=self.device_id,
                what="collectives", hint="the backend names the device's own library in `library`",
            )  # fmt: skip
        if dist.is_initialized():
            self._check_running(rank, world_size, init_method, timeout_s)
            return self._group(owned=False)
        hint = f"torchrun sets the environment that init() reads; is {self.library} part of this torch?"
        with library_errors("init", rank, hint):
            dist.init_process_group(
                self.torch_name,
                init_method=init_method,
                rank=-1 if rank is None else rank,
                world_size=-1 if world_size is None else world_size,
                timeout=datetime.timedelta(seconds=DEFAULT_TIMEOUT_S if timeout_s is None else timeout_s),
                device_id=self.bound_device(),
            )
        return self._group(owned=True)

    def _group(self, *, owned: bool) -> Group:
        return Group(self, self.torch_device, self.bound_device(), None, owned=owned)

    def bound_device(self) -> torch.device | None:
        """Return the device to which a group is bound; None for the host, to which there is no alternative."""
        import torch

        accelerator = torch.accelerator.current_accelerator()
        bound = accelerator is not None and accelerator.type == self.torch_device.type
        return self.torch_device if bound and self.torch_device.index is not None else None

    def _check_arguments(
        self, rank: int | None, world_size: int | None, init_method: str | None, timeout_s: float | None
    ) -> None:
        if (rank is None) != (world_size is None):
            raise ConfigError(f"{self.device_id}: rank={rank} and world_size={world_size}", expected="both, or neither")
        if rank is not None:
            world_size = integer(f"{self.device_id}: the world size", world_size, least=1)
            integer(f"{self.device_id}: the rank", rank, least=0, most=world_size - 1)
        if not (init_method is None or isinstance(init_method, str)):
            raise ConfigError(f"{self.device_id}: init_method is {init_method!r}", expected="a URL, or None")
        if timeout_s is not None:
            # torch counts in whole milliseconds, and a library may add it to a clock in nanoseconds.
            number(f"{self.device_id}: the timeout in seconds", timeout_s, least=1e-3, most=1e9)

    def _check_running(
        self, rank: int | None, world_size: int | None, init_method: str | None, timeout_s: float | None
    ) -> None:
        """Refuse to join the default group unless it is what was asked for."""
        import torch.distributed as dist

        running = dist.get_backend()
        # A group may serve several device types: "cpu:one,cuda:two". An undecided one takes the default.
        parts = {part.rpartition(":")[2] for part in running.split(",")}
        if running != "undefined" and self.torch_name not in parts:
            raise CollectiveError(
                f"the default group runs on {running}", operation="init", rank=dist.get_rank(),
                expected=f"{self.torch_name}, the library of {self.device_id}",
                hint="init_process_group without a backend name, or destroy_process_group() first",
            )  # fmt: skip
        if init_method is not None:
            self._refuse_running(f"init_method={init_method!r} only starts a group", "init_method")
        if rank is not None and (rank, world_size) != (dist.get_rank(), dist.get_world_size()):
            self._refuse_running(f"rank={rank} and world_size={world_size} were asked for", "rank and world_size")
        if timeout_s is not None:
            has = _running_timeout_s(self.torch_device)
            if has is None or abs(has - timeout_s) >= 1e-3:  # torch keeps whole milliseconds
                told = "does not tell its own" if has is None else f"has {has:g}"
                self._refuse_running(f"timeout_s={timeout_s:g} was asked for, and it {told}", "timeout_s")

    def _refuse_running(self, why: str, arguments: str) -> NoReturn:
        import torch.distributed as dist

        raise CollectiveError(
            f"the default group runs already, of {dist.get_world_size()} ranks: {why}", operation="init",
            rank=dist.get_rank(), hint=f"init() without {arguments} joins it as it is; destroy_process_group() ends it",
        )  # fmt: skip


def _running_timeout_s(device: torch.device) -> float | None:
    """Return the timeout of the default group's library for this type of device; None if it does not tell."""
    import torch.distributed as dist

    with contextlib.suppress(RuntimeError, AttributeError):
        timeout: datetime.timedelta = dist.group.WORLD._get_backend(device).options._timeout  # type: ignore[union-attr]
        return timeout.total_seconds()
    return None
