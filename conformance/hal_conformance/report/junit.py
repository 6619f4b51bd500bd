# SPDX-License-Identifier: Apache-2.0
"""JUnit XML, which every CI system reads: one suite for each subject, one case for each result."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from hal_conformance.text import plain, xml_attribute, xml_text

if TYPE_CHECKING:
    from hal_conformance.report.report import Report
    from hal_conformance.result import Result


def junit(report: Report, *, strict: bool = False) -> bytes:
    """Return the report as JUnit XML. Red is a failure (amber too, if strict), neutral is skipped."""
    return "\n".join(['<?xml version="1.0" encoding="UTF-8"?>', *_suites(report, strict), ""]).encode()


def _suites(report: Report, strict: bool) -> Iterator[str]:
    yield '<testsuites name="hal conformance">'
    for subject in report.subjects:
        rows = [r for r in report.results if (r.subject, r.impl) == (subject["id"], subject["impl"])]
        red = sum(_fails(row, strict) for row in rows)
        neutral = sum(row.status.colour == "neutral" for row in rows)
        seconds = sum(row.seconds for row in rows)
        yield (
            f'<testsuite name={xml_attribute(_name(subject["id"], subject["impl"]))} tests="{len(rows)}"'
            f' failures="{red}" errors="0" skipped="{neutral}" time="{seconds:.3f}">'
        )
        for row in rows:
            yield from _case(row, strict)
        yield "</testsuite>"
    missing = [(n.subject, f"{n.kind}: {n.reason}", n.failed) for n in report.not_run]
    missing += [(glob, "required, and no such device was judged", True) for glob in report.required_missing]
    if missing:
        errors = sum(failed for *_, failed in missing)
        yield (
            f'<testsuite name="devices that did not run" tests="{len(missing)}" failures="0"'
            f' errors="{errors}" skipped="{len(missing) - errors}">'
        )
        for name, reason, failed in missing:
            kind = "error" if failed else "skipped"
            yield f'<testcase classname="devices" name={xml_attribute(name)}>'
            yield f"<{kind} message={xml_attribute(reason)}/></testcase>"
        yield "</testsuite>"
    yield "</testsuites>"


def _name(device: str, impl: str) -> str:
    return device if impl == "torch" else f"{device} {impl}"


def _fails(row: Result, strict: bool) -> bool:
    return row.status.colour == "red" or (strict and row.status.colour == "amber")


def _case(row: Result, strict: bool) -> Iterator[str]:
    group = f"{_name(row.subject, row.impl)}.{row.dtype}"
    yield f'<testcase classname={xml_attribute(group)} name={xml_attribute(row.case)} time="{row.seconds:.6f}">'
    message = plain(f"{row.status.value}: {row.detail}" if row.detail else row.status.value)
    if _fails(row, strict):
        yield f"<failure type={xml_attribute(row.status.value)} message={xml_attribute(message)}/>"
    elif row.status.colour == "neutral":
        yield f"<skipped message={xml_attribute(message)}/>"
    else:
        margin = "" if row.margin is None else f", margin {row.margin:.3g}"
        yield f"<system-out>{xml_text(message + margin)}</system-out>"
    yield "</testcase>"
