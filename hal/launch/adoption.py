# SPDX-License-Identifier: Apache-2.0
"""Putting a redirection in force in this process, and ending it."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, final

from hal.errors import ConfigError
from hal.launch import api
from hal.launch.audit import Entry
from hal.launch.patches import Patches

if TYPE_CHECKING:
    from hal.device import Device
    from hal.launch.redirection import Redirection

_lock = threading.RLock()
_adoption: Adoption | None = None


def _note_not_simulated(redirection: Redirection, operator: str, operands: tuple[object, ...]) -> None:
    """Note what a simulated device left to the CPU, unless it was on the host anyway."""
    import torch

    hosts = redirection.hosts
    tensors = [operand for operand in operands if isinstance(operand, torch.Tensor)]
    if hosts is None or not tensors or not all(tensor in hosts for tensor in tensors):
        redirection.change(operator, "computed as a CPU does, in a kernel that the simulated device does not reach")


def adopt(device: str | None = None, *, strict: bool = False) -> Adoption:
    """Let this program, which was written for CUDA, run on another device from here on.

    Call it before anything touches CUDA; modules that imported torch before see the device, too. On a device that
    torch itself calls CUDA nothing is changed at all.

    Args:
        device: as for `hal.open_device`. A backend's name alone, such as "ascend", gives all of its devices.
        strict: refuse what may change results, instead of noting it.

    Returns:
        The adoption, which `release()` ends, and so does the end of a `with` block.

    Raises:
        ConfigError: another device is adopted already.
        UnknownDevice, Absent, Broken: see `hal.open_device`.
    """
    global _adoption
    with _lock:
        if _adoption is not None:
            raise ConfigError(
                f"{_adoption.device.info.id} is adopted already", hint="hal.release() before another device is adopted"
            )
        with _no_collection():
            _adoption = Adoption(device, strict)
        return _adoption


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Keep the garbage collector from looking at all of torch while it is imported and adopted, and right afterwards.

    Each of the two would take a tenth of a second. Freezing and unfreezing makes all objects old ones, which the
    collector looks at when it is time for a full collection.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled and not gc.get_freeze_count():  # what somebody else has frozen stays so
            gc.freeze()
            gc.unfreeze()
        if enabled:
            gc.enable()


def release() -> None:
    """End the adoption of this process: every name in torch is what it was. Without an adoption, nothing happens."""
    global _adoption
    with _lock:
        ending, _adoption = _adoption, None
        if ending is not None:
            ending._end()


def adopted() -> Adoption | None:
    """Return the adoption in force, or None."""
    return _adoption


@final
class Adoption:
    """A redirection in force; `hal.adopt` makes it.

    Attributes:
        device: what the program's current CUDA device really is.
        redirection: None on a device that torch itself calls CUDA.
    """

    def __init__(self, name: str | None, strict: bool) -> None:
        from hal.registry import open_device

        first = open_device(name)
        self.device = first
        self.redirection: Redirection | None = None
        self._patches = Patches()
        self._patches.on_undo(first.close)
        try:
            if first.torch_device.type != "cuda":
                devices = _all_of(name, first, self._patches)
                self.device = devices[0]
                self.redirection = self._redirect(devices, strict)
        except BaseException:
            self._patches.undo()
            raise

    def _redirect(self, devices: list[Device], strict: bool) -> Redirection:
        from hal.launch import modules, warned
        from hal.launch.redirection import Redirection
        from hal.launch.replacements import finder
        from hal.launch.stand_ins import StandIns
        from hal.launch.surface import compiler, cuda, distributed, operators, tensors

        redirection = Redirection(devices, strict)
        self._patches.on_undo(lambda: api.activate(None))
        replaced = modules.redirected(api.TABLE, redirection)
        for name, original in tensors.factories.makers().items():
            module, _, attribute = name.rpartition(".")
            replaced.setdefault(module, {})[attribute] = tensors.factories.maker(name, original)
        replaced["torch"]["device"] = tensors.device_class.device_class()
        api.activate(redirection)
        doors = (
            tensors.methods, tensors.device_class, tensors.default_device, operators.amp, tensors.constructors,
            tensors.loading, operators.lacking, operators.widened, operators.flash_kernels, operators.triton_kernels,
            compiler.dynamo, compiler.traced, compiler.script, compiler.fakes, distributed.collectives,
            distributed.parallel, distributed.data_parallel, operators.optimizers, distributed.sync_batch_norm,
            tensors.storages, tensors.crossings, tensors.packed_sequences, distributed.dtensor_random,
            distributed.dtensor_attention, cuda.accelerator, tensors.printing, operators.kernels, tensors.net,
        )  # fmt: skip
        for door in doors:
            door.install(redirection, self._patches)
        for device in devices:
            device.on_not_simulated(functools.partial(_note_not_simulated, redirection))
        finder.install(self._patches)
        warned.install(self._patches)
        modules.install(StandIns(replaced, self._patches.methods), redirection, self._patches)
        return redirection

    def entries(self) -> list[Entry]:
        """Return what the program did so far; see `hal.launch.audit`."""
        return [] if self.redirection is None else self.redirection.audit.entries()

    def __enter__(self) -> Adoption:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if _adoption is self:
            release()

    def _end(self) -> None:
        self._patches.undo()


def _all_of(name: str | None, first: Device, patches: Patches) -> list[Device]:
    """Return what CUDA's devices are: the one that was asked for, or all of the backend that was."""
    if first.torch_device.index is None:
        # One CPU for each process of this run on this host: each process calls one of them its own.
        return [first] * max(first.info.count, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    asked = name or os.environ.get("HAL_DEVICE") or "auto"
    if ":" in asked:
        return [first]
    from hal.registry import list_devices, open_device

    devices = []
    for info in list_devices():
        if info.id == first.info.id:
            devices.append(first)
        elif info.backend == first.info.backend:
            devices.append(open_device(info.id))
            patches.on_undo(devices[-1].close)
    return devices
