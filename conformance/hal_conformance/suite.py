# SPDX-License-Identifier: Apache-2.0
"""Run the suite: every task on every subject, judged as the results come."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from hal.contract import Contract
from hal.errors import Absent, Broken, UnknownDevice
from hal_conformance.execution import known
from hal_conformance.execution.judging import judge
from hal_conformance.execution.plan import Catalogue, Selection, Task, complete
from hal_conformance.execution.process import many_kernels
from hal_conformance.execution.retrial import tried_again
from hal_conformance.execution.runner import Runner
from hal_conformance.execution.simulated import as_on_cpu, left_out, passed_over, same_as_cpu
from hal_conformance.execution.subject import PORTABLE, Subject, unmet
from hal_conformance.recordings import recording
from hal_conformance.recordings.agreement import Agreement
from hal_conformance.report.certificate import certificates
from hal_conformance.report.report import NotRun, Report
from hal_conformance.result import Result, judged_devices

if TYPE_CHECKING:
    from hal.backend import DeviceInfo
    from hal_conformance.case import Arrays
    from hal_conformance.execution.observation import Observation

OnResult = Callable[[Subject, Result], None]


def run(
    subjects: Sequence[Subject],
    tasks: Sequence[Task],
    selection: Selection,
    *,
    required: Sequence[str] = (),
    catalogue: Catalogue | None = None,
    opener: str = "hal:open_device",
    case_s: float | None = None,
    start_s: float | None = None,
    on_result: OnResult | None = None,
    on_not_run: Callable[[NotRun], None] | None = None,
) -> Report:
    """Run the tasks on each subject, one subject after the other.

    Args:
        subjects: what to run; one that cannot be opened is reported, and the others run.
        tasks: from `plan.plan(selection, ...)`.
        selection: for the report.
        required: globs of devices of which at least one result must be judged.
        catalogue: the cases, as the workers find them.
        opener: `module:function` that opens a device by name in the worker.
        case_s: seconds for one case; None: by scale.
        start_s: seconds for a worker to start; None: the default.
        on_result: called with each result as it is judged.
        on_not_run: called with each subject that could not be opened, at that moment.

    Raises:
        ConfigError: an implementation cannot be loaded.
    """
    started = time.monotonic()
    report = Report(selection.scale, selection.seed)
    seen: set[tuple[str, str]] = set()
    on_cpu: dict[Task, Result] = {}
    agreement = Agreement()

    def not_run(subject: Subject, kind: str, reason: str, failed: bool) -> None:
        entry = NotRun(str(subject), kind, reason, failed)
        report.not_run.append(entry)
        if on_not_run:
            on_not_run(entry)

    for subject in subjects:
        if reason := left_out(subject, selection.scale):
            not_run(subject, "left out", reason, False)
            continue
        environment = many_kernels(selection.scale)
        with Runner(
            subject, catalogue, opener=opener, case_s=case_s, start_s=start_s, environment=environment
        ) as runner:
            try:
                opened = runner.open()
            except (UnknownDevice, Absent, Broken) as error:
                kinds = {UnknownDevice: "unknown", Absent: "absent", Broken: "broken"}
                not_run(subject, kinds[type(error)], error.reason, subject.named)
                continue
            if reason := left_out(subject, selection.scale, opened):
                not_run(subject, "left out", reason, False)
                continue
            device = str(opened["info"]["id"])
            if (device, subject.impl) in seen:
                report.notes.append(f"{subject} is {device}, which had run already")
                continue
            seen.add((device, subject.impl))
            report.subjects.append({"id": device, "impl": subject.impl, **opened})
            number = agreement.subject(str(replace(subject, device=device)), Contract.from_json(opened["contract"]))
            rows = same_as_cpu(opened, subject.impl, on_cpu)
            rows |= passed_over(subject, opened, [task for task in tasks if task not in rows])
            if on_result:
                for row in rows.values():
                    on_result(subject, row)
            own = [task for task in tasks if task not in rows]
            keep = functools.partial(agreement.add, number) if len(subjects) > 1 else None
            rows |= _judged(runner, own, subject, device, on_result, keep)
            report.results += [rows[task] for task in tasks if task in rows]
            if (device, subject.impl) == ("cpu", PORTABLE):
                on_cpu = rows
    report.certificates = certificates(as_on_cpu(report.results), complete(selection, (catalogue or Catalogue()).all()))
    report.agreement = agreement.pairs()
    report.required_missing = unmet(required, judged_devices(report.results))
    report.seconds = time.monotonic() - started
    return report


def _judged(
    runner: Runner, tasks: Sequence[Task], subject: Subject, device: str, on_result: OnResult | None,
    keep: Callable[[Task, Arrays, Result], None] | None,
) -> dict[Task, Result]:  # fmt: skip
    """Run tasks and judge each, and pass on what came back; what may be a known fault is run again at the end."""
    contract = Contract.from_json(runner.opened["contract"])
    rows: dict[Task, Result] = {}
    suspects: list[Task] = []
    for observation in runner.observe(tasks):
        row = judge(observation, contract, device, subject.impl)
        if keep is not None and observation.status is None:
            keep(observation.task, observation.outputs, row)
        if known.suspected(runner.opened, contract, observation, row.status):
            suspects.append(observation.task)
        elif on_result:
            on_result(subject, row)
        rows[observation.task] = row
    for task, retrial in tried_again(runner, suspects, contract):
        rows[task] = retrial.of(rows[task])
        if on_result:
            on_result(subject, rows[task])
    return rows


def record(
    subject: Subject,
    tasks: Sequence[Task],
    selection: Selection,
    *,
    catalogue: Catalogue | None = None,
    opener: str = "hal:open_device",
    case_s: float | None = None,
    on_observation: Callable[[Observation], None] | None = None,
) -> tuple[bytes, list[Observation]]:
    """Run the tasks on one subject and return a recording of what came back, and the observations without outputs.

    Raises:
        UnknownDevice, Absent, Broken: the device cannot be had.
        ConfigError: the implementation cannot be loaded, or the recording would be too large.
    """
    kept: list[Observation] = []
    with Runner(subject, catalogue, opener=opener, case_s=case_s) as runner:
        opened = runner.open()

        def passing() -> Iterator[Observation]:
            for observation in runner.observe(tasks):
                yield observation
                kept.append(replace(observation, outputs={}))  # all of them would not fit in memory
                if on_observation:
                    on_observation(observation)

        contract = Contract.from_json(opened["contract"])
        once_more = functools.partial(tried_again, runner, contract=contract)
        return recording.write(subject, opened, selection, passing(), once_more), kept


def listed() -> tuple[list[DeviceInfo], list[NotRun]]:
    """Return the devices that the backends list here, and the backends that list none, with their reasons."""
    from hal import surveys

    asked = surveys.take_surveys()
    silent: list[NotRun] = []
    for answer in asked:
        if answer.error is not None:
            kind = "broken" if answer.broken else "absent"
            silent.append(NotRun(answer.name, kind, getattr(answer.error, "reason", str(answer.error)), False))
    return surveys.settle(asked)[0], silent
