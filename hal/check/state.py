# SPDX-License-Identifier: Apache-2.0
"""What a backend could change in its process by being opened: switches, and the host's random generators."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import product


@dataclass(frozen=True)
class ProcessState:
    """The process at one moment. Values are texts, which stay comparable when the objects change.

    Attributes:
        switches: the environment, Python's settings and every setting that torch has, if it is imported.
        generators: a digest of each of the host's random generators.
    """

    switches: dict[str, str] = field(default_factory=lambda: {name: repr(value) for name, value in _switches()})
    generators: dict[str, str] = field(default_factory=lambda: {name: _digest(state) for name, state in _generators()})

    def differences(self, later: ProcessState) -> list[str]:
        """Return a phrase for each switch that is another one later."""
        was, now = self.switches, later.switches
        changed = [f"{what} was {was[what]}, is {now[what]}" for what in was if now.get(what, was[what]) != was[what]]
        gone = [f"{what} is gone" for what in was if what not in now]
        return changed + gone + [f"{what} is new" for what in now if what not in was]


def _switches() -> Iterator[tuple[str, object]]:
    for name, value in os.environ.items():
        # torch's compiler sets variables of its own as soon as it is imported, whatever the device.
        if not name.startswith("TORCHINDUCTOR_"):
            yield f"environment variable {name}", value
    # torch adds a folder of its own when a part of torch.distributed is imported, which older optimisers do.
    compiled = getattr(sys.modules.get("torch.distributed.nn.jit.instantiator"), "INSTANTIATED_TEMPLATE_DIR_PATH", None)
    for path in sys.path:
        if path != compiled:
            yield f"entry of sys.path {path}", True
    yield "sys.getrecursionlimit()", sys.getrecursionlimit()
    if "torch" in sys.modules:
        yield from _torch_switches()


def _torch_switches() -> Iterator[tuple[str, object]]:
    import torch

    core = torch._C
    # Whatever torch can both get and set, without an argument, is a switch: so that those of every vendor are seen, and
    # those of the next release. The second kind has setters of other names.
    names = [name for name in dir(core) if name.startswith("_get_")]
    for name in names:
        if hasattr(core, name.replace("_get_", "_set_", 1)) or name.endswith("_enabled"):
            with contextlib.suppress(TypeError):  # it wants an argument
                yield f"torch._C.{name}()", _read(getattr(core, name))
    precision = getattr(core, "_get_fp32_precision_getter", None)  # torch 2.9 and later
    if precision is not None:
        for library, operation in product(("generic", "cuda", "mkldnn"), ("all", "matmul", "conv", "rnn")):
            yield f"fp32_precision of {library}, {operation}", _read(precision, library, operation)
    for call in ("get_default_dtype", "get_default_device", "get_num_threads", "get_num_interop_threads",
                 "is_grad_enabled", "is_anomaly_enabled", "is_deterministic_algorithms_warn_only_enabled"):  # fmt: skip
        yield f"torch.{call}()", getattr(torch, call)()
    yield "torch.set_printoptions", vars(torch._tensor_str.PRINT_OPTS)


def _read(getter: Callable[..., object], *arguments: str) -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return getter(*arguments)
        except RuntimeError as error:  # two switches of one thing contradict each other, or there is none
            return f"unreadable ({str(error).partition('.')[0]})"


def _generators() -> Iterator[tuple[str, object]]:
    yield "random", random.getstate()
    if "numpy" in sys.modules:
        import numpy as np

        yield "numpy.random", np.random.get_state()
    if "torch" in sys.modules:
        import torch

        yield "torch", torch.random.get_rng_state().tolist()


def _digest(state: object) -> str:
    return hashlib.sha256(pickle.dumps(state)).hexdigest()
