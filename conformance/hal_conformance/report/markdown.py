# SPDX-License-Identifier: Apache-2.0
"""A Markdown summary, for a pull request."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from hal_conformance.report import agreement_table
from hal_conformance.report.tally import missing_devices, notable, tally, verdict
from hal_conformance.text import markdown as cell
from hal_conformance.verdicts import Status
from hal_conformance.version import suite_version

if TYPE_CHECKING:
    from hal_conformance.report.report import Report
    from hal_conformance.result import Result

MAX_ROWS = 200
"""Rows of the list of what is not green; a comment on a pull request has a size limit."""


def markdown(report: Report) -> bytes:
    """Return the report as Markdown."""
    return ("\n".join(_lines(report)) + "\n").encode()


def _lines(report: Report) -> Iterator[str]:
    yield "# Conformance"
    yield ""
    yield f"**{cell(verdict(report.results, missing_devices(report), report.seconds))}**"
    yield ""
    yield f"Suite {cell(suite_version())}, scale {report.scale}, seed {report.seed}."
    for subject in report.subjects:
        rows = [r for r in report.results if (r.subject, r.impl) == (subject["id"], subject["impl"])]
        yield ""
        yield f"## {cell(subject['id'])}: {cell(subject['info'].get('name') or 'unnamed')}, {cell(subject['impl'])}"
        yield ""
        yield from _table(
            (
                "family",
                "dtype",
                "same as cpu",
                "exact",
                "pass",
                "ambiguous",
                "amber",
                "red",
                "not judged",
                "worst margin",
            ),
            (
                (
                    t.family,
                    t.dtype,
                    t.count(Status.SAME_AS_CPU),
                    t.count(Status.EXACT),
                    t.count(Status.PASS),
                    t.count(Status.PASS_AMBIGUOUS),
                    t.colour("amber"),
                    t.colour("red"),
                    t.colour("neutral"),
                    "" if t.margin is None else f"{t.margin:.3g}",
                )
                for t in tally(rows)
            ),
        )
        mine = [c for c in report.certificates if (c.subject, c.impl) == (subject["id"], subject["impl"])]
        if mine:
            yield ""
            yield from _table(("certificate", "levels"), ((found.dtype, found.sentence()) for found in mine))
    if report.agreement:
        yield ""
        yield "## Agreement"
        yield ""
        heads = ("device", "and device", "elements that differ", "tokens with other experts", "training")
        yield from _table(heads, agreement_table.rows(report.agreement))
    yield from _notable(notable(report.results))
    if report.not_run or report.required_missing:
        yield ""
        yield "## Not run"
        yield ""
        for entry in report.not_run:
            yield f"- {cell(entry.subject)}: {entry.kind}: {cell(entry.reason)}"
        for glob in report.required_missing:
            yield f"- {cell(glob)}: required, and no such device was judged"


def _notable(rows: list[Result]) -> Iterator[str]:
    if not rows:
        return
    yield ""
    yield "## Not green"
    yield ""
    yield from _table(
        ("status", "case", "dtype", "subject", "detail"),
        ((r.status.value, r.case, r.dtype, r.subject, r.detail) for r in rows[:MAX_ROWS]),
    )
    if len(rows) > MAX_ROWS:
        yield ""
        yield f"{len(rows) - MAX_ROWS} more are in the JSON report."


def _table(head: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(cell(value) for value in row)} |"
