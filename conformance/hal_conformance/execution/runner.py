# SPDX-License-Identifier: Apache-2.0
"""Run tasks on one subject, in worker processes that may die at any moment, and observe what comes back."""

from __future__ import annotations

import math
import os
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from types import MappingProxyType, TracebackType
from typing import Any

from threadpoolctl import threadpool_limits

from hal.errors import Absent, Broken, ConfigError, UnknownDevice
from hal_conformance.execution.observation import Observation
from hal_conformance.execution.plan import Catalogue, Task
from hal_conformance.execution.process import Died, TimedOut, WorkerProcess, share_of_the_cores
from hal_conformance.execution.subject import Subject
from hal_conformance.text import plain
from hal_conformance.verdicts import Status

START_S = 300.0
"""Seconds for a worker to import torch and open its device: cold network disks and first driver starts are slow."""

CASE_S = {"tiny": 60.0, "small": 120.0, "full": 1200.0}
"""Seconds for one case, by scale: some hundred times what the slowest takes on two old cores."""

AHEAD = {"tiny": 200, "small": 6, "full": 3}
"""Tasks that a worker holds: it computes while the parent judges, and neither waits for the other's slow ones."""

HANGS = 3
"""After this many hangs of one case (its presets and dtypes), the rest of it is not tried again."""


class Runner(AbstractContextManager["Runner"]):
    """One subject with its worker. Leaving the context ends the worker, whatever it is doing.

    Inside the context this process's matrix products use half of the cores: the worker has the others.

    Args:
        subject: what to run.
        catalogue: the cases, which the worker finds by the module's name.
        opener: `module:function` that opens a device by name.
        case_s, start_s: time limits in seconds; None: the defaults of this module.
        environment: variables that the worker has beside, or instead of, those of this process.
        folder: where it works; None: where this process does.

    Attributes:
        opened: the device's info, contract and versions, once `open` has returned.
    """

    def __init__(
        self,
        subject: Subject,
        catalogue: Catalogue | None = None,
        *,
        opener: str = "hal:open_device",
        case_s: float | None = None,
        start_s: float | None = None,
        environment: Mapping[str, str] = MappingProxyType({}),
        folder: str | None = None,
    ) -> None:
        self.subject = subject
        self.opened: dict[str, Any] = {}
        self._case_s = case_s
        self._start_s = START_S if start_s is None else start_s
        self._environment = environment
        self._config = {
            "device": subject.device,
            "impl": subject.impl,
            "opener": opener,
            "catalogue": (catalogue or Catalogue()).module,
            "folder": os.getcwd() if folder is None else folder,  # noqa: PTH109  a string for JSON
        }
        self._worker: WorkerProcess | None = None
        self._idle_until = 0.0
        self._threads: threadpool_limits | None = None

    def __enter__(self) -> Runner:
        self._threads = threadpool_limits(share_of_the_cores(), user_api="blas")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and self._worker is not None:
            self._abandon()
        self.rest()
        if self._threads is not None:
            self._threads.restore_original_limits()

    def open(self) -> dict[str, Any]:
        """Start a worker and wait until its device is open.

        Raises:
            UnknownDevice, Absent, Broken: the device cannot be had; the worker is gone.
            ConfigError: the implementation cannot be loaded.
        """
        try:
            self._worker = WorkerProcess(self._config, self._environment)
        except OSError as error:  # no process, or no memory, is left for one
            raise Broken(f"its process cannot be started: {error}", device=self.subject.device) from None
        return self._until_ready("opening")

    def another(self, environment: Mapping[str, str]) -> Runner:
        """Return a runner of the same subject, with a worker of its own that has other environment variables."""
        return Runner(
            self.subject, Catalogue(self._config["catalogue"]), opener=self._config["opener"], case_s=self._case_s,
            start_s=self._start_s, environment=environment, folder=self._config["folder"],
        )  # fmt: skip

    def rest(self) -> None:
        """End the worker; the next task has a new one."""
        if self._worker is not None:
            self._worker.close(grace=10.0)
            self._worker = None

    def change(self, impl: str) -> None:
        """Go on with another implementation on the same device, in the same worker if it still lives.

        Raises:
            UnknownDevice, Absent, Broken, ConfigError: as of `open`.
        """
        self.subject = Subject(self.subject.device, impl, self.subject.named)
        self._config["impl"] = impl
        if self._worker is None:
            self.open()
        else:
            self._worker.send({"command": "load", "impl": impl})
            self._until_ready("loading")

    def _until_ready(self, stage: str) -> dict[str, Any]:
        assert self._worker is not None
        deadline = time.monotonic() + self._start_s
        try:
            while True:
                message, _ = self._worker.receive(deadline)
                stage = message["event"]
                if stage == "ready":
                    versions = {**self.opened["versions"], **message["implementation"]}
                    flags = {**self.opened["flags"], **message["flags"]}
                    self.opened = {**self.opened, "versions": versions, "flags": flags}
                    return self.opened
                if stage == "failed":
                    self._fail(message["kind"], message["detail"])
                if stage == "loading":
                    self.opened = message["opened"]
        except Died as death:
            self._fail("implementation" if stage == "loading" else "broken", str(death))
        except TimedOut:
            self._fail(
                "implementation" if stage == "loading" else "broken",
                f"nothing within {self._start_s:g} s of {'importing it' if stage == 'loading' else 'opening it'}",
            )
        finally:
            if stage != "ready":
                self._worker.close()
                self._worker = None
        raise AssertionError("unreachable")

    def _fail(self, kind: str, detail: str) -> None:
        device = self.subject.device
        if kind == "unknown":
            raise UnknownDevice(detail, device=device)
        if kind == "absent":
            raise Absent(detail, device=device)
        if kind == "implementation":
            raise ConfigError(f"--impl {plain(self.subject.impl)} cannot be loaded: {detail}")
        raise Broken(detail, device=device)

    def observe(self, tasks: Sequence[Task]) -> Iterator[Observation]:
        """Run the tasks in order and yield what each did; the next ones run while the caller judges.

        A task whose worker hangs or dies is given that verdict, and a new worker goes on with the next. If no
        new worker can be had, all that is left is CRASH, with the reason.
        """
        waiting = deque(enumerate(tasks))
        in_flight: deque[tuple[int, Task]] = deque()
        hangs: Counter[str] = Counter()
        while waiting or in_flight:
            try:
                if self._worker is None:
                    waiting.extendleft(reversed(in_flight))
                    in_flight.clear()
                    self.open()
            except (UnknownDevice, Absent, Broken, ConfigError) as error:
                for _, task in waiting:
                    yield Observation(task, Status.CRASH, f"the device could not be opened again: {plain(error)}")
                return
            self._submit(waiting, in_flight, hangs)
            if in_flight:
                yield self._next(in_flight, hangs)
            while waiting and not in_flight and hangs[waiting[0][1].case.name] >= HANGS:
                _, task = waiting.popleft()
                yield Observation(task, Status.SKIPPED, f"not tried again after {HANGS} hangs of {task.case.name}")

    def _submit(
        self, waiting: deque[tuple[int, Task]], in_flight: deque[tuple[int, Task]], hangs: Counter[str]
    ) -> None:
        assert self._worker is not None
        while waiting and len(in_flight) < AHEAD[waiting[0][1].params.scale] and hangs[waiting[0][1].case.name] < HANGS:
            number, task = waiting.popleft()
            if not in_flight:
                self._idle_until = time.monotonic()
            self._worker.send(
                {"command": "run", "id": number, "case": task.case.name, "params": dict(vars(task.params))}
            )
            in_flight.append((number, task))

    def _next(self, in_flight: deque[tuple[int, Task]], hangs: Counter[str]) -> Observation:
        assert self._worker is not None
        number, task = in_flight[0]
        limit = self._case_s or CASE_S[task.params.scale]
        # The clock of a task starts when the worker could begin with it, not when the parent gets round to asking.
        deadline = max(self._idle_until, self._worker.last_arrival) + limit
        try:
            message, outputs = self._worker.receive(deadline)
            if not _answers(message, number):
                raise Died("the worker sent a message that answers nothing")
        except (Died, TimedOut) as end:
            in_flight.popleft()
            self._abandon()
            if isinstance(end, Died):
                return Observation(task, Status.CRASH, plain(end))
            hangs[task.case.name] += 1
            return Observation(task, Status.HANG, f"no result within {limit:g} s", seconds=limit)
        in_flight.popleft()
        if not message["healthy"]:
            self._abandon()
        return Observation(
            task,
            None if message["status"] is None else Status.parse(message["status"]),
            plain(message["detail"]),
            outputs,
            message.get("hashes") or {},
            message["seconds"],
        )

    def _abandon(self) -> None:
        assert self._worker is not None
        self._worker.close()
        self._worker = None


def _answers(message: dict[str, Any], number: int) -> bool:
    """Tell whether a message answers a task: foreign code may have written it."""
    status, detail, seconds, hashes = (message.get(name) for name in ("status", "detail", "seconds", "hashes"))
    answers = (message.get("event"), message.get("id")) == ("observed", number)
    digests = hashes is None or (isinstance(hashes, dict) and all(isinstance(d, str) for d in hashes.values()))
    words = isinstance(detail, str) and isinstance(status, str | None) and isinstance(message.get("healthy"), bool)
    return answers and words and digests and isinstance(seconds, float) and math.isfinite(seconds) and seconds >= 0
