# SPDX-License-Identifier: Apache-2.0
"""Collectives of one device: the vendor's library through torch.distributed, with typed errors.

Tensors are changed in place or written to the given output, as in torch.distributed. Which dtypes and reductions
work is the library's affair for now; a refusal is a `CollectiveError` that names operation and rank.
"""

from __future__ import annotations

import contextlib
import datetime
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal, NoReturn, final

from hal.arguments import integer, number
from hal.errors import CollectiveError, CollectiveTimeout, ConfigError, HalError, UnsupportedOperation
from hal.facet import Facet

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

Reduction = Literal["sum", "avg", "min", "max", "product"]

DEFAULT_TIMEOUT_S = 600.0


@final
class Collectives(Facet):
    """Starts process groups on the library that belongs to one device.

    Args:
        device_id: for messages.
        torch_device: this rank's device.
        library: the library's own name, for people.
        torch_name: the name by which torch.distributed knows it.
    """

    def __init__(self, device_id: str, torch_device: torch.device, library: str, torch_name: str) -> None:
        super().__init__(device_id)
        self.torch_device = torch_device
        self.library = library
        self.torch_name = torch_name

    def init(
        self,
        *,
        rank: int | None = None,
        world_size: int | None = None,
        init_method: str | None = None,
        timeout_s: float | None = None,
    ) -> Group:
        """Join the default process group, or start it.

        A group that runs is joined as it is: what is asked for must be what it has. A group that is started is bound to
        this device, so that the library never takes another one of the same process.

        The group belongs to the process and not to the device: `Group.close()` ends it, `Device.close()` does not.
        Ending waits for the other ranks in some libraries, which must not hold up an error on its way out.

        Args:
            rank, world_size, init_method: as in `torch.distributed.init_process_group`; by default they come
                from the environment that torchrun sets.
            timeout_s: seconds after which a collective that has not completed is an error; by default 600, or
                what the running group has.

        Returns:
            The group of all ranks. `close()` ends it if this call started it.

        Raises:
            ConfigError: an argument is of the wrong type or out of range, or rank and world size are given by halves.
            CollectiveError: torch was built without distributed support or without this library, the group could
                not be started, or the running one differs from what was asked for.
            CollectiveTimeout: the other ranks did not come in time.
            UnsupportedOperation: the library does not serve this type of device.
            DeviceClosed: the device is closed.
        """
        import torch.distributed as dist

        self.check_open()
        self._check_arguments(rank, world_size, init_method, timeout_s)
        if not dist.is_available():
            raise CollectiveError("this build of torch has no torch.distributed", operation="init")
        served = dist.Backend.backend_capability.get(self.torch_name)
        if served is not None and self.torch_device.type not in served:
            raise UnsupportedOperation(
                f"{self.library} serves {', '.join(served)}, not {self.torch_device.type}", device=self.device_id,
                what="collectives", hint="the backend names the device's own library in `library`",
            )  # fmt: skip
        if dist.is_initialized():
            self._check_running(rank, world_size, init_method, timeout_s)
            return Group(self, None, owned=False)
        hint = f"torchrun sets the environment that init() reads; is {self.library} part of this torch?"
        with _typed_errors("init", rank, hint):
            dist.init_process_group(
                self.torch_name,
                init_method=init_method,
                rank=-1 if rank is None else rank,
                world_size=-1 if world_size is None else world_size,
                timeout=datetime.timedelta(seconds=DEFAULT_TIMEOUT_S if timeout_s is None else timeout_s),
                device_id=self.bound_device(),
            )
        return Group(self, None, owned=True)

    def bound_device(self) -> torch.device | None:
        """Return the device to which a group is bound; None for the host, to which there is no alternative."""
        import torch

        accelerator = torch.accelerator.current_accelerator()
        bound = accelerator is not None and accelerator.type == self.torch_device.type
        return self.torch_device if bound and self.torch_device.index is not None else None

    def _check_arguments(
        self, rank: int | None, world_size: int | None, init_method: str | None, timeout_s: float | None
    ) -> None:
        if (rank is None) != (world_size is None):
            raise ConfigError(f"{self.device_id}: rank={rank} and world_size={world_size}", expected="both, or neither")
        if rank is not None:
            world_size = integer(f"{self.device_id}: the world size", world_size, least=1)
            integer(f"{self.device_id}: the rank", rank, least=0, most=world_size - 1)
        if not (init_method is None or isinstance(init_method, str)):
            raise ConfigError(f"{self.device_id}: init_method is {init_method!r}", expected="a URL, or None")
        if timeout_s is not None:
            # torch counts in whole milliseconds, and a library may add it to a clock in nanoseconds.
            number(f"{self.device_id}: the timeout in seconds", timeout_s, least=1e-3, most=1e9)

    def _check_running(
        self, rank: int | None, world_size: int | None, init_method: str | None, timeout_s: float | None
    ) -> None:
        """Refuse to join the default group unless it is what was asked for."""
        import torch.distributed as dist

        running = dist.get_backend()
        # A group may serve several device types: "cpu:one,cuda:two". An undecided one takes the default.
        parts = {part.rpartition(":")[2] for part in running.split(",")}
        if running != "undefined" and self.torch_name not in parts:
            raise CollectiveError(
                f"the default group runs on {running}", operation="init", rank=dist.get_rank(),
                expected=f"{self.torch_name}, the library of {self.device_id}",
                hint="init_process_group without a backend name, or destroy_process_group() first",
            )  # fmt: skip
        if init_method is not None:
            self._refuse_running(f"init_method={init_method!r} only starts a group", "init_method")
        if rank is not None and (rank, world_size) != (dist.get_rank(), dist.get_world_size()):
            self._refuse_running(f"rank={rank} and world_size={world_size} were asked for", "rank and world_size")
        if timeout_s is not None:
            has = _running_timeout_s(self.torch_device)
            if has is None or abs(has - timeout_s) >= 1e-3:  # torch keeps whole milliseconds
                told = "does not tell its own" if has is None else f"has {has:g}"
                self._refuse_running(f"timeout_s={timeout_s:g} was asked for, and it {told}", "timeout_s")

    def _refuse_running(self, why: str, arguments: str) -> NoReturn:
        import torch.distributed as dist

        raise CollectiveError(
            f"the default group runs already, of {dist.get_world_size()} ranks: {why}", operation="init",
            rank=dist.get_rank(), hint=f"init() without {arguments} joins it as it is; destroy_process_group() ends it",
        )  # fmt: skip


def _running_timeout_s(device: torch.device) -> float | None:
    """Return the timeout of the default group's library for this type of device; None if it does not tell."""
    import torch.distributed as dist

    with contextlib.suppress(RuntimeError, AttributeError):
        timeout: datetime.timedelta = dist.group.WORLD._get_backend(device).options._timeout  # type: ignore[union-attr]
        return timeout.total_seconds()
    return None


@final
class Group:
    """The ranks that take part in a collective. Every rank must call the same operations in the same order.

    Every operation raises `CollectiveError` where the library refuses it or the group has ended, `CollectiveTimeout`
    where another rank did not come in time, and `DeviceClosed` once the device is closed.

    Args:
        collectives: the facet of this rank's device.
        raw: a `torch.distributed.ProcessGroup`, or None for the default one.
        owned: whether `close()` ends it.
    """

    def __init__(self, collectives: Collectives, raw: dist.ProcessGroup | None, *, owned: bool) -> None:
        import torch.distributed as dist

        self.raw = raw
        self._collectives = collectives
        self._owned = owned
        self._closed = False
        self._default = dist.group.WORLD
        self.rank = dist.get_rank(raw)
        self.size = dist.get_world_size(raw)

    def _errors(self, operation: str, *tensors: torch.Tensor) -> contextlib.AbstractContextManager[None]:
        """Check that an operation can begin, and return the context in which the library is called."""
        import torch
        import torch.distributed as dist

        self._collectives.check_open()
        if self._closed or dist.group.WORLD is not self._default:
            ended = "closed" if self._closed else "ended elsewhere"
            raise CollectiveError(f"the group was {ended}", operation=operation, rank=self.rank, hint="init() anew")
        device = self._collectives.torch_device
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
        bound = self._collectives.bound_device()
        with self._errors("barrier"):
            dist.barrier(group=self.raw, device_ids=None if bound is None else [bound.index])

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
def _typed_errors(operation: str, rank: int | None, hint: str = "") -> Iterator[None]:
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
