# SPDX-License-Identifier: Apache-2.0
"""The generic base: any device that torch can address, in about 30 lines.

A plug-in derives from `TorchBackend`, says which torch device type it is, which package registers it and how it
recognises its hardware. Everything else goes through `torch.get_device_module`, the interface that torch asks of
every device: a statistic that the module lacks is None, and a facet that it lacks raises `UnsupportedOperation`.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, final

from hal.backend import Backend, Claim, DeviceInfo, Discovery, Specificity
from hal.changes import Changes, Switch
from hal.collectives import Collectives
from hal.contract import TRUNCATING_MATRIX_UNITS, Contract
from hal.errors import Absent, Broken, UnsupportedPrecision
from hal.facets import Facets
from hal.memory import Memory
from hal.precision import Fp32Mode, Precision
from hal.random import Random
from hal.streams import TorchStreams
from hal.support_table import SupportTable
from hal.torch_memory import TorchMemory
from hal.torch_module import module_function

if TYPE_CHECKING:
    import torch


class TorchBackend(Backend):
    """A backend over one torch device type. Override what differs; `present` must be answered."""

    torch_type: ClassVar[str]
    """What `torch.device()` takes, such as `flagos`."""
    package: ClassVar[str | None] = None
    """The Python package whose import registers the device type; None if torch has it built in."""
    library: ClassVar[str] = "gloo"
    """The collective library's name, for people."""
    distributed_name: ClassVar[str | None] = None
    """The name by which torch.distributed knows it; by default the library's."""
    simulated: ClassVar[bool] = False
    """True if the arithmetic is a model of hardware that is not there."""
    contract: ClassVar[Contract] = Contract(
        matmul=TRUNCATING_MATRIX_UNITS, subnormals="unspecified",
        evidence="assumed: float32 accumulation that may truncate; probe the device to declare more", basis="assumed",
    )  # fmt: skip

    # What a plug-in answers ------------------------------------------------------------------------------------

    def present(self) -> tuple[int | None, tuple[str, ...]]:
        """Return how many devices are here, None if that cannot be known cheaply, and what showed it.

        Must not import the vendor's package. Zero means that there are none.

        Raises:
            Absent, Broken: with the reason.
        """
        raise NotImplementedError(f"{type(self).__name__}.present() must say how this hardware is recognised")

    def describe(self, index: int) -> dict[str, Any]:
        """Return what is cheaply known of one device: any of `name`, `arch`, `total_memory`, `evidence`."""
        return {}

    def specificity(self) -> Specificity:
        """How closely this backend's claims fit."""
        return Specificity.PLATFORM

    def make_memory(self, info: DeviceInfo, device: torch.device, module: Any) -> Memory:
        """Return the memory facet."""
        return TorchMemory(info.id, device, module)

    def make_precision(
        self, info: DeviceInfo, device: torch.device, module: Any, changes: Changes, support: SupportTable
    ) -> Precision:
        """Return the precision facet."""
        return TorchPrecision(info.id, device, changes, support)

    def make_contract(self, info: DeviceInfo, device: torch.device, module: Any) -> Contract:
        """Return what this device promises about its arithmetic; by default the class's `contract`."""
        return self.contract

    def opened(self, info: DeviceInfo, device: torch.device, module: Any, changes: Changes) -> None:
        """Look at the device once its driver runs, and set what the contract needs, through `changes`.

        Raises:
            Absent: it turns out to be another vendor's.
        """

    def import_hint(self, error: Exception) -> str:
        """Return what to try when importing the vendor's package raised `error`."""
        return f"`python -c 'import torch, {self.package}'` shows the same without hal"

    def emulated(self, operator: str, dtype: torch.dtype) -> str | None:
        """Return how an operator is emulated on this device, from a cited table, or None."""
        return None

    # The rest --------------------------------------------------------------------------------------------------

    @final
    def discover(self) -> Discovery:
        """See `Backend.discover`."""
        count, evidence = self.present()
        left = tuple(self.left())
        if count == 0 and left:
            return Discovery((), left)
        if count == 0:
            raise Absent("; ".join(evidence) or "no device of this type", device=self.name)
        claims = []
        for index in range(1 if count is None else count):
            known = {"name": None, "arch": None, "total_memory": None, **self.describe(index)}
            claims.append(
                Claim(
                    DeviceInfo(
                        id=f"{self.name}:{index}",
                        backend=self.name,
                        vendor=self.vendor,
                        # Tensors on a CPU have no index, and `cpu:0` would equal no tensor's device.
                        torch_device="cpu" if self.torch_type == "cpu" else f"{self.torch_type}:{index}",
                        simulated=self.simulated,
                        evidence=evidence + tuple(known.pop("evidence", ())),
                        **known,
                    ),
                    self.specificity(),
                )
            )
        return Discovery(tuple(claims), left)

    def left(self) -> Sequence[str]:
        """Return the devices that this backend saw and left to others, each with the reason."""
        return ()

    @final
    def open(self, info: DeviceInfo, changes: Changes) -> Facets:
        """See `Backend.open`."""
        import torch

        if self.package is not None:
            try:
                importlib.import_module(self.package)
            except Exception as error:
                raise Broken(
                    f"importing {self.package} raised {type(error).__name__}: {error}", device=info.id,
                    hint=self.import_hint(error),
                ) from error  # fmt: skip
        device = torch.device(info.torch_device)
        module = torch.get_device_module(device)
        if getattr(module, "_is_in_bad_fork", lambda: False)():
            raise Broken(
                "this process was forked from one that had already opened the device", device=info.id,
                hint="start workers with the 'spawn' method",
            )  # fmt: skip
        if not module.is_available():
            raise Absent(f"torch.{self.torch_type}.is_available() is False", device=info.id)
        count = module.device_count()
        if device.index is not None and device.index >= count:
            raise Absent(f"there are only {count} devices", device=info.id)
        torch.zeros(1, device=device)  # the driver is initialised here; a failure must not wait for first use
        self.opened(info, device, module, changes)
        support = SupportTable(device, info.id, self.emulated)
        return Facets(
            torch_device=device,
            memory=self.make_memory(info, device, module),
            precision=self.make_precision(info, device, module, changes, support),
            collectives=Collectives(info.id, device, self.library, self.distributed_name or self.library),
            random=TorchRandom(info.id, device, module),
            streams=TorchStreams(device, module),
            support=support,
            contract=self.make_contract(info, device, module),
        )


class TorchPrecision(Precision):
    """Precision of a device whose vendor's switches are unknown: only what it does by itself can be confirmed."""

    def _fp32_switches(self, mode: Fp32Mode) -> Sequence[tuple[Switch, object]]:
        if mode != "ieee":
            raise UnsupportedPrecision(
                f"this backend knows no switch for float32 mode {mode!r}", device=self.device_id, what=mode
            )
        return ()


@final
class TorchRandom(Random):
    """The device module's own generator."""

    def __init__(self, device_id: str, device: torch.device, module: Any) -> None:
        super().__init__(device_id, device)
        self._module = module

    def _function(self, name: str) -> Any:
        return module_function(self._module, name, self.torch_device, self.device_id, "random")

    def _seed(self, seed: int) -> None:
        import torch

        manual_seed = self._function("manual_seed")

        # `manual_seed` of a module seeds its current device, which may be another one.
        generators = getattr(self._module, "default_generators", None)
        if generators is not None and self.torch_device.index is not None and len(generators):
            generators[self.torch_device.index].manual_seed(seed)
            return
        with torch.get_device_module(self.torch_device).device(self.torch_device):
            manual_seed(seed)

    def _get_state(self) -> torch.Tensor:
        state: torch.Tensor = self._function("get_rng_state")(self.torch_device)
        return state.cpu()

    def _set_state(self, state: torch.Tensor) -> None:
        self._function("set_rng_state")(state, self.torch_device)
