# SPDX-License-Identifier: Apache-2.0
"""The random numbers of an opened device."""

from __future__ import annotations

from typing import Any

from hal import philox
from hal.check.checks.expect import expect
from hal.device import Device


def _drawn(device: Device) -> Any:
    import torch

    return torch.rand(1024, device=device.torch_device).cpu()


def seed(device: Device) -> str:
    """A seed repeats the numbers; another one gives others."""
    import torch

    draws = []
    for number in (7, 7, 8):
        device.random.seed(number)
        draws.append(_drawn(device))
    expect(torch.equal(draws[0], draws[1]), "one seed gave different numbers")
    expect(not torch.equal(draws[0], draws[2]), "two seeds gave the same numbers")
    return "repeatable"


def state(device: Device) -> str:
    """A state that is put back repeats the numbers."""
    import torch

    state = device.random.get_state()
    expect(state.device.type == "cpu" and state.dtype == torch.uint8, f"the state is {state.dtype} on {state.device}")
    first, second = _drawn(device), _drawn(device)
    device.random.set_state(state)
    expect(torch.equal(_drawn(device), first), "the numbers differ after the state was put back")
    expect(not torch.equal(first, second), "the generator repeats itself")
    return "round trip"


def portable(device: Device) -> str:
    """Portable streams have the bits of every other device."""
    import numpy as np

    for draw in ("bits", "uniform", "normal"):
        there = getattr(device.random.stream(3, "check"), draw)(1000).cpu().numpy()
        here = getattr(philox, draw)(3, "check", 1000)
        expect(np.array_equal(there.astype(here.dtype), here), f"{draw} differs from the host's")
    return "bits, uniform, normal equal the host's"
