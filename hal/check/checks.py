# SPDX-License-Identifier: Apache-2.0
"""One function for each part of the interface. It returns what it saw, or raises `Failed` or `Unsupported`.

None of them only asks that a call does not raise: each compares the result with what the interface says.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hal import philox
from hal.errors import CollectiveError, DeviceClosed, OutOfMemoryError, UnsupportedOperation, UnsupportedPrecision

if TYPE_CHECKING:
    from hal.backend import Backend
    from hal.device import Device

MIB = 2**20


class Failed(Exception):
    """The backend does something else than the interface says."""


def expect(holds: object, otherwise: str) -> None:
    """Raise `Failed` unless the condition holds."""
    if not holds:
        raise Failed(otherwise)


def process_state() -> dict[str, object]:
    """Return what opening a device could change in this process: the environment and torch's own switches."""
    # torch's compiler sets a variable of its own as soon as it is imported, whatever the device.
    state: dict[str, object] = {
        f"environment variable {name}": value
        for name, value in os.environ.items()
        if not name.startswith("TORCHINDUCTOR_")
    }
    if "torch" in sys.modules:
        import torch

        state |= {
            "torch.get_default_dtype()": torch.get_default_dtype(),
            "torch.get_float32_matmul_precision()": torch.get_float32_matmul_precision(),
            "torch.are_deterministic_algorithms_enabled()": torch.are_deterministic_algorithms_enabled(),
            "torch.get_num_threads()": torch.get_num_threads(),
            "torch.is_grad_enabled()": torch.is_grad_enabled(),
        }
    return state


# Before it is opened --------------------------------------------------------------------------------------------


def facts(backend: Backend) -> str:
    """Facts have the types of `DeviceInfo`, and go through JSON."""
    import torch

    infos = [claim.info for claim in backend.discover().claims]
    for info in infos:
        for field in ("id", "backend", "vendor", "torch_device"):
            value = getattr(info, field)
            expect(isinstance(value, str) and value, f"{field} is {value!r}, not a text")
        for field in ("name", "arch"):
            value = getattr(info, field)
            expect(value is None or isinstance(value, str), f"{field} is {value!r}, neither a text nor None")
        total = info.total_memory
        expect(total is None or (type(total) is int and total > 0), f"total_memory is {total!r}; unknown is None")
        expect(json.loads(json.dumps(info.as_json())) == info.as_json(), "as_json() changes through JSON")
        expect(info.evidence, f"{info.id} says nothing of what it looked at; evidence is empty")
    # A type that a package registers when it is imported is not yet known to torch, so only its form is looked at.
    expect(all(":" in i.torch_device or i.torch_device.isidentifier() for i in infos), "torch_device is malformed")
    return f"{len(infos)} listed; {infos[0].id} on {infos[0].torch_device} (torch {torch.__version__})"


def repeatable(backend: Backend) -> str:
    """Listing twice gives the same."""
    first, second = backend.discover(), backend.discover()
    expect(first == second, f"two calls of discover() differ: {first} and {second}")
    return "two calls agree"


def cheap(backend: Backend) -> str:
    """Listing imports no vendor package and initialises no device."""
    backend.discover()
    package = getattr(backend, "package", None)
    expect(package is None or package not in sys.modules, f"discover() imported {package}")
    torch_type = getattr(backend, "torch_type", None)
    module = getattr(sys.modules.get("torch"), str(torch_type), None)
    initialized = getattr(module, "is_initialized", None)
    if torch_type != "cpu" and initialized is not None:
        expect(not initialized(), f"discover() initialised torch.{torch_type}")
    return "no vendor package imported" if package else "nothing initialised"


# Opened ---------------------------------------------------------------------------------------------------------


def opened(device: Device) -> str:
    """A tensor can be made on the device, and comes back."""
    import torch

    expect(str(device.torch_device).split(":")[0] == device.info.torch_device.split(":")[0], "another torch device")
    there = torch.arange(1000, device=device.torch_device)
    expect(there.device == device.torch_device, f"a tensor made there lies on {there.device}")
    expect(torch.equal(there.cpu(), torch.arange(1000)), "a tensor comes back with other values")
    return f"{device.because}; changes: {', '.join(map(str, device.changes)) or 'none'}"


def memory_stats(device: Device) -> str:
    """Statistics are None or a number of bytes, and each number names its source."""
    stats = device.memory.stats()
    numbers = {f.name: getattr(stats, f.name) for f in fields(stats) if f.name != "sources"}
    for name, value in numbers.items():
        expect(value is None or (type(value) is int and value >= 0), f"{name} is {value!r}")
        expect((value is None) == (not stats.sources.get(name)), f"{name} is {value}, source {stats.sources.get(name)}")
    known = [name for name, value in numbers.items() if value is not None]
    if not known:
        raise UnsupportedOperation("tells no statistic", device=device.info.id, what="memory.stats")
    return f"known: {', '.join(known)}"


def memory_allocated(device: Device) -> str:
    """A live tensor counts, and no longer when it is gone."""
    import torch

    before = device.memory.allocated()
    if before is None:
        raise UnsupportedOperation("does not count bytes in tensors", device=device.info.id, what="memory.allocated")
    tensor = torch.zeros(8 * MIB, dtype=torch.uint8, device=device.torch_device)
    during = device.memory.allocated() or 0
    expect(during - before >= 8 * MIB, f"a tensor of 8 MiB changed it by {during - before} bytes")
    del tensor
    after = device.memory.allocated()
    expect(after == before, f"it is {after} after the tensor is gone, and was {before}")
    return f"8 MiB counted as {during - before} bytes"


def memory_peak(device: Device) -> str:
    """The peak remembers a tensor that is gone, until it is reset."""
    import torch

    device.memory.reset_peak()
    before = device.memory.stats()
    which = "peak_allocated" if before.peak_allocated is not None else "peak_process"
    start = getattr(before, which)
    if start is None:
        raise UnsupportedOperation("keeps no peak", device=device.info.id, what="memory.reset_peak")
    size = 64 * MIB
    torch.ones(size, dtype=torch.uint8, device=device.torch_device).add_(1)
    risen = getattr(device.memory.stats(), which) - start
    # A resident set rises by less: the process may already hold free pages.
    expect(risen >= (size if which == "peak_allocated" else size // 2), f"{which} rose by {risen} bytes after {size}")
    device.memory.reset_peak()
    reset = getattr(device.memory.stats(), which)
    expect(reset < start + risen, f"{which} is {reset} after the reset, and was {start + risen}")
    return f"{which} rose by {risen // MIB} MiB and was reset"


def memory_limit(device: Device) -> str:
    """An allocation above the limit is refused, and works once the limit is lifted."""
    import torch

    total = device.memory.stats().total
    if total is None:
        raise UnsupportedOperation("does not tell its total memory", device=device.info.id, what="memory.limit")
    device.memory.limit(total // 2)
    try:
        with device.memory.catch_out_of_memory():
            torch.empty(total // 2 + 64 * MIB, dtype=torch.uint8, device=device.torch_device)
    except OutOfMemoryError:
        pass
    else:
        raise Failed("an allocation above the limit was allowed")
    finally:
        device.memory.limit(None)
    torch.zeros(MIB, device=device.torch_device)
    return "refused above the limit"


def out_of_memory(device: Device) -> str:
    """The vendor's out-of-memory error becomes ours, with the device and the statistics."""
    import torch

    try:
        with device.memory.catch_out_of_memory():
            torch.empty(2**52, dtype=torch.uint8, device=device.torch_device)
    except OutOfMemoryError as error:
        expect(error.device == device.info.id and error.stats is not None, "it lacks the device or the statistics")
        expect(error.__cause__ is not None, "the vendor's error is not its cause")
        return f"from {type(error.__cause__).__name__}"
    raise Failed("4 PiB were allocated")


def fp32_ieee(device: Device) -> str:
    """Float32 products keep all 24 bits; measured, not read back."""
    report = device.precision.fp32_mode("ieee")
    wrong = [f"{operation} keeps {bits} bits" for operation, bits in report.input_bits if bits != 24]
    expect(not wrong, ", ".join(wrong))
    return "measured: " + ", ".join(f"{operation} {bits} bits" for operation, bits in report.input_bits)


def fp32_reduced(device: Device) -> str:
    """A reduced mode is confirmed by measurement or refused with a reason."""
    confirmed = []
    reasons = []
    for mode in ("tf32", "bf16x3"):
        try:
            device.precision.fp32_mode(mode)
            confirmed.append(mode)
        except UnsupportedPrecision as error:
            reasons.append(f"{mode}: {error.reason}")
    if not confirmed:
        raise UnsupportedOperation("; ".join(reasons), device=device.info.id, what="precision.fp32_mode")
    return "; ".join([f"{', '.join(confirmed)} confirmed", *reasons])


def deterministic(device: Device) -> str:
    """Deterministic algorithms give the same bits twice."""
    import torch

    device.precision.deterministic()
    try:
        expect(torch.are_deterministic_algorithms_enabled(), "torch's switch is off afterwards")
        source = device.random.stream(1, "check").uniform(4096)
        index = device.random.stream(2, "check").bits(4096) % 16
        runs = [torch.zeros(16, device=device.torch_device).index_add(0, index, source).cpu() for _ in range(2)]
        expect(torch.equal(runs[0], runs[1]), "two runs of index_add differ")
    finally:
        device.precision.deterministic(False)
    expect(not torch.are_deterministic_algorithms_enabled(), "the switch stays on")
    return "index_add twice, the same bits"


def _drawn(device: Device) -> Any:
    import torch

    return torch.rand(1024, device=device.torch_device).cpu()


def random_seed(device: Device) -> str:
    """A seed repeats the numbers; another one gives others."""
    import torch

    draws = []
    for seed in (7, 7, 8):
        device.random.seed(seed)
        draws.append(_drawn(device))
    expect(torch.equal(draws[0], draws[1]), "one seed gave different numbers")
    expect(not torch.equal(draws[0], draws[2]), "two seeds gave the same numbers")
    return "repeatable"


def random_state(device: Device) -> str:
    """A state that is put back repeats the numbers."""
    import torch

    state = device.random.get_state()
    expect(state.device.type == "cpu" and state.dtype == torch.uint8, f"the state is {state.dtype} on {state.device}")
    first, second = _drawn(device), _drawn(device)
    device.random.set_state(state)
    expect(torch.equal(_drawn(device), first), "the numbers differ after the state was put back")
    expect(not torch.equal(first, second), "the generator repeats itself")
    return "round trip"


def random_portable(device: Device) -> str:
    """Portable streams have the bits of every other device."""
    import numpy as np

    for draw in ("bits", "uniform", "normal"):
        there = getattr(device.random.stream(3, "check"), draw)(1000).cpu().numpy()
        here = getattr(philox, draw)(3, "check", 1000)
        expect(np.array_equal(there.astype(here.dtype), here), f"{draw} differs from the host's")
    return "bits, uniform, normal equal the host's"


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


def collectives(device: Device) -> str:
    """A group of one can be started on the device's library, and sums."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        store = (Path(folder) / "store").as_uri()
        try:
            group = device.collectives.init(rank=0, world_size=1, init_method=store, timeout_s=60.0)
        except CollectiveError as error:
            raise Failed(f"{device.collectives.library} could not be started: {error.message}") from error
        try:
            tensor = torch.arange(5.0, device=device.torch_device)
            group.all_reduce(tensor)
            expect(torch.equal(tensor.cpu(), torch.arange(5.0)), "the sum over one rank changed the tensor")
            group.barrier()
        finally:
            group.close()
    return f"{device.collectives.library}: all_reduce and barrier over one rank"


def contract(device: Device) -> str:
    """The declared arithmetic can be written down and read back, and says where it comes from."""
    from hal.contract import Contract

    declared = device.contract
    expect(Contract.from_json(json.loads(json.dumps(declared.as_json()))) == declared, "it changes through JSON")
    expect(declared.evidence, "it says nothing of where it comes from")
    return declared.evidence


# Closed ---------------------------------------------------------------------------------------------------------


def refuses(device: Device, before: dict[str, object]) -> str:
    """A closed device says so, and closing twice is harmless."""
    device.close()
    for call in (device.synchronize, device.stream, device.event):
        try:
            call()
        except DeviceClosed:
            continue
        raise Failed(f"{call.__name__}() works after close()")
    return "DeviceClosed"


def restores(device: Device, before: dict[str, object]) -> str:
    """Everything that opening and using it changed is as it was."""
    after = process_state()
    left = [f"{what} was {before.get(what)!r}, is {now!r}" for what, now in after.items() if before.get(what) != now]
    left += [f"{what} is gone" for what in before if what not in after]
    expect(not left, "; ".join(left))
    expect(not list(device.changes), f"still held: {', '.join(map(str, device.changes))}")
    return "environment and torch's switches as before"


BEFORE_OPEN: dict[str, Callable[[Backend], str]] = {
    "discover.facts": facts,
    "discover.repeatable": repeatable,
    "discover.cheap": cheap,
}
OPENED: dict[str, Callable[[Device], str]] = {
    "open": opened,
    "memory.stats": memory_stats,
    "memory.allocated": memory_allocated,
    "memory.peak": memory_peak,
    "memory.limit": memory_limit,
    "memory.out_of_memory": out_of_memory,
    "precision.ieee": fp32_ieee,
    "precision.reduced": fp32_reduced,
    "precision.deterministic": deterministic,
    "random.seed": random_seed,
    "random.state": random_state,
    "random.portable": random_portable,
    "synchronize": synchronize,
    "streams": streams,
    "support": support,
    "prepare": prepare,
    "collectives": collectives,
    "contract": contract,
}
CLOSED: dict[str, Callable[[Device, dict[str, object]], str]] = {
    "close.refuses": refuses,
    "close.restores": restores,
}
PARTS = (*BEFORE_OPEN, *OPENED, *CLOSED)
