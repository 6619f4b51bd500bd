# SPDX-License-Identifier: Apache-2.0
"""torch.cuda.comm: copies and sums among the devices of one process, by moves of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hal.launch.api import api, refused
from hal.launch.redirection import Redirection

if TYPE_CHECKING:
    import torch


def _names(name: str) -> tuple[str, str]:
    return f"torch.cuda.comm.{name}", f"torch.nn.parallel.comm.{name}"


def _copied(r: Redirection, tensor: torch.Tensor, device: Any) -> torch.Tensor:
    """Return a copy on a device, or on the host: none shares memory with the source."""
    if r.is_host(device):
        copy = tensor.to("cpu", copy=True)
        return copy if r.hosts is None else r.hosts.add(copy)
    copy = tensor.to(r.translate(device), copy=True)
    return copy if r.hosts is None else r.hosts.add_device(copy)


def _indices(r: Redirection, devices: Sequence[Any]) -> list[int]:
    found = [r.index(device) for device in devices]
    if not found or None in found:
        raise RuntimeError(f"CUDA devices are expected, and not {list(devices)}")
    return [index for index in found if index is not None]


def _only_one(**given: Any) -> None:
    if sum(value is not None for value in given.values()) != 1:
        names, values = " and ".join(map(repr, given)), ", ".join(f"{key}={value}" for key, value in given.items())
        raise RuntimeError(f"Exactly one of {names} must be specified, but got {values}")


@api(*_names("broadcast"), verdict="emulated")
def broadcast(
    r: Redirection, tensor: torch.Tensor, devices: Sequence[Any] | None = None, *,
    out: Sequence[torch.Tensor] | None = None,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """A copy on each device; or into each of `out`."""
    _only_one(devices=devices, out=out)
    if devices is not None:
        return tuple(_copied(r, tensor, index) for index in _indices(r, devices))
    assert out is not None
    for target in out:
        target.copy_(tensor)
    return tuple(out)


@api(*_names("broadcast_coalesced"), verdict="emulated")
def broadcast_coalesced(
    r: Redirection, tensors: Sequence[torch.Tensor], devices: Sequence[Any], buffer_size: int = 10485760
) -> list[list[torch.Tensor]]:
    """Copies of all tensors, a list for each device."""
    return [[_copied(r, tensor, index) for tensor in tensors] for index in _indices(r, devices)]


@api(*_names("reduce_add"), verdict="emulated")
def reduce_add(r: Redirection, inputs: Sequence[torch.Tensor], destination: Any = None) -> torch.Tensor:
    """The sum, in the order of the inputs, on one device."""
    for position, tensor in enumerate(inputs):
        if tensor.size() != inputs[0].size():
            got, expected = ("x".join(map(str, t.size())) for t in (tensor, inputs[0]))
            raise ValueError(f"input {position} has invalid size: got {got}, but expected {expected}")
    if len(inputs) == 1:
        return inputs[0]  # as torch does
    target = r.targets[_indices(r, [destination])[0]]
    result = inputs[0].to(target) + inputs[1].to(target)
    for tensor in inputs[2:]:
        result.add_(tensor.to(target))
    return result


@api(*_names("reduce_add_coalesced"), verdict="emulated")
def reduce_add_coalesced(
    r: Redirection, inputs: Sequence[Sequence[torch.Tensor]], destination: Any = None, buffer_size: int = 10485760
) -> tuple[torch.Tensor, ...]:
    """The sums of what stands at one place in every list."""
    return tuple(reduce_add(r, tensors, destination) for tensors in zip(*inputs, strict=True))


@api(*_names("scatter"), verdict="emulated")
def scatter(
    r: Redirection, tensor: torch.Tensor, devices: Sequence[Any] | None = None,
    chunk_sizes: Sequence[int] | None = None, dim: int = 0, streams: Any = None, *,
    out: Sequence[torch.Tensor] | None = None,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """A piece on each device; or into each of `out`."""
    _only_one(devices=devices, out=out)
    if devices is not None:
        indices = _indices(r, devices)
        parts = tensor.chunk(len(indices), dim) if chunk_sizes is None else tensor.split(list(chunk_sizes), dim)
        return tuple(_copied(r, part, index) for part, index in zip(parts, indices, strict=False))
    assert out is not None
    if chunk_sizes is not None:
        raise RuntimeError(f"'chunk_sizes' must not be specified when 'out' is specified, but got {chunk_sizes=}")
    for target, part in zip(out, tensor.split([target.size(dim) for target in out], dim), strict=True):
        target.copy_(part)
    return tuple(out)


@api(*_names("gather"), verdict="emulated")
def gather(
    r: Redirection, tensors: Sequence[torch.Tensor], dim: int = 0, destination: Any = None, *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """All pieces in one, on one device or on the host; or in `out`."""
    import torch

    if out is not None:
        _only_one(destination=destination, out=out)
    host = r.is_host(destination) or destination == -1
    target = torch.device("cpu") if host else r.targets[_indices(r, [destination])[0]]
    whole = torch.cat([tensor.to(target if out is None else out.device) for tensor in tensors], dim)
    if out is not None:
        return out.copy_(whole)
    if r.hosts is not None:
        return r.hosts.add(whole) if host else r.hosts.add_device(whole)
    return whole


refused(
    *(f"torch.cuda.nccl.{name}" for name in ("all_reduce", "reduce", "broadcast", "all_gather", "reduce_scatter")),
    why="it calls NCCL itself, for several GPUs of one process", hint="torch.distributed, or torch.cuda.comm",
)  # fmt: skip
