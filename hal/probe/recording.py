# SPDX-License-Identifier: Apache-2.0
"""Products of a device in a file: safetensors, 16-bit floats as integers, so that no reader rounds or refuses them."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import torch

from hal.errors import ConfigError
from hal.probe.multiplier import CODES, bits
from hal.probe.prediction import CLASSES, SEED, Products, key

SCHEMA = "hal.products/1"
LARGEST_BYTES = 256 << 20
"""Of a file: all products in six formats of four bytes are 20 MB."""

DTYPES = {
    "float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64,
}  # fmt: skip


def write(products: Products, path: Path) -> None:
    """Write a file, whole or not at all.

    Raises:
        ConfigError: it cannot be written.
    """
    from safetensors.torch import save

    described = {
        "schema": SCHEMA, "seed": SEED, "device": dict(products.device), "versions": dict(products.versions),
        "refused": dict(products.refused),
        "dtypes": {name: str(x.dtype).removeprefix("torch.") for name, x in products.results.items()},
    }  # fmt: skip
    stored = {name: bits(x) for name, x in products.results.items()}
    data = save(stored, {"hal": json.dumps(described, sort_keys=True)})
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror or error}") from error


def read(path: Path) -> Products:
    """Read a file.

    Raises:
        ConfigError: it is none of ours, or of another version, or damaged; one line says why.
    """
    try:
        if path.stat().st_size > LARGEST_BYTES:
            raise ConfigError(f"{path} is larger than {LARGEST_BYTES >> 20} MiB", expected=f"a file of {SCHEMA}")
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
    try:
        return _parsed(data, path)
    except ConfigError:
        raise
    except Exception as error:  # safetensors' own, and what JSON of any shape leads to
        raise ConfigError(
            f"{path} is no recording of products: {type(error).__name__}", expected=f"a file of {SCHEMA}",
            hint="hal probe DEVICE --record FILE writes one",
        ) from error  # fmt: skip


def _parsed(data: bytes, path: Path) -> Products:
    from safetensors.torch import load

    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    described = json.loads(header["__metadata__"]["hal"])
    if described["schema"] != SCHEMA or described["seed"] != SEED:
        raise ConfigError(f"{path} is of {described['schema']!r}, seed {described['seed']!r}", expected=SCHEMA)
    stored, results = load(data), {}
    shapes = {key(name.split("/")[0], shape): shape for name in stored for kind in CLASSES.values() for shape in kind}
    for name, codes in stored.items():
        if name not in shapes:
            raise ConfigError(f"{path} has a product that this version does not know: {name!r}")
        dtype = DTYPES[described["dtypes"][name]]
        M, _, N = shapes[name]
        if tuple(codes.shape) != (M, N) or codes.dtype != CODES[torch.finfo(dtype).bits // 8]:
            raise ConfigError(f"{path}: {name!r} has the wrong shape or type")
        results[name] = codes.view(dtype)
    device, versions, refused = (dict(described[part]) for part in ("device", "versions", "refused"))
    return Products(str(path), device, versions, results, refused)
