# SPDX-License-Identifier: Apache-2.0
"""The collectives of an opened device, over a group of one rank: not every device can be shared by a second process.

With one rank every result is known. Each output starts with other values, so that an operation that does nothing shows;
sending and receiving need a second rank, and are left to the conformance suite.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from hal.check.checks.expect import Failed, expect
from hal.device import Device
from hal.errors import CollectiveError, Unsupported

if TYPE_CHECKING:
    import torch

    from hal.group import Group

# What each does to (output, tensor). Those without an output change the tensor, and over one rank must not.
_OPERATIONS: dict[str, Callable[[Group, torch.Tensor, torch.Tensor], object]] = {
    "all_reduce": lambda group, output, tensor: group.all_reduce(output.copy_(tensor)),
    "reduce": lambda group, output, tensor: group.reduce(output.copy_(tensor), 0),
    "broadcast": lambda group, output, tensor: group.broadcast(output.copy_(tensor), 0),
    "all_gather": lambda group, output, tensor: group.all_gather(output, tensor),
    "reduce_scatter": lambda group, output, tensor: group.reduce_scatter(output, tensor),
    "all_to_all": lambda group, output, tensor: group.all_to_all(output, tensor),
    "all_to_all with splits": lambda group, output, tensor: group.all_to_all(output, tensor, [6], [6]),
}


def collectives(device: Device) -> str:
    """A group of one can be started on the device's library, and each operation gives what it must, or is refused."""
    library = device.collectives.library
    with tempfile.TemporaryDirectory() as folder:
        store = (Path(folder) / "store").as_uri()
        try:
            group = device.collectives.init(rank=0, world_size=1, init_method=store, timeout_s=60.0)
        except CollectiveError as error:
            raise Failed(f"{library} could not be started: {error.message}") from error
        try:
            expect((group.rank, group.size) == (0, 1), f"rank {group.rank} of {group.size} in a group of one")
            refused = [reason for name in _OPERATIONS if (reason := _refusal(device, group, name)) is not None]
            group.barrier()
        finally:
            group.close()
    worked = len(_OPERATIONS) + 1 - len(refused)
    expect(worked > 1, f"{library} refuses every operation: {'; '.join(refused)}")
    return "; ".join([f"{library}: {worked} operations over one rank", *refused])


def _refusal(device: Device, group: Group, name: str) -> str | None:
    """Try one operation; return why the library refuses it, or None."""
    import torch

    tensor = torch.arange(1.0, 7.0, device=device.torch_device)
    output = torch.zeros(6, device=device.torch_device)
    try:
        _OPERATIONS[name](group, output, tensor)
    except (CollectiveError, Unsupported) as error:
        return f"refuses {error.message}"
    expect(torch.equal(output.cpu(), torch.arange(1.0, 7.0)), f"{name} over one rank gives {output.cpu().tolist()}")
    expect(torch.equal(tensor.cpu(), torch.arange(1.0, 7.0)), f"{name} changed its input")
    return None
