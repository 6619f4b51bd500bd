# SPDX-License-Identifier: Apache-2.0
"""A recording: what one subject returned for every case, to be judged on another host, without the device.

All outputs of scale small take 1.4 GB; a recording takes 4 MB. It holds samples of each output (`sampling`), the
elements that the recorder found worst, a checksum for each row and a digest of everything. What needs every element
(a single wrong one among millions, the RMS of errors) is therefore judged on the recording host, by the same code
and the same oracle as elsewhere, and recorded as the recorder's claim. The host that compares does not have to
believe it: it makes the inputs and the oracle again, and judges what the recording holds by itself.

The manifest, in the file's metadata, says what was run, on what, and under which versions and flags; the tables of
cases and outputs are a tensor. Nothing depends on the time, so that a deterministic subject records the same bytes
twice.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hal.contract import Contract
from hal.errors import ConfigError
from hal_conformance.case import DTYPES, SCALES
from hal_conformance.cases.trajectory import Statistical
from hal_conformance.execution import known
from hal_conformance.execution.judging import judge_outputs, result
from hal_conformance.execution.plan import Catalogue, Selection, Task, plan
from hal_conformance.numerics import witness
from hal_conformance.recordings import bundle, columns
from hal_conformance.recordings.bundle import Unreadable
from hal_conformance.result import DETECTORS
from hal_conformance.text import plain
from hal_conformance.verdicts import Judgement, Status
from hal_conformance.version import suite_version

if TYPE_CHECKING:
    from hal_conformance.case import Array
    from hal_conformance.execution.observation import Observation
    from hal_conformance.execution.retrial import Retrial
    from hal_conformance.execution.subject import Subject
    from hal_conformance.recordings.packed import Packed

SCHEMA = "hal.recording/2"

FACTS = ("info", "contract", "versions", "environment", "flags", "kernels", "changes")
"""Parts of the manifest that describe the subject; `compare` shows where they differ."""

TABLES, INPUTS = "tables", "inputs/sha256"
MAX_TABLES = 8 << 20
"""Bytes of the tables, inflated: ten times those of scale small. Parsed JSON takes up to some thirty times as much."""


@dataclass(frozen=True)
class Entry:
    """What was recorded for one task.

    Attributes:
        status: why there are no outputs, or None.
        detail: of that status.
        claim: the recorder's verdict on the whole outputs; None where there are none.
        hashes: SHA-256 of each input on the recording host.
        outputs: what is held of each output.
    """

    task: Task
    status: Status | None
    detail: str
    claim: Judgement | None
    hashes: Mapping[str, str]
    outputs: Mapping[str, Packed]


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
    entries: tuple[Entry, ...] = field(repr=False)


def write(
    subject: Subject,
    opened: Mapping[str, Any],
    selection: Selection,
    observations: Iterable[Observation],
    once_more: Callable[[Sequence[Task]], Iterable[tuple[Task, Retrial]]] = lambda tasks: (),
) -> bytes:
    """Judge observations as they come, and return the bytes of a recording; no output is kept.

    Inputs and outputs are sorted by name: the order in which a case names them may change from process to process.

    Args:
        subject, opened, selection: what was run.
        observations: of each task.
        once_more: runs tasks again that may have a known fault of this device (`retrial`).

    Raises:
        ConfigError: it would be larger than a recording may be.
    """
    contract = Contract.from_json(opened["contract"])
    writer = columns.Writer(selection.seed)
    inputs: dict[str, int] = {}
    cases: list[dict[str, Any]] = []
    doubtful: dict[Task, tuple[int, Judgement]] = {}
    for seen in observations:
        case: dict[str, Any] = {
            "case": seen.task.case.name, "preset": seen.task.params.preset, "dtype": seen.task.params.dtype,
            "status": None if seen.status is None else seen.status.value, "detail": seen.detail, "claim": None,
            "inputs": {name: inputs.setdefault(digest, len(inputs)) for name, digest in sorted(seen.hashes.items())},
            "outputs": {},
        }  # fmt: skip
        if seen.status is None:
            with witness.watching(seen.outputs) as worst:
                claimed = judge_outputs(seen.task, seen.outputs, seen.hashes, contract)
            case["claim"] = _claim_to_json(seen.task, claimed)
            if known.suspected(opened, contract, seen, claimed.status):
                doubtful[seen.task] = len(cases), claimed
            case["outputs"] = {n: writer.add(n, array, worst.worst(n)) for n, array in sorted(seen.outputs.items())}
        cases.append(case)
    for task, retrial in once_more(list(doubtful)):
        at, claimed = doubtful[task]
        cases[at]["claim"] = _claim_to_json(task, retrial.of(claimed))
    manifest = {
        "selection": selection.as_json(),
        "device": str(opened["info"]["id"]),
        "impl": subject.impl,
        **{name: opened[name] for name in FACTS},
    }
    tables = {"outputs": writer.lines, "cases": cases}
    metadata = {
        "schema": SCHEMA,
        "suite": suite_version(),
        "manifest": _to_json(manifest),
    }
    tensors = {TABLES: bundle.deflate(_to_json(tables).encode()), INPUTS: columns.digests_to_array(inputs)}
    data = bundle.encode(metadata, tensors | writer.tensors())
    if len(data) > bundle.MAX_FILE:
        raise ConfigError(
            f"the recording would have {len(data)} bytes; it may have {bundle.MAX_FILE >> 20} MiB",
            hint="a smaller --scale, or fewer cases with --case",
        )
    return data


def read(path: Path, catalogue: Catalogue) -> Recording:
    """Read a recording from a file.

    Raises:
        Unreadable: it is none, was altered, or is of another suite; the text names the file.
    """
    name = plain(path, 1000)
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
        tasks = plan(selection, catalogue.all())
        return Recording(
            name=name,
            sha256=metadata["sha256"],
            selection=selection,
            device=_text(manifest["device"]),
            impl=_text(manifest["impl"]),
            contract=Contract.from_json(facts["contract"]),
            facts=facts,
            entries=_entries(tensors, tasks, selection.seed),
        )
    except (KeyError, TypeError, AttributeError, ConfigError) as error:
        raise Unreadable(f"its manifest cannot be read ({type(error).__name__}: {plain(error, 100)})") from error
    except Unreadable:
        raise
    except (ValueError, OverflowError) as error:
        raise Unreadable(f"its manifest cannot be read ({plain(error, 100)})") from error


def _entries(tensors: Mapping[str, bundle.Stored], tasks: Sequence[Task], seed: int) -> tuple[Entry, ...]:
    left = dict(tensors)
    tables = bundle.parse_json(bundle.inflate(left.pop(TABLES).array("uint8"), MAX_TABLES))
    cases = tables["cases"]
    if not isinstance(cases, list):
        raise TypeError("'cases' must be a list")
    planned = [(task.case.name, task.params.preset, task.params.dtype) for task in tasks]
    if [(case["case"], case["preset"], case["dtype"]) for case in cases] != planned:
        raise Unreadable(f"it does not hold the {len(planned)} cases that its selection has in this suite")
    inputs = left.pop(INPUTS).array("uint8")
    if inputs.ndim != 2 or inputs.shape[1] != 32:
        raise Unreadable("the digests of its inputs have another shape than [n, 32]")
    outputs = columns.Reader(left, seed).read(tables["outputs"])
    if left:
        raise Unreadable(f"{len(left)} of its tensors belong to no case")
    return tuple(_entry(case, task, inputs, outputs) for case, task in zip(cases, tasks, strict=True))


def _entry(case: Mapping[str, Any], task: Task, inputs: Array, outputs: Sequence[Packed]) -> Entry:
    held = {name: outputs[_index(at, len(outputs))] for name, at in case["outputs"].items()}
    hashes = {name: bytes(inputs[_index(at, len(inputs))]).hex() for name, at in case["inputs"].items()}
    # A status that this suite does not know is INVALID, and so is one that only a judge may give.
    status = None if case["status"] is None else Status.parse(case["status"])
    if status is not None and status.colour in ("green", "amber"):
        status = Status.INVALID
    if status is not None and held:
        raise Unreadable(f"{plain(task, 100)} has both a status and outputs")
    claim = None if status is not None else _claim_from_json(case["claim"], task)
    return Entry(task, status, plain(case["detail"]), claim, hashes, held)


def _to_json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _claim_to_json(task: Task, claimed: Judgement) -> list[Any]:
    """Return a verdict as a list: status, margin, the detectors, detail."""
    row = result(task, claimed, "", "", 0.0)
    return [row.status.value, *map(_six_digits, (row.margin, *row.detectors.values())), row.detail]


def _six_digits(number: float | None) -> float | None:
    """Shorten a figure of a verdict; what is beyond its limit, which is one, stays beyond it."""
    if number is None:
        return None
    short = float(f"{number:.6g}")
    return short if (abs(short) > 1.0) == (abs(number) > 1.0) else number


def _claim_from_json(claim: Any, task: Task) -> Judgement:
    status, margin, *detectors, detail = claim
    numbers = [margin, *detectors]
    if len(detectors) != len(DETECTORS) or not all(n is None or type(n) in (int, float) for n in numbers):
        raise TypeError("the recorder's verdict has no numbers where some were expected")
    found = Judgement(Status.parse(status), margin, dict(zip(DETECTORS, detectors, strict=True)), plain(detail))
    if wrong := _contradiction(found, task):
        raise Unreadable(f"it contradicts itself: {found.status.value} {wrong}")
    return found


_WITHIN = frozenset({Status.EXACT, Status.PASS, Status.PASS_AMBIGUOUS, Status.NONDET})


def _contradiction(claim: Judgement, task: Task) -> str:
    """Return what of a verdict no run of this suite gives, or nothing.

    DEGRADED is beyond the root mean square of honest errors, or biased; of what is compared with other runs, and has no
    bound, beyond all of those.
    """
    status, margin, named = claim.status, claim.margin, claim.detectors
    degraded, by_runs = status is Status.DEGRADED, isinstance(task.case, Statistical)
    if status is Status.INCONCLUSIVE and not by_runs:
        return "where there are no statistics"
    if status is Status.KNOWN and not (task.case.multiplies and task.params.dtype == "bfloat16"):
        return "of what multiplies no matrices in bfloat16"
    for name, number in {"margin": margin, **named}.items():
        if number is None:
            continue
        if number < 0 and name != "bias":
            return f"with {name} {number:g}"
        limit = 0.0 if name == "exact" else 1.0
        free = name != "exact" and (by_runs or (degraded and name in ("rms", "bias")))
        limited = status in _WITHIN or degraded or status is Status.INCONCLUSIVE
        if limited and abs(number) > limit and not (free and status not in _WITHIN):
            return f"with {name} {number:g}"
    if margin is not None and named["bound"] is not None and margin != named["bound"]:
        return f"with margin {margin:g} and bound {named['bound']:g}"
    measures = [named["rms"], named["bias"], *([margin] if by_runs else [])]
    if degraded and not any(n is not None and abs(n) > 1.0 for n in measures):
        return "with nothing beyond its limit"
    return ""


def _index(at: Any, length: int) -> int:
    if type(at) is not int or not 0 <= at < length:
        raise TypeError(f"{plain(at, 40)} is no number of one of {length}")
    return at


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
