# SPDX-License-Identifier: Apache-2.0
"""A recording: what one subject returned for every case, to be judged on another host, without the device.

The manifest says what was run, on what, and under which versions and flags. Nothing in it depends on the time,
so that a deterministic subject records the same bytes twice.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hal.contract import Contract
from hal.errors import ConfigError
from hal_conformance import arrays as codec
from hal_conformance import bundle
from hal_conformance.bundle import Unreadable
from hal_conformance.case import DTYPES, SCALES
from hal_conformance.plan import Catalogue, Selection, Task, plan
from hal_conformance.results import suite_version
from hal_conformance.text import plain
from hal_conformance.verdicts import Status

if TYPE_CHECKING:
    from hal_conformance.case import Arrays
    from hal_conformance.runner import Observation
    from hal_conformance.subject import Subject

SCHEMA = "hal.recording/1"

FACTS = ("info", "contract", "versions", "environment", "changes")
"""Parts of the manifest that describe the subject; `compare` shows where they differ."""


@dataclass(frozen=True)
class Entry:
    """What was recorded for one task.

    Attributes:
        status: why there are no outputs, or None.
        hashes: SHA-256 of each input on the recording host.
    """

    task: Task
    status: Status | None
    detail: str
    hashes: Mapping[str, str]
    outputs: Arrays


@dataclass(frozen=True)
class Recording:
    """A recording that was read, with everything checked that can be checked without computing.

    Attributes:
        name: the file's name, made safe to print.
        sha256: the file's digest.
        facts: the parts of the manifest that `FACTS` names.
    """

    name: str
    sha256: str
    selection: Selection
    device: str
    impl: str
    contract: Contract
    facts: Mapping[str, Any]
    entries: tuple[Entry, ...]


def write(
    subject: Subject, opened: Mapping[str, Any], selection: Selection, observations: Iterable[Observation]
) -> bytes:
    """Return the bytes of a recording.

    Raises:
        ConfigError: it would be larger than a recording may be.
    """
    cases: list[dict[str, Any]] = []
    tensors: Arrays = {}
    total = 0
    for seen in observations:
        outputs: dict[str, list[str]] = {}
        for key, array in seen.outputs.items() if seen.status is None else ():
            name = f"{seen.task.name}/{seen.task.params.dtype}/{key}"
            tensors[name] = array
            outputs[key] = [name, codec.tag_of(array)]
            total += array.nbytes
        if total > bundle.MAX_FILE - bundle.MAX_HEADER:
            raise ConfigError(
                f"the outputs are larger than the {bundle.MAX_FILE >> 20} MiB that a recording may have",
                hint="a smaller --scale, or fewer cases with --case",
            )
        status = None if seen.status is None else seen.status.value
        cases.append(
            {
                "case": seen.task.case.name, "preset": seen.task.params.preset, "dtype": seen.task.params.dtype,
                "status": status, "detail": seen.detail, "inputs": dict(seen.hashes), "outputs": outputs,
            }
        )  # fmt: skip
    manifest = {
        "selection": selection.as_json(),
        "device": str(opened["info"]["id"]),
        "impl": subject.impl,
        **{name: opened[name] for name in FACTS},
        "cases": cases,
    }
    metadata = {
        "schema": SCHEMA,
        "suite": suite_version(),
        "manifest": json.dumps(manifest, separators=(",", ":"), allow_nan=False),
    }
    return bundle.encode(metadata, tensors)


def read(path: Path, catalogue: Catalogue) -> Recording:
    """Read a recording from a file.

    Raises:
        Unreadable: it is none, was altered, or is of another suite; the text names the file.
    """
    name = plain(path, 200)
    try:
        return parse(bundle.read(path), name, catalogue)
    except Unreadable as error:
        raise Unreadable(f"{name}: {error}") from error


def parse(data: bytes, name: str, catalogue: Catalogue) -> Recording:
    """Read a recording from its bytes.

    Raises:
        Unreadable: as `read`.
    """
    metadata, tensors = bundle.decode(data)
    if metadata.get("schema") != SCHEMA:
        raise Unreadable(f"its schema is {plain(metadata.get('schema'), 60)}; this hal reads {SCHEMA}")
    if metadata.get("suite") != suite_version():
        theirs = plain(metadata.get("suite"), 60)
        raise Unreadable(f"recorded with suite {theirs}; this is suite {suite_version()}, and its cases may differ")
    try:
        manifest = bundle.parse_json(metadata["manifest"])
        selection = _selection(manifest["selection"])
        facts = {fact: manifest[fact] for fact in FACTS}
        if not isinstance(facts["info"], dict) or not isinstance(facts["versions"], dict):
            raise TypeError("info and versions must be objects")
        return Recording(
            name=name,
            sha256=metadata["sha256"],
            selection=selection,
            device=_text(manifest["device"]),
            impl=_text(manifest["impl"]),
            contract=Contract.from_json(facts["contract"]),
            facts=facts,
            entries=_entries(manifest["cases"], plan(selection, catalogue.all()), tensors),
        )
    except (KeyError, TypeError, AttributeError, ConfigError) as error:
        raise Unreadable(f"its manifest cannot be read ({type(error).__name__}: {plain(error, 100)})") from error
    except Unreadable:
        raise
    except ValueError as error:
        raise Unreadable(f"its manifest cannot be read ({plain(error, 100)})") from error


def _entries(cases: Any, tasks: Sequence[Task], tensors: dict[str, bundle.Stored]) -> tuple[Entry, ...]:
    if not isinstance(cases, list):
        raise TypeError("'cases' must be a list")
    planned = [(task.case.name, task.params.preset, task.params.dtype) for task in tasks]
    if [(case["case"], case["preset"], case["dtype"]) for case in cases] != planned:
        raise Unreadable(f"it does not hold the {len(planned)} cases that its selection has in this suite")
    left = dict(tensors)
    entries = tuple(_entry(case, task, left) for case, task in zip(cases, tasks, strict=True))
    if left:
        raise Unreadable(f"{len(left)} of its tensors belong to no case")
    return entries


def _entry(case: dict[str, Any], task: Task, left: dict[str, bundle.Stored]) -> Entry:
    outputs: Arrays = {}
    for key, (name, tag) in case["outputs"].items():
        outputs[key] = left.pop(name).array(tag)
    hashes = {key: _text(value) for key, value in case["inputs"].items()}
    # A status that this suite does not know is INVALID, and so is one that only a judge may give.
    status = None if case["status"] is None else Status.parse(case["status"])
    if status is not None and status.colour in ("green", "amber"):
        status = Status.INVALID
    if status is not None and outputs:
        raise Unreadable(f"{plain(task, 100)} has both a status and outputs")
    return Entry(task, status, plain(case["detail"]), hashes, outputs)


def _selection(data: dict[str, Any]) -> Selection:
    cases, dtypes, scale, seed = data["cases"], data["dtypes"], data["scale"], data["seed"]
    if not isinstance(cases, list) or not isinstance(dtypes, list):
        raise TypeError("'cases' and 'dtypes' must be lists")
    if scale not in SCALES or any(dtype not in DTYPES for dtype in dtypes) or type(seed) is not int:
        raise ValueError("no such scale, dtype or seed")
    return Selection(tuple(map(_text, cases)), tuple(dtypes), scale, seed)


def _text(value: object) -> str:
    if not isinstance(value, str) or len(value) > 1000:
        raise TypeError("a text was expected")
    return value
