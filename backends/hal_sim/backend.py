# SPDX-License-Identifier: Apache-2.0
"""Simulated devices: `sim:h200`, or `sim:h200/splitk=4` with another schedule, `sim:h200/memory=24GiB`.

What is claimed is the matrix unit and the declared schedule, never "the device": all else is what the CPU computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

from hal.backend import Backend, Claim, DeviceInfo, Discovery, Specificity
from hal.changes import Changes, Switch
from hal.collectives import Collectives
from hal.contract import Contract, arithmetic
from hal.facets import Facets
from hal.matrix_unit import FORMATS
from hal.streams import HostStreams
from hal.support_table import SupportTable
from hal_cpu.random import CpuRandom
from hal_sim.chips import CHIPS
from hal_sim.memory import SimMemory
from hal_sim.options import Options


@final
class SimBackend(Backend):
    """Accelerators that are not there."""

    plugin_api = (1, 0)
    name = "sim"
    vendor = "simulated"

    def discover(self) -> Discovery:
        """See `Backend.discover`."""
        return Discovery(tuple(Claim(_info(name), Specificity.PRODUCT) for name in CHIPS))

    def variant(self, name: str) -> DeviceInfo | None:
        """See `Backend.variant`: a chip, and after slashes its options."""
        chip, _, options = name.partition("/")
        if chip not in CHIPS or not options:
            return None
        Options.parse(options, CHIPS[chip])
        return _info(chip, options)

    def open(self, info: DeviceInfo, changes: Changes) -> Facets:
        """See `Backend.open`."""
        import torch

        from hal_sim import compiled, native
        from hal_sim.precision import SimPrecision
        from hal_sim.simulation import Simulation

        name, _, options = info.id.removeprefix("sim:").partition("/")
        asked = Options.parse(options, CHIPS[name])
        chip = asked.chip
        if native.asked() == "native":
            native.library()  # now, where it can be said
        made = Simulation(info.id, chip, asked.schedule, asked.strict)
        for switch, value in (*_switches(made), *compiled.switches(made.count)):
            changes.set(switch, value)
        memory = SimMemory(info.id, asked.memory)  # now: what the others load is no memory of the device
        for switch, value in memory.switches():
            changes.set(switch, value)
        device = torch.device("cpu")
        support = SupportTable(device, info.id)
        return Facets(
            torch_device=device,
            memory=memory,
            precision=SimPrecision(info.id, device, changes, support, made),
            collectives=Collectives(info.id, device, "gloo", "gloo"),
            random=CpuRandom(info.id, device),
            streams=HostStreams(),
            support=support,
            not_simulated=made.not_simulated,
            contract=Contract(
                matmul={
                    name: arithmetic(unit, FORMATS[name].min_exponent)
                    for name, unit in chip.units.items()
                    if name not in ("tf32", "hf32")
                },
                # What flushes is the unit; whether the CPU does elsewhere is its own affair.
                subnormals="flushed" if chip.units["float16"].kind == "pairwise" else "unspecified",
                evidence=f"simulated, {chip.evidence}; {asked.schedule}",
            ),
        )

    def versions(self) -> Mapping[str, str | None]:
        """See `Backend.versions`."""
        from hal_sim import native

        return {"simulator": "torch's operators" if native.library() is None else "compiled"}


def _info(name: str, options: str = "") -> DeviceInfo:
    asked = Options.parse(options, CHIPS[name])
    chip = asked.chip
    unverified = ", unverified" if chip.units["float16"].evidence == "unverified" else ""
    return DeviceInfo(
        id=f"sim:{name}/{options}" if options else f"sim:{name}",
        backend="sim",
        vendor=chip.vendor,
        name=f"{chip.product}, simulated{unverified}" + (f" ({options})" if options else ""),
        arch=chip.arch,
        total_memory=asked.memory,
        torch_device="cpu",
        simulated=True,
        count=asked.count,
        evidence=(chip.evidence,),
    )


def _switches(made: object) -> list[tuple[Switch, object]]:
    """Return what opening sets: who multiplies, and no kernels that multiply by themselves where torch has others."""
    import torch

    from hal_sim import interception

    return [
        (Switch("products of matrices on the CPU", interception.active, interception.activate), made),
        (Switch("torch.backends.mha fast path", torch.backends.mha.get_fastpath_enabled,
                torch.backends.mha.set_fastpath_enabled), False),
        (Switch("torch.backends.mkldnn.enabled", torch._C._get_mkldnn_enabled, torch._C._set_mkldnn_enabled), False),
    ]  # fmt: skip


backend = SimBackend()
