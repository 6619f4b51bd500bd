# SPDX-License-Identifier: Apache-2.0
"""Recordings made in this process, without a worker, for the tests of the reader and of the comparison."""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from dataclasses import replace
from typing import Any

import fake_cases
import numpy as np

from hal.contract import Contract
from hal_conformance import arrays
from hal_conformance.execution.observation import Observation
from hal_conformance.execution.plan import Catalogue, Selection, plan
from hal_conformance.execution.subject import Subject
from hal_conformance.recordings import bundle, recording
from hal_conformance.verdicts import Status

FAKE = Catalogue("fake_cases")
SELECTION = Selection(("double.one[a]",), scale="tiny")
OPENED: dict[str, Any] = {
    "info": {"id": "fake:0", "name": "\x1b[2Jcard"},
    "contract": Contract().as_json(),
    "versions": {"driver": "1", "hal": "0"},
    "environment": {},
    "flags": {},
    "kernels": {},
    "changes": [],
}


def observations(selection=SELECTION, change=lambda x: x):
    found = []
    for task in plan(selection, FAKE.all()):
        inputs = task.case.inputs(task.params)
        outputs = {"y": change(inputs["x"] + inputs["x"])}
        found.append(Observation(task, None, outputs=outputs, hashes=arrays.digests(inputs)))
    return found


def make(selection=SELECTION, opened=OPENED, change=lambda x: x, edit=lambda found: found):
    seen = edit(observations(selection, change))
    return recording.write(Subject("fake:0", "m:o"), opened, selection, seen)


def parse(data, name="a"):
    return recording.parse(data, name, FAKE)


def reseal(header: bytes | dict[str, Any], data: bytes = b"") -> bytes:
    """Return a file with a right digest, whatever is in its header: a forgery."""
    if isinstance(header, dict):
        metadata = header.pop("__metadata__")
        rest = {"sha256": "0" * 64, **{k: v for k, v in metadata.items() if k != "sha256"}}
        header = json.dumps({"__metadata__": rest, **header}, separators=(",", ":")).encode()
    whole = struct.pack("<Q", len(header)) + header + data
    start = 8 + len(b'{"__metadata__":{"sha256":"')
    zeros = whole[:start] + b"0" * 64 + whole[start + 64 :]
    return whole[:start] + hashlib.sha256(zeros).hexdigest().encode() + whole[start + 64 :]


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Return the header, parsed, and the tensors' bytes."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


TABLES = ("outputs", "cases")
TAGS = {"U8": "uint8", "I32": "int32", "I64": "int64"}


def manifest_of(data: bytes) -> dict[str, Any]:
    """Return the manifest and the tables as one object."""
    metadata, tensors = bundle.decode(data)
    return json.loads(metadata["manifest"]) | json.loads(zlib.decompress(tensors["tables"].data))


def with_manifest(data: bytes, change) -> bytes:
    """Return a forged copy whose manifest or tables were changed."""
    manifest = manifest_of(data)
    change(manifest)
    return with_json(data, manifest)


def with_json(data: bytes, manifest: Any, **columns: Any) -> bytes:
    """Return a forged copy with this manifest and its tables, and these tensors in place of its own."""
    metadata, tensors = bundle.decode(data)
    kept = {name: stored.array(TAGS[stored.dtype]) for name, stored in tensors.items()}
    whole = dict(manifest) if isinstance(manifest, dict) else {}
    tables = {name: whole.pop(name) for name in TABLES if name in whole}
    text = json.dumps(whole if isinstance(manifest, dict) else manifest)
    forged = {**metadata, "manifest": text}
    del forged["sha256"]
    return bundle.encode(forged, kept | {"tables": bundle.deflate(json.dumps(tables).encode())} | columns)


def one_ulp(array):
    """Return the array with one element changed in its lowest bit."""
    bits = np.array(array).view(f"u{array.itemsize}")
    bits.flat[1] ^= 1
    return bits.view(array.dtype)


def crashed(found):
    """Return the observations with the first one dead."""
    return [replace(found[0], status=Status.CRASH, detail="died\x1b[2J", outputs={}), *found[1:]]


def unsupported(found):
    """Return the observations of a subject that cannot do any of it."""
    return [replace(seen, status=Status.UNSUPPORTED, detail="none of it", outputs={}) for seen in found]


assert fake_cases.ALL
