# SPDX-License-Identifier: Apache-2.0
"""The memory of an opened device: each number against what was allocated."""

from __future__ import annotations

from dataclasses import fields

from hal.check.checks.expect import Failed, expect
from hal.device import Device
from hal.errors import OutOfMemoryError, UnsupportedOperation

MIB = 2**20


def stats(device: Device) -> str:
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


def allocated(device: Device) -> str:
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


def peak(device: Device) -> str:
    """The peak remembers a tensor that is gone, until it is reset."""
    import torch

    device.memory.reset_peak()
    before = device.memory.stats()
    which = "peak_allocated" if before.peak_allocated is not None else "peak_process"
    start = getattr(before, which)
    expect(start is not None, "reset_peak() claims to have reset a peak, and stats() tells none")
    size = 64 * MIB
    torch.ones(size, dtype=torch.uint8, device=device.torch_device).add_(1)
    risen = getattr(device.memory.stats(), which) - start
    # A resident set rises by less: the process may already hold free pages.
    expect(risen >= (size if which == "peak_allocated" else size // 2), f"{which} rose by {risen} bytes after {size}")
    device.memory.reset_peak()
    reset = getattr(device.memory.stats(), which)
    expect(reset < start + risen, f"{which} is {reset} after the reset, and was {start + risen}")
    return f"{which} rose by {risen // MIB} MiB and was reset"


def empty_cache(device: Device) -> str:
    """What holds no tensor goes back to the driver, and what holds one stays as it is."""
    import torch

    kept = torch.arange(1000, device=device.torch_device)
    large = torch.zeros(64 * MIB, dtype=torch.uint8, device=device.torch_device)
    device.synchronize()
    held = device.memory.stats().reserved
    del large
    device.memory.empty_cache()
    now = device.memory.stats()
    expect(torch.equal(kept.cpu(), torch.arange(1000)), "a live tensor lost its values")
    if held is not None and now.reserved is not None:
        given = held - now.reserved
        expect(given >= 64 * MIB, f"of {held} reserved bytes {given} were given back after 64 MiB were freed")
        return f"{given // MIB} MiB given back"
    # Nothing shows whether anything happened. Only where memory is the process's own is there nothing to give back.
    expect(now.process is not None, "it claims to have emptied a cache, and stats() does not tell what is reserved")
    return "the device has no pool of its own; live tensors keep their values"


def limit(device: Device) -> str:
    """An allocation above the limit is refused, and works once the limit is lifted."""
    import torch

    total = device.memory.stats().total
    most = 1024 * MIB if total is None else total // 2
    device.memory.limit(most)
    try:
        with device.memory.catch_out_of_memory():
            torch.empty(most + 64 * MIB, dtype=torch.uint8, device=device.torch_device)
    except OutOfMemoryError:
        pass
    else:
        raise Failed("an allocation above the limit was allowed")
    finally:
        device.memory.limit(None)
    torch.zeros(MIB, device=device.torch_device)
    return "refused above the limit"


def snapshot(device: Device) -> str:
    """The allocator's segments hold at least what a live tensor needs."""
    import torch

    tensor = torch.zeros(8 * MIB, dtype=torch.uint8, device=device.torch_device)
    segments = device.memory.snapshot()
    expect(isinstance(segments, list) and segments, f"{segments!r}, although a tensor is alive")
    expect(all(isinstance(segment, dict) for segment in segments), "a segment is no dict")
    # Where the segments have the form that torch's own allocators share, they are large enough.
    sizes = [segment["total_size"] for segment in segments if isinstance(segment.get("total_size"), int)]
    if len(sizes) == len(segments):
        expect(sum(sizes) >= tensor.nbytes, f"segments of {sum(sizes)} bytes hold a tensor of {tensor.nbytes}")
    return f"{len(segments)} segments"


def pin(device: Device) -> str:
    """A pinned copy is page-locked, has the same values, and arrives on the device."""
    import torch

    tensor = torch.arange(1000)
    pinned = device.memory.pin(tensor)
    expect(isinstance(pinned, torch.Tensor), f"pin() returned a {type(pinned).__name__}")
    shared = pinned is tensor and device.torch_device.type == "cpu"
    expect(shared or pinned.is_pinned(), "what pin() returned is not page-locked")
    there = pinned.to(device.torch_device, non_blocking=True)
    device.synchronize()
    expect(torch.equal(pinned, tensor) and torch.equal(there.cpu(), tensor), "a pinned copy has other values")
    return "the tensor itself, in the memory that device and host share" if shared else "page-locked, copied, equal"


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
