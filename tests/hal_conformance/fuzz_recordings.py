# SPDX-License-Identifier: Apache-2.0
"""Mutates recordings and reads them: whatever comes, it is read or refused in one line, and nothing else happens.

python tests/hal_conformance/fuzz_recordings.py [--inputs N] [--seed S] [--first K] [--memory MIB]

Most of the inputs have a right digest, since the digest would otherwise shield everything behind it. Bytes, the header's
JSON and the manifest's JSON are mutated. What can be read is compared, too: a forged recording must not harm the judge.
It also serves as the catalogue of the case that it records.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import re
import resource
import sys
import time
import warnings
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import recordings

from hal_conformance import arrays
from hal_conformance.case import Footprint
from hal_conformance.execution.observation import Observation
from hal_conformance.execution.plan import Catalogue, Selection, plan
from hal_conformance.execution.subject import Subject
from hal_conformance.numerics.detectors import discrete, exact, merge, structure
from hal_conformance.recordings import bundle, recording
from hal_conformance.recordings.bundle import Unreadable
from hal_conformance.recordings.compare import compare
from hal_conformance.report.document import to_json
from hal_conformance.text import MAX_DETAIL


@dataclass(frozen=True)
class Fuzzed:
    """Outputs of every kind that a recording tells apart: sampled, whole, integers, and one that is not finite."""

    name: str = "fuzzed.case"
    family: str = "layer"
    what: str = "For fuzzing."
    needs: tuple[str, ...] = ()
    multiplies: bool = True

    def presets(self):
        return ("a",)

    def dtypes(self):
        return ("float32", "bfloat16")

    def scales(self, preset):
        return ("tiny",)

    def footprint(self, p):
        return Footprint()

    def inputs(self, p):
        import ml_dtypes

        dtype = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}[p.dtype]
        return {"x_TD": np.arange(1600.0).reshape(40, 40).astype(dtype), "n": np.arange(30)}

    def judge(self, inputs, outputs, p, contract):
        shapes = {
            "y_TD": ((40, 40), p.dtype), "experts_TK": ((30,), "int64"), "loss": ((), "float32"), "nan": ((2,), p.dtype)
        }  # fmt: skip
        wrong = structure(outputs, shapes)
        if wrong is not None:
            return wrong
        found = [exact("y", outputs["y_TD"], inputs["x_TD"]), discrete("experts", outputs["experts_TK"], inputs["n"])]
        return merge(found)


ALL = (Fuzzed(),)
CATALOGUE = Catalogue("fuzz_recordings")
SELECTION = Selection(scale="tiny")


def by_name(name):
    """See `Catalogue.by_name`."""
    return {case.name: case for case in ALL}[name]


def sound() -> bytes:
    """Return the recording that is mutated."""
    seen = []
    for task in plan(SELECTION, ALL):
        inputs = task.case.inputs(task.params)
        x = inputs["x_TD"]
        outputs = {
            "y_TD": x, "experts_TK": inputs["n"], "loss": np.array(3, np.float32), "nan": x.reshape(-1)[:2] * np.nan
        }  # fmt: skip
        outputs["nan"] = outputs["nan"].astype(x.dtype)
        seen.append(Observation(task, None, outputs=outputs, hashes=arrays.digests(inputs)))
    return recording.write(Subject("fake:0", "m:o"), recordings.OPENED, SELECTION, seen)


ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**31 - 1, 2**32, 2**40, 2**63, 2**64, 10**19, 10**30, -(2**63), 0.5, -0.0, 1e308,
    "", "x", "0", "float32", "bfloat16", "uint8", "F32", "U8", "BOOL", "EXACT", "PASS", "CRASH", "\x1b[2J", "\u202e",
    "../../etc/passwd", "\ud800", "\0", "y_TD", "weights_TK", "logits_TE", "a" * 2000, [], {}, [[]], [{}], [0] * 9,
    [2**31, 2**31], [2**20, 2**20], {"sha256": "0"}, {"": {}}, [None] * 7, ["float32"], [2**62], [1, 2, 3],
)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of everything inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(inner for key, item in items for inner in places(item, (*path, key)))]


def mutate_json(value: Any, draw: random.Random) -> Any:
    """Return a copy with a few changes: values replaced, removed, repeated, exchanged, nested."""
    value = copy.deepcopy(value)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        paths = [path for path in places(value) if path]
        if not paths:
            break
        *way, last = draw.choice(paths)
        inner = value
        for step in way:
            inner = inner[step]
        kind = draw.randrange(8)
        if kind < 3:
            inner[last] = copy.deepcopy(draw.choice(ODD))
        elif kind == 3:
            del inner[last]
        elif kind == 4 and isinstance(inner, list):
            inner.insert(draw.randrange(len(inner) + 1), copy.deepcopy(inner[last]))
        elif kind == 5 and isinstance(inner, list):
            draw.shuffle(inner)
        elif kind == 6 and type(inner[last]) is int:
            inner[last] += draw.choice((-1, 1, 8, -8, 1 << draw.randrange(40)))
        else:
            inner[last] = [inner[last]] if draw.random() < 0.5 else {"x": inner[last]}
    return value


def mutate_bytes(data: bytes, draw: random.Random) -> bytes:
    """Return a copy with a few changes: bits flipped, bytes set, cut, repeated or inserted."""
    found = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 4, 16))):
        at = draw.randrange(len(found)) if found else 0
        kind = draw.randrange(6)
        if kind == 0 and found:
            found[at] ^= 1 << draw.randrange(8)
        elif kind == 1 and found:
            found[at] = draw.choice(b'\0\xff"{}[],:0-9e\\')
        elif kind == 2:
            del found[at : at + draw.choice((1, 2, 8, 64, 4096))]
        elif kind == 3:
            found[at:at] = found[at : at + draw.choice((1, 8, 64))]
        elif kind == 4:
            found[at:at] = draw.randbytes(draw.choice((1, 4, 32)))
        else:
            found[at : at + 8] = draw.choice((0, 1, 2**31, 2**63, 2**64 - 1)).to_bytes(8, "little")
    return bytes(found)


def mutant(base: bytes, draw: random.Random) -> bytes:
    """Return one mutated recording."""
    header, tensors = recordings.split(base)
    kind = draw.randrange(9)
    if kind == 0:
        return mutate_bytes(base, draw)
    if kind == 1:  # bytes of the header, under a right digest
        text = json.dumps(header, separators=(",", ":")).encode()
        return recordings.reseal(text[:91] + mutate_bytes(text[91:], draw), tensors)
    if kind == 2:  # bytes of the tensors
        return recordings.reseal(header, mutate_bytes(tensors, draw))
    if kind == 3:  # names, dtypes, shapes and places of the tensors
        changed = mutate_json(header, draw)
        if not isinstance(changed.get("__metadata__"), dict):
            changed["__metadata__"] = header["__metadata__"]
        return recordings.reseal(changed, tensors)
    manifest = recordings.manifest_of(base)
    if kind == 4:  # bytes of a column, deflated again
        name = draw.choice([name for name in header if name.startswith(("outputs/values", "tables"))])
        start, end = header[name]["data_offsets"]
        column = mutate_bytes(zlib.decompress(tensors[start:end]), draw)
        return recordings.with_json(base, manifest, **{name: bundle.deflate(column)})
    if kind == 5:
        metadata = {**header["__metadata__"]}
        metadata["manifest"] = mutate_bytes(metadata["manifest"].encode(), draw).decode("utf-8", "replace")
        return recordings.reseal({**header, "__metadata__": metadata}, tensors)
    return recordings.with_json(base, mutate_json(manifest, draw))


def check(data: bytes) -> str:
    """Read an input, and compare it if that is possible; return what happened. Anything else is raised."""
    try:
        read = recording.parse(data, "fuzzed", CATALOGUE)
    except Unreadable as refusal:
        text = str(refusal)
        if not text.isprintable() or len(text) > 2 * MAX_DETAIL:
            raise AssertionError(f"refused in more than a printable line: {text!r}") from refusal
        return re.sub(r"(output|tensor|column|elements of|entry|schema is|suite|take|read \(\w+).*", r"\1 ...", text)[
            :60
        ]
    to_json(compare([read], group_by="impl").as_json())
    return "read and compared"


def fuzz(inputs: int, seed: int, first: int = 0) -> Counter[str]:
    """Return how often what happened; the first input that breaks a rule is raised, with its number."""
    base = sound()
    found: Counter[str] = Counter()
    for number in range(first, first + inputs):
        draw = random.Random(f"{seed}/{number}")
        data = mutant(base, draw)
        started = time.process_time()  # a process that somebody stops takes no longer
        try:
            found[check(data)] += 1
        except BaseException as error:
            raise AssertionError(f"input {number} of seed {seed}: {type(error).__name__}: {error}") from error
        if time.process_time() - started > 5.0:
            raise AssertionError(f"input {number} of seed {seed} took {time.process_time() - started:.1f} s")
    return found


def main() -> None:
    """Fuzz, and print what happened."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--memory", type=int, default=2048, help="MiB of address space; more is a finding")
    options = parser.parse_args()
    warnings.simplefilter("error")
    resource.setrlimit(resource.RLIMIT_AS, (options.memory << 20, options.memory << 20))
    started = time.monotonic()
    found = fuzz(options.inputs, options.seed, options.first)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{options.inputs} inputs in {time.monotonic() - started:.0f} s, at most {peak:.0f} MiB resident")
    for what, count in found.most_common():
        print(f"{count:9} {what}")


if __name__ == "__main__":
    main()
