# SPDX-License-Identifier: Apache-2.0
"""Works of torch.distributed that answer as NCCL's do, where gloo's say not that they are done, and have no future."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch._C._distributed_c10d import Work
from torch.futures import Future

from hal.launch import gloo


class Works(Work):
    """Several works as one, and what is left to do when all of them are done.

    Whoever asks, asks all of them, and does the rest. What is no method of torch's class the last one answers.
    """

    def __init__(
        self, works: Sequence[Any], operands: Sequence[torch.Tensor], result: list[torch.Tensor],
        finish: Callable[[], None] | None = None,
    ) -> None:  # fmt: skip
        """Take works that know when they are done.

        Args:
            works: all of them.
            operands: what each of them works on.
            result: the tensors that hold the result in the end.
            finish: puts it there, once all works are done.
        """
        super().__init__()
        self._works = tuple(works)
        gloo.expect(self._works, operands)
        self._result = result
        self._finish = finish
        self._lock = threading.Lock()
        self._done = False
        self._error: BaseException | None = None
        self._future: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._works[-1], name)

    def wait(self, *args: Any, **kwargs: Any) -> bool:
        """Wait for all."""
        try:
            done = [work.wait(*args, **kwargs) for work in self._works]  # all of them, whatever the first one says
        except RuntimeError as error:  # torch's own of every kind, timeouts included
            self._end(error)
            raise
        self._end(None)
        if self._error is not None:
            raise self._error
        return all(done)

    def is_completed(self) -> bool:
        """Return whether all are done, and the result is in place."""
        if not self._done and all(work.is_completed() for work in self._works):
            self._end(next((error for error in (work.exception() for work in self._works) if error is not None), None))
        return self._done

    def is_success(self) -> bool:
        """Return whether nothing went wrong so far."""
        self.is_completed()
        return self._error is None

    def exception(self) -> Any:
        """Return what went wrong, or None."""
        self.is_completed()
        return self._error

    def result(self) -> list[torch.Tensor]:
        """Return the tensors that hold the result."""
        return self._result

    def get_future(self) -> Any:
        """Return a future of the result: callers go on, as they do with NCCL."""
        with self._lock:
            new = self._future is None
            if new:
                self._future = Future()
        if new:  # those of gloo's works would have Python's lock asked for by gloo's threads (`hal.launch.gloo`)
            gloo.poll(self.is_completed, self._settle)
        return self._future

    def _settle(self) -> None:
        if self._error is None:
            self._future.set_result(self._result)
        else:
            self._future.set_exception(self._error)

    def _end(self, error: BaseException | None) -> None:
        """Take note that all are done. Without an error the result is put in place, by the first who gets here."""
        with self._lock:
            if self._done:
                return
            if error is None and self._finish is not None:
                try:
                    with torch.no_grad():
                        self._finish()
                except RuntimeError as own:
                    error = own
            self._error = error
            self._done = True


class Watched(Work):
    """A work of which gloo says that it is done only to who waits for it: a thread does, once somebody asks."""

    def __init__(self, work: Any, result: list[torch.Tensor]) -> None:
        """Take a work, and the tensors that are sent or received."""
        super().__init__()
        self._work = work
        self._result = result
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._error: RuntimeError | None = None
        self._future: Any = None

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Wait for it; if the thread does already, for the thread: gloo tells it once only.

        Raises:
            RuntimeError: torch's own, timeouts included.
        """
        with self._lock:
            if self._future is None and not self._done.is_set():
                self._wait(timeout)
        if not self._done.wait(timeout.total_seconds() or None):
            raise RuntimeError(f"Wait timeout after {timeout}")
        if self._error is not None:
            raise self._error
        return True

    def is_completed(self) -> bool:
        """Return whether it is done."""
        if not self._done.is_set():
            self.get_future()
        return self._done.is_set()

    def is_success(self) -> bool:
        """Return whether nothing went wrong so far."""
        return self._error is None

    def exception(self) -> Any:
        """Return what went wrong, or None."""
        return self._error

    def result(self) -> list[torch.Tensor]:
        """Return the tensors that are sent or received."""
        return self._result

    def source_rank(self) -> int:
        """Return who sent what was received."""
        return self._work.source_rank()  # type: ignore[no-any-return]

    def _source_rank(self) -> int:
        return self._work._source_rank()  # type: ignore[no-any-return]

    def synchronize(self) -> None:
        """Wait for it."""
        self.wait()

    def get_future(self) -> Any:
        """Return a future of the result."""
        with self._lock:
            if self._future is None:
                self._future = future = Future()  # type: ignore[var-annotated]
                if self._done.is_set():
                    self._settle(future)
                else:
                    gloo.watch(self._watch)
        return self._future

    def _watch(self) -> None:
        self._wait()
        self._settle(self._future)

    def _wait(self, *timeout: timedelta) -> None:
        try:
            self._work.wait(*timeout)
        except RuntimeError as error:
            self._error = error
        self._done.set()

    def _settle(self, future: Any) -> None:
        if self._error is None:
            future.set_result(self._result)
        else:
            future.set_exception(self._error)
