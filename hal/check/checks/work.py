# SPDX-License-Identifier: Apache-2.0
"""What an opened device computes, in which order, and what it says of itself."""

from __future__ import annotations

import contextlib
import json
from typing import Any

from hal.check.checks.expect import expect
from hal.check.state import ProcessState
from hal.contract import Contract
from hal.device import Device
from hal.errors import UnsupportedOperation


def opened(device: Device, before: ProcessState) -> str:
    """A tensor can be made on the device, and comes back."""
    import torch

    expect(str(device.torch_device).split(":")[0] == device.info.torch_device.split(":")[0], "another torch device")
    there = torch.arange(1000, device=device.torch_device)
    expect(there.device == device.torch_device, f"a tensor made there lies on {there.device}")
    expect(torch.equal(there.cpu(), torch.arange(1000)), "a tensor comes back with other values")
    return f"{device.because}; changes: {', '.join(map(str, device.changes)) or 'none'}"


def generators(device: Device, before: ProcessState) -> str:
    """Opening left the host's random generators alone: a run that was seeded goes on with the numbers of its seed."""
    now = ProcessState().generators
    touched = [name for name, digest in before.generators.items() if now.get(name) != digest]
    expect(not touched, f"opening seeded, or drew from, {', '.join(touched)}")
    return f"{', '.join(before.generators)} as before"


def synchronize(device: Device) -> str:
    """After `synchronize()` nothing is pending."""
    import torch

    ones = torch.ones(256, 256, device=device.torch_device)
    for _ in range(20):
        product = ones @ ones
    event = None
    with contextlib.suppress(UnsupportedOperation):  # which is a finding of its own
        event = device.event()
        event.record()
    device.synchronize()
    expect(event is None or event.query(), "an event that was recorded before is not reached")
    expect(float(product.sum().cpu()) == 256.0**3, "a product of ones is wrong")
    return "work that was submitted is done"


def streams(device: Device) -> str:
    """A stream that waits for an event sees what was done before it; time between events is not negative."""
    import torch

    start, end = device.event(), device.event()
    one, two = device.stream(), device.stream()
    device.synchronize()
    with one:
        start.record(one)
        total = torch.ones(512, 512, device=device.torch_device)
        for _ in range(8):
            total = total @ torch.full_like(total, 2.0**-9)
        end.record(one)
    two.wait(end)
    with two:
        result = total + 1
    two.synchronize()
    expect(end.query(), "an event is not reached after a stream that waited for it")
    expect(bool((result.cpu() == 2).all()), "a stream did not wait")
    elapsed = start.elapsed_ms(end)
    expect(elapsed >= 0, f"{elapsed} ms between two events in order")
    return f"order kept, {elapsed:.3f} ms measured"


def support(device: Device) -> str:
    """The operators that hal.moe needs exist in float32, as the device itself shows."""
    import torch

    by_status: dict[str, list[str]] = {"native": [], "emulated": [], "unsupported": []}
    for operator in device.operators():
        by_status[device.support(operator, torch.float32).status].append(operator)
    native, emulated, lacking = by_status.values()
    expect("matmul" not in lacking, device.support("matmul", torch.float32).reason)
    parts = [f"float32: {len(native)} native"]
    parts += [f"emulated: {', '.join(emulated)}"] if emulated else []
    parts += [f"unsupported: {', '.join(lacking)}"] if lacking else []
    return "; ".join(parts)


def prepare(device: Device) -> str:
    """A module and its optimiser take one step on the device, and give what the host gives."""
    import torch

    def loss(place: bool) -> float:
        # Small integers and powers of two: exact in any order and on any unit that keeps 10 bits of an input.
        model: Any = torch.nn.Linear(4, 2, bias=False)
        with torch.no_grad():
            model.weight.copy_(torch.arange(8.0).reshape(2, 4) % 3 - 1)
        optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.125, momentum=0.5)
        batch: Any = torch.arange(12.0).reshape(3, 4) % 3
        if place:
            model, optimizer, batch = device.prepare(model, optimizer, batch)
            expect(next(model.parameters()).device == device.torch_device, "parameters were not moved")
        model(batch).square().sum().mul(0.5).backward()
        optimizer.step()
        return float(model(batch).square().sum().detach().cpu())

    here, there = loss(False), loss(True)
    expect(here == there, f"the loss after a step is {there}, and {here} on the host, where it is exact")
    return "one step, exactly as on the host"


def versions(device: Device) -> str:
    """Versions are texts or None, go through JSON, and are the same when asked again."""
    import torch

    told = device.versions()
    wrong = [k for k, v in told.items() if not isinstance(k, str) or not isinstance(v, (str, type(None))) or v == ""]
    expect(not wrong, f"{', '.join(map(str, wrong))}: neither a text nor None")
    expect(json.loads(json.dumps(told)) == told, "they change through JSON")
    expect(told.get("torch") == torch.__version__, f"torch is {torch.__version__}, and it says {told.get('torch')}")
    expect(device.versions() == told, "two calls differ")
    return ", ".join(f"{name} {version or 'unknown'}" for name, version in told.items())


def contract(device: Device) -> str:
    """The declared arithmetic can be written down and read back, and says where it comes from."""
    declared = device.contract
    expect(Contract.from_json(json.loads(json.dumps(declared.as_json()))) == declared, "it changes through JSON")
    expect(declared.evidence, "it says nothing of where it comes from")
    return declared.evidence
