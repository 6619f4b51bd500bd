# SPDX-License-Identifier: Apache-2.0
"""Collectives of one device: the vendor's library through torch.distributed, with typed errors.

Tensors are changed in place or written to the given output, as in torch.distributed. Which dtypes and reductions
work is the library's affair for now; a refusal is a `CollectiveError` that names operation and rank.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal, final

from hal.errors import CollectiveError, CollectiveTimeout, ConfigError, UnsupportedOperation

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

Reduction = Literal["sum", "avg", "min", "max", "product"]


@final
class Collectives:
    """Starts process groups on the library that belongs to one device.

    Args:
        device_id: for messages.
        torch_device: this rank's device.
        library: the library's own name, for people.
        torch_name: the name by which torch.distributed knows it.
    """

    def __init__(self, device_id: str, torch_device: torch.device, library: str, torch_name: str) -> None:
        self.device_id = device_id
        self.torch_device = torch_device
        self.library = library
        self.torch_name = torch_name

    def init(
        self,
        *,
        rank: int | None = None,
        world_size: int | None = None,
        init_method: str | None = None,
        timeout_s: float = 600.0,
    ) -> Group:
        """Join the default process group, or start it.

        Args:
            rank, world_size, init_method: as in `torch.distributed.init_process_group`; by default they come
                from the environment that torchrun sets.
            timeout_s: seconds after which a collective that has not completed is an error.

        Returns:
            The group of all ranks. `close()` ends it if this call started it.

        Raises:
            CollectiveError: torch was built without distributed support or without this library, the default
                group runs on another library, or the group could not be started.
            UnsupportedOperation: the library does not serve this type of device.
            ConfigError: rank and world size are given by halves.
        """
        import torch.distributed as dist

        if not dist.is_available():
            raise CollectiveError("this build of torch has no torch.distributed", operation="init")
        if (rank is None) != (world_size is None):
            raise ConfigError(f"{self.device_id}: rank={rank} and world_size={world_size}", expected="both, or neither")
        served = dist.Backend.backend_capability.get(self.torch_name)
        if served is not None and self.torch_device.type not in served:
            raise UnsupportedOperation(
                f"{self.library} serves {', '.join(served)}, not {self.torch_device.type}", device=self.device_id,
                what="collectives", hint="the backend names the device's own library in `library`",
            )  # fmt: skip
        if dist.is_initialized():
            running = dist.get_backend()
            # A group may serve several device types: "cpu:one,cuda:two". An undecided one takes the default.
            parts = {part.rpartition(":")[2] for part in running.split(",")}
            if running != "undefined" and self.torch_name not in parts:
                raise CollectiveError(
                    f"the default group runs on {running}", operation="init", rank=dist.get_rank(),
                    expected=f"{self.torch_name}, the library of {self.device_id}",
                    hint="init_process_group without a backend name, or destroy_process_group() first",
                )  # fmt: skip
            return Group(self.device_id, self.torch_device, None, owned=False)
        try:
            with _typed_errors("init", rank):
                dist.init_process_group(
                    self.torch_name,
                    init_method=init_method,
                    rank=-1 if rank is None else rank,
                    world_size=-1 if world_size is None else world_size,
                    timeout=datetime.timedelta(seconds=timeout_s),
                )
        except (ValueError, AssertionError) as error:  # missing environment, library not built in
            raise CollectiveError(
                str(error), operation="init", rank=rank, hint=f"is {self.library} part of this torch?"
            ) from error
        return Group(self.device_id, self.torch_device, None, owned=True)


@final
class Group:
    """The ranks that take part in a collective. Every rank must call the same operations in the same order.

    Args:
        device_id: for messages.
        torch_device: where this rank's tensors must lie.
        raw: a `torch.distributed.ProcessGroup`, or None for the default one.
        owned: whether `close()` ends it.
    """

    def __init__(
        self, device_id: str, torch_device: torch.device, raw: dist.ProcessGroup | None, *, owned: bool
    ) -> None:
        import torch.distributed as dist

        self.device_id = device_id
        self.torch_device = torch_device
        self.raw = raw
        self._owned = owned
        self.rank = dist.get_rank(raw)
        self.size = dist.get_world_size(raw)

    def _errors(self, operation: str, *tensors: torch.Tensor) -> contextlib.AbstractContextManager[None]:
        for tensor in tensors:
            if tensor.device.type != self.torch_device.type:
                raise CollectiveError(
                    f"a tensor lies on {tensor.device}", operation=operation, rank=self.rank,
                    expected=f"tensors on {self.torch_device}",
                )  # fmt: skip
        return _typed_errors(operation, self.rank)

    def all_reduce(self, tensor: torch.Tensor, reduction: Reduction = "sum") -> None:
        """Reduce over all ranks, in place; every rank gets the result."""
        import torch.distributed as dist

        with self._errors("all_reduce", tensor):
            dist.all_reduce(tensor, _reduce_op(reduction), group=self.raw)

    def reduce(self, tensor: torch.Tensor, root: int, reduction: Reduction = "sum") -> None:
        """Reduce over all ranks into `root`'s tensor; the others' contents are undefined afterwards."""
        import torch.distributed as dist

        with self._errors("reduce", tensor):
            dist.reduce(tensor, self._global(root), _reduce_op(reduction), group=self.raw)

    def broadcast(self, tensor: torch.Tensor, root: int) -> None:
        """Copy `root`'s tensor into everyone's."""
        import torch.distributed as dist

        with self._errors("broadcast", tensor):
            dist.broadcast(tensor, self._global(root), group=self.raw)

    def all_gather(self, output: torch.Tensor, tensor: torch.Tensor) -> None:
        """Write every rank's `tensor`, [n, ...], into `output`, [size * n, ...], in rank order."""
        import torch.distributed as dist

        with self._errors("all_gather", output, tensor):
            dist.all_gather_into_tensor(output, tensor, group=self.raw)

    def reduce_scatter(self, output: torch.Tensor, tensor: torch.Tensor, reduction: Reduction = "sum") -> None:
        """Reduce `tensor`, [size * n, ...], and write this rank's part into `output`, [n, ...]."""
        import torch.distributed as dist

        with self._errors("reduce_scatter", output, tensor):
            dist.reduce_scatter_tensor(output, tensor, _reduce_op(reduction), group=self.raw)

    def all_to_all(
        self,
        output: torch.Tensor,
        tensor: torch.Tensor,
        output_splits: Sequence[int] | None = None,
        input_splits: Sequence[int] | None = None,
    ) -> None:
        """Send rows of `tensor` to each rank and receive theirs into `output`.

        Args:
            output, tensor: [rows, ...].
            output_splits, input_splits: rows from and to each rank, zero included; None: equal parts.
        """
        import torch.distributed as dist

        with self._errors("all_to_all", output, tensor):
            dist.all_to_all_single(
                output,
                tensor,
                None if output_splits is None else list(output_splits),
                None if input_splits is None else list(input_splits),
                group=self.raw,
            )

    def send(self, tensor: torch.Tensor, to: int, tag: int = 0) -> None:
        """Send a tensor to one rank; returns when the tensor may be changed again."""
        import torch.distributed as dist

        with self._errors("send", tensor):
            dist.send(tensor, self._global(to), group=self.raw, tag=tag)

    def recv(self, tensor: torch.Tensor, source: int, tag: int = 0) -> None:
        """Receive a tensor from one rank, in place."""
        import torch.distributed as dist

        with self._errors("recv", tensor):
            dist.recv(tensor, self._global(source), group=self.raw, tag=tag)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        import torch.distributed as dist

        with self._errors("barrier"):
            dist.barrier(group=self.raw)

    def close(self) -> None:
        """End the group if `init()` started it; harmless the second time."""
        import torch.distributed as dist

        if self._owned and dist.is_initialized():
            dist.destroy_process_group(self.raw)
        self._owned = False

    def _global(self, rank: int) -> int:
        import torch.distributed as dist

        if not 0 <= rank < self.size:
            raise CollectiveError(
                f"there is no rank {rank}", operation="rank", rank=self.rank, expected=f"0 to {self.size - 1}"
            )
        return rank if self.raw is None else dist.get_global_rank(self.raw, rank)


def _reduce_op(reduction: Reduction) -> dist.ReduceOp.RedOpType:
    import torch.distributed as dist

    operations = {
        "sum": dist.ReduceOp.SUM,
        "avg": dist.ReduceOp.AVG,
        "min": dist.ReduceOp.MIN,
        "max": dist.ReduceOp.MAX,
        "product": dist.ReduceOp.PRODUCT,
    }
    if reduction not in operations:
        raise ConfigError(f"no reduction {reduction!r}", expected=", ".join(operations))
    return operations[reduction]


@contextlib.contextmanager
def _typed_errors(operation: str, rank: int | None) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        # The libraries share no exception type for this; all of them say so in words.
        kind = CollectiveTimeout if "timed out" in text.lower() or "timeout" in text.lower() else CollectiveError
        raise kind(
            text.strip().splitlines()[0] if text.strip() else "failed", operation=operation, rank=rank
        ) from error
