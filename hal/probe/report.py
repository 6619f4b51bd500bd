# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of one device: all formats that it multiplies, probed one after the other."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import hal
from hal.errors import DeviceConflict, HalError, Unsupported
from hal.probe import whole
from hal.probe.contradiction import contradictions, of_architecture
from hal.probe.facts import UnitFacts, fingerprint
from hal.probe.kernels import Kernels, kernels, topk_ties
from hal.probe.multiplier import Multiplier, multipliers
from hal.probe.order import described
from hal.probe.rules import Likeness, nearest
from hal.probe.tree import NoTree, summation_tree
from hal.probe.unit import INNER, unit_facts
from hal.probe.whole import Products

if TYPE_CHECKING:
    from hal.contract import Contract
    from hal.device import Device

SCHEMA = "hal.probe/1"


@dataclass(frozen=True)
class DeviceFacts:
    """What a probe found.

    Attributes:
        device: facts that were known before.
        versions: of what decides results.
        units: by format of the operands.
        kernels: by format: whether one arithmetic is all there is.
        products: by format, whole ones.
        orders: by format, and "single row" or "single column": the order there, where the bits differ.
        refused: formats that the device does not multiply, each with the reason.
        topk_ties: which of equal numbers its top-k takes.
        contract: what the device declares.
    """

    device: Mapping[str, object]
    versions: Mapping[str, str | None]
    units: Mapping[str, UnitFacts]
    kernels: Mapping[str, Kernels]
    products: Mapping[str, Products]
    orders: Mapping[str, Mapping[str, str]]
    refused: Mapping[str, str]
    topk_ties: str
    contract: Contract

    @property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits for all arithmetic: every answer, and the bits of whole products."""
        others = {
            "products": {name: found.digest for name, found in self.products.items()},
            "kernels": {name: found.answers for name, found in self.kernels.items()},
            "orders": {name: dict(found) for name, found in self.orders.items()},
        }
        return fingerprint(self.units, others)

    @cached_property
    def likeness(self) -> Likeness:
        """The nearest known architectures."""
        return nearest(self.units, self.products)

    @property
    def contradictions(self) -> tuple[str, ...]:
        """Sentences about promises of the contract that the device does not keep, and about its architecture."""
        arch = self.device.get("arch")
        return (
            *of_architecture(None if arch is None else str(arch), self.units, self.likeness),
            *contradictions(self.contract, self.units, self.topk_ties),
        )

    def as_json(self) -> dict[str, Any]:
        """Return plain JSON values, schema `hal.probe/1`."""
        likeness = self.likeness
        return {
            "schema": SCHEMA,
            "device": dict(self.device),
            "versions": dict(self.versions),
            "fingerprint": self.fingerprint,
            "units": {name: facts.as_json() for name, facts in self.units.items()},
            "kernels": {name: found.answers for name, found in self.kernels.items()},
            "orders": {name: dict(found) for name, found in self.orders.items()},
            "refused": dict(self.refused),
            "topk_ties": self.topk_ties,
            "nearest": {"archs": list(likeness.archs), "exact": likeness.exact,
                        "differences": {name: list(what) for name, what in likeness.differences.items()},
                        "schedules": dict(likeness.schedules), "elements": likeness.elements,
                        "differing": {name: list(counts) for name, counts in likeness.whole.items()}},
            "contract": self.contract.as_json(),
            "contradictions": list(self.contradictions),
        }  # fmt: skip


def probe(name: str, inner: int = INNER) -> DeviceFacts:
    """Open a device and probe it.

    Args:
        name: such as `cuda:0`, `sim:h200` or `cpu`.
        inner: K of the products; at least 8.

    Raises:
        HalError: the device cannot be opened.
    """
    with hal.open_device(name) as device, _threads_for(device):
        found, refused = multipliers(device)
        ties = topk_ties(device.torch_device)
        units = {format: unit_facts(multiply, inner) for format, multiply in found.items()}
        products = {format: whole.products(multiply, units[format].inner) for format, multiply in found.items()}
        seen = {format: kernels(multiply) for format, multiply in found.items()}
        orders = {format: _other_orders(found[format], seen[format], inner) for format in found}
        info, versions, contract = device.info.as_json(), device.versions(), device.contract
    # The float32 mode stays until the device is closed, so that it is opened once more.
    with hal.open_device(name) as device, _threads_for(device):
        try:
            multiply = _tf32(device)
            units["tf32"] = unit_facts(multiply, inner)
            products["tf32"] = whole.products(multiply, units["tf32"].inner)
        except (Unsupported, DeviceConflict) as error:
            refused["tf32"] = error.message
    return DeviceFacts(
        info, versions, units, seen, products, {k: v for k, v in orders.items() if v}, refused, ties, contract
    )  # fmt: skip


@contextlib.contextmanager
def _threads_for(device: Device) -> Iterator[None]:
    """Let one thread make what a simulated device multiplies: it is so little that several wait for each other.

    A CPU that is measured itself keeps its threads, by whose number its kernels may share out a sum.
    """
    import torch

    threads = torch.get_num_threads()
    if device.info.simulated:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if device.info.simulated:
            torch.set_num_threads(threads)


def _tf32(device: Device) -> Multiplier:
    import torch

    report = device.precision.fp32_mode("tf32")
    bits = dict(report.input_bits).get("matmul")
    format = "hf32" if bits == 12 else "tf32"
    return Multiplier(format, device.torch_device, torch.mm, torch.float32, torch.float32)


def _other_orders(multiply: Multiplier, seen: Kernels, inner: int) -> dict[str, str]:
    """Return the orders of products with a single row or column, where these have other bits."""
    orders = {}
    for name, found, single in (
        ("single row", seen.single_row, multiply.one_row_at_a_time),
        ("single column", seen.single_column, multiply.one_column_at_a_time),
    ):
        if found == "other" and not multiply.format.startswith("float8"):  # too slow on some hosts
            try:
                orders[name] = described(summation_tree(single(), inner))
            except (NoTree, RuntimeError, HalError) as why:
                orders[name] = f"no tree: {why}"
    return orders
