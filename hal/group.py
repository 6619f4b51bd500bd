# SPDX-License-Identifier: Apache-2.0
"""A group of ranks and its collectives, with typed errors.

Tensors are changed in place or written to the given output, as in torch.distributed. Which dtypes and reductions
work is the library's affair for now; a refusal is a `CollectiveError` that names operation and rank.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal, final

from hal.errors import CollectiveError, CollectiveTimeout, ConfigError, HalError

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

    from hal.facet import Facet

Reduction = Literal["sum", "avg", "min", "max", "product"]


@final
class Group:
    """The ranks that take part in a collective. Every rank must call the same operations in the same order.

    Every operation raises `CollectiveError` where the library refuses it or the group has ended, `CollectiveTimeout`
    where another rank did not come in time, and `DeviceClosed` once the device is closed.

    Args:
        facet: that of this rank's device which started it.
        device: where tensors have to lie.
        bound: the device that the library is bound to, if any.
        raw: a `torch.distributed.ProcessGroup`, or None for the default one.
        owned: whether `close()` ends it.
    """

    def __init__(
        self, facet: Facet, device: torch.device, bound: torch.device | None, raw: dist.ProcessGroup | None, *,
        owned: bool,
    ) -> None:  # fmt: skip
        import torch.distributed as dist

        self.raw = raw
        self._facet, self._device, self._bound = facet, device, bound
        self._owned = owned
        self._closed = False
        self._default = dist.group.WORLD
        self.rank = dist.get_rank(raw)
        self.size = dist.get_world_size(raw)

    def _errors(self, operation: str, *tensors: torch.Tensor) -> contextlib.AbstractContextManager[None]:
        """Check that an operation can begin, and return the context in which the library is called."""
        import torch
        import torch.distributed as dist

        self._facet.check_open()
        if self._closed or dist.group.WORLD is not self._default:
            ended = "closed" if self._closed else "ended elsewhere"
            raise CollectiveError(f"the group was {ended}", operation=operation, rank=self.rank, hint="init() anew")
        device = self._device
        for tensor in tensors:
            if not isinstance(tensor, torch.Tensor):
                raise CollectiveError(
                    f"a {type(tensor).__name__} is no tensor", operation=operation, rank=self.rank,
                    expected=f"tensors on {device}",
                )  # fmt: skip
            if tensor.device.type != device.type or device.index not in (None, tensor.device.index):
                raise CollectiveError(
                    f"a tensor lies on {tensor.device}", operation=operation, rank=self.rank,
                    expected=f"tensors on {device}",
                )  # fmt: skip
        return library_errors(operation, self.rank)

    def all_reduce(self, tensor: torch.Tensor, reduction: Reduction = "sum") -> None:
        """Reduce over all ranks, in place; every rank gets the result."""
        import torch.distributed as dist

        with self._errors("all_reduce", tensor):
            dist.all_reduce(tensor, _reduce_op(reduction), group=self.raw)

    def reduce(self, tensor: torch.Tensor, root: int, reduction: Reduction = "sum") -> None:
        """Reduce over all ranks into `root`'s tensor; the others' contents are undefined afterwards."""
        import torch.distributed as dist

        with self._errors("reduce", tensor):
            dist.reduce(tensor, self._global("reduce", root), _reduce_op(reduction), group=self.raw)

    def broadcast(self, tensor: torch.Tensor, root: int) -> None:
        """Copy `root`'s tensor into everyone's."""
        import torch.distributed as dist

        with self._errors("broadcast", tensor):
            dist.broadcast(tensor, self._global("broadcast", root), group=self.raw)

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
            dist.send(tensor, self._global("send", to), group=self.raw, tag=tag)

    def recv(self, tensor: torch.Tensor, source: int, tag: int = 0) -> None:
        """Receive a tensor from one rank, in place."""
        import torch.distributed as dist

        with self._errors("recv", tensor):
            dist.recv(tensor, self._global("recv", source), group=self.raw, tag=tag)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        import torch.distributed as dist

        # Without a device, a group that was not bound to one may take another of this process.
        with self._errors("barrier"):
            dist.barrier(group=self.raw, device_ids=None if self._bound is None else [self._bound.index])

    def close(self) -> None:
        """End the group if `init()` started it; this object refuses to work in any case. Harmless the second time."""
        import torch.distributed as dist

        if self._owned and not self._closed and dist.group.WORLD is self._default:
            dist.destroy_process_group(self.raw)
        self._closed = True

    def _global(self, operation: str, rank: int) -> int:
        import torch.distributed as dist

        if isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank < self.size:
            raise CollectiveError(
                f"there is no rank {rank!r}", operation=operation, rank=self.rank, expected=f"0 to {self.size - 1}"
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
    if not isinstance(reduction, str) or reduction not in operations:
        raise ConfigError(f"no reduction {reduction!r}", expected=", ".join(operations))
    return operations[reduction]


# The libraries share no exception type for this; all of them say so in words. A name with the word in it, such as
# that of an environment variable, says nothing.
_TIMED_OUT = re.compile(r"\btimed[ -]?out\b|\btime-?out\b", re.IGNORECASE)


@contextlib.contextmanager
def library_errors(operation: str, rank: int | None, hint: str = "") -> Iterator[None]:
    """Turn what a library raises inside the block into `CollectiveError`, or `CollectiveTimeout` where it says so."""
    try:
        yield
    except HalError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [f"failed with {type(error).__name__}"]
        # A ValueError or TypeError is torch's word for a wrong argument, which may be called a timeout.
        if _TIMED_OUT.search(str(error)) and not isinstance(error, (ValueError, TypeError)):
            raise CollectiveTimeout(lines[0], operation=operation, rank=rank) from error
        raise CollectiveError(lines[0], operation=operation, rank=rank, hint=hint) from error
