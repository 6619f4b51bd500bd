# SPDX-License-Identifier: Apache-2.0
"""Works of torch.distributed that answer as NCCL's do, where gloo stands in for it.

A future of NCCL's is complete as soon as its work is launched, so that callbacks run at once, in the thread that adds
them and in the order in which every rank does. Gloo's run in threads of its own, in any order: two ranks whose
callbacks begin collectives then wait for each other (PowerSGD's hook of DDP's), some kinds have no future, and that of
`all_gather` holds other tensors. Here whoever asks a work for its future waits for it: all ranks ask in one order.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from hal.launch.awaited import when_loaded
from hal.launch.patches import Patches

if TYPE_CHECKING:
    import torch

_results: weakref.WeakKeyDictionary[Any, Callable[[], list[torch.Tensor]]] = weakref.WeakKeyDictionary()
"""What NCCL's future of a work holds, where gloo's holds something else, or is none."""
_silent: weakref.WeakSet[Any] = weakref.WeakSet()
"""Works that are done only when somebody has waited for them."""

_GATHERS = ("_allgather_base", "all_gather_single", "allgather_into_tensor_coalesced", "all_gather_single_coalesced")
_SCATTERS = (
    "reduce_scatter", "_reduce_scatter_base", "reduce_scatter_single", "reduce_scatter_tensor_coalesced",
    "reduce_scatter_single_coalesced",
)  # fmt: skip
"""Methods of a process group, whose first argument is the output, or a list of them."""


def install(patches: Patches) -> None:
    """Let works answer as NCCL's do, torch's own callers among others: hooks of DDP's ask for futures, too."""
    when_loaded("torch.distributed.distributed_c10d", "Work", functools.partial(_let_works_answer, patches))
    when_loaded("torch.distributed.distributed_c10d", "ProcessGroup", functools.partial(_take_note, patches))


def _take_note(patches: Patches, group: Any) -> None:
    import torch

    def stacked(outputs: list[Any]) -> list[torch.Tensor]:
        parts = outputs if isinstance(outputs[0], torch.Tensor) else outputs[0]  # of this rank's only device
        alike = all(part.shape == parts[0].shape for part in parts)
        return [torch.stack(parts)] if alike else parts

    for names, result in (
        (("allgather",), stacked),
        ((*_GATHERS, *_SCATTERS), lambda outputs: [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)),
    ):
        for name in names:
            own = getattr(group, name, None)  # versions of torch differ
            if own is not None:
                patches.set(group, name, _noted(own, result, silent=name in _SCATTERS))


def _noted(own: Callable[..., Any], result: Callable[[Any], list[torch.Tensor]], *, silent: bool) -> Callable[..., Any]:
    @functools.wraps(own)
    def call(group: Any, *args: Any, **kwargs: Any) -> Any:
        work = own(group, *args, **kwargs)
        if work is not None:
            outputs = args[0] if args else next(x for name, x in kwargs.items() if name.startswith("out"))
            _results[work] = functools.partial(result, outputs)
            if silent:
                _silent.add(work)
        return work

    return call


def _let_works_answer(patches: Patches, kind: Any) -> None:
    from torch.futures import Future

    own_future, own_is_completed = kind.get_future, kind.is_completed

    def get_future(work: Any) -> Any:
        result = _results.get(work)
        if result is None:
            found = own_future(work)
            with contextlib.suppress(RuntimeError):  # which the future has, too
                work.wait()
            return found
        return _settled(Future(), work, result)

    def is_completed(work: Any) -> bool:
        if work in _silent:
            with contextlib.suppress(RuntimeError):
                work.wait()
            return True
        return bool(own_is_completed(work))

    def synchronize(work: Any) -> None:
        work.wait()  # there is no stream to wait in its place

    for function in (get_future, is_completed, synchronize):
        patches.set(kind, function.__name__, functools.wraps(getattr(kind, function.__name__))(function))
    if hasattr(kind, "block_current_stream"):
        patches.set(kind, "block_current_stream", functools.wraps(kind.block_current_stream)(synchronize))


def _settled(future: Any, work: Any, result: Callable[[], list[torch.Tensor]]) -> Any:
    try:
        work.wait()
    except RuntimeError as error:  # torch's own of every kind, timeouts included
        future.set_exception(error)
    else:
        future.set_result(result())
    return future


def together(works: Sequence[Any], result: list[torch.Tensor]) -> Any:
    """Return several works as one.

    Args:
        works: of the same group.
        result: the tensors that hold the result in the end.
    """
    from torch._C._distributed_c10d import Work
    from torch.futures import Future

    class Several(Work):
        def wait(self, *args: Any, **kwargs: Any) -> bool:
            with contextlib.ExitStack() as all_of_them:  # whatever one of them raises
                for work in works:
                    all_of_them.callback(work.wait, *args, **kwargs)
            return True

        def is_completed(self) -> bool:
            return all(work.is_completed() for work in works)

        def is_success(self) -> bool:
            return all(work.is_success() for work in works)

        def exception(self) -> Any:
            return next(filter(None, (work.exception() for work in works)), None)

        def result(self) -> list[torch.Tensor]:
            return result

        def get_future(self) -> Any:
            return _settled(Future(), self, lambda: result)

    return Several()
