# SPDX-License-Identifier: Apache-2.0
"""Works of torch.distributed that answer as NCCL's do, where gloo's say not that they are done, and have no future."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch._C._distributed_c10d import Work
from torch.futures import Future

from hal.launch import gloo


class Works(Work):
    """Several works as one, or one that has no future of its own.

    Waited for they are torch's own. Only where somebody asks what gloo does not tell, a thread waits, too, one for each
    future, whose callbacks may wait for others. What is no method of torch's class the last work answers.
    """

    def __init__(self, works: Sequence[Any], result: list[torch.Tensor]) -> None:
        """Take works that may be waited for more than once, and the tensors that hold the result in the end."""
        super().__init__()
        self._works = tuple(works)
        self._result = result
        self._done = threading.Event()
        self._error: RuntimeError | None = None
        self._future: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._works[-1], name)

    def wait(self, *args: Any, **kwargs: Any) -> bool:
        """Wait for all."""
        try:
            done = [work.wait(*args, **kwargs) for work in self._works]  # all of them, whatever the first one says
            return all(done)
        except RuntimeError as error:  # torch's own of every kind, timeouts included
            self._error = error
            raise
        finally:
            self._done.set()

    def is_completed(self) -> bool:
        """Return whether all are done, which a thread finds out."""
        if not self._done.is_set():
            self.get_future()
        return self._done.is_set()

    def is_success(self) -> bool:
        """Return whether all went well."""
        return self._error is None if self._done.is_set() else all(work.is_success() for work in self._works)

    def exception(self) -> Any:
        """Return what went wrong, or None."""
        return self._error

    def result(self) -> list[torch.Tensor]:
        """Return the tensors that hold the result."""
        return self._result

    def get_future(self) -> Any:
        """Return a future of the result, which a thread waits for: callers go on, as they do with NCCL."""
        if self._future is None:
            self._future = Future()
            gloo.watch(self._settle)
        return self._future

    def _settle(self) -> None:
        try:
            self.wait()
        except RuntimeError as error:
            self._future.set_exception(error)
        else:
            self._future.set_result(self._result)
