# SPDX-License-Identifier: Apache-2.0
"""What a backend answers before a device is opened."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping

from hal.allocator_plan import AllocatorPlan
from hal.backend import Backend, advice_of
from hal.check.checks.expect import Failed, expect
from hal.errors import ConfigError, UnsupportedOperation


def facts(backend: Backend) -> str:
    """Facts go through JSON, what is unknown is None, and each device has evidence. Their types are sure already."""
    import torch

    infos = [claim.info for claim in backend.discover().claims]
    for info in infos:
        for field in ("id", "vendor", "torch_device"):
            expect(getattr(info, field), f"{field} is empty")
        for field in ("name", "arch"):
            expect(getattr(info, field) != "", f"{field} is empty; unknown is None")
        total = info.total_memory
        expect(total is None or total > 0, f"total_memory is {total!r}; unknown is None")
        expect(json.loads(json.dumps(info.as_json())) == info.as_json(), "as_json() changes through JSON")
        expect(info.evidence, f"{info.id} says nothing of what it looked at; evidence is empty")
    # A type that a package registers when it is imported is not yet known to torch, so only its form is looked at.
    expect(all(":" in i.torch_device or i.torch_device.isidentifier() for i in infos), "torch_device is malformed")
    return f"{len(infos)} listed; {infos[0].id} on {infos[0].torch_device} (torch {torch.__version__})"


def repeatable(backend: Backend) -> str:
    """Listing twice gives the same."""
    first, second = backend.discover(), backend.discover()
    expect(first == second, f"two calls of discover() differ: {first} and {second}")
    return "two calls agree"


def cheap(backend: Backend) -> str:
    """Listing imports no vendor package and initialises no device."""
    backend.discover()
    package = getattr(backend, "package", None)
    expect(package is None or package not in sys.modules, f"discover() imported {package}")
    torch_type = getattr(backend, "torch_type", None)
    module = getattr(sys.modules.get("torch"), str(torch_type), None)
    initialized = getattr(module, "is_initialized", None)
    if torch_type != "cpu" and initialized is not None:
        expect(not initialized(), f"discover() initialised torch.{torch_type}")
    return "no vendor package imported" if package else "nothing initialised"


def advice(backend: Backend) -> str:
    """What `hal doctor` tells about the backend is texts, none of them empty."""
    told = advice_of(backend)
    expect(all(text.strip() for text in told), f"an empty advice: {told}")
    return f"{len(told)} given"


# Two values of each setting of a plan.
_PLANS: dict[str, tuple[AllocatorPlan, AllocatorPlan]] = {
    "expandable_segments": (AllocatorPlan(expandable_segments=True), AllocatorPlan(expandable_segments=False)),
    "max_split_size_mb": (AllocatorPlan(max_split_size_mb=256), AllocatorPlan(max_split_size_mb=512)),
    "garbage_collection_threshold": (
        AllocatorPlan(garbage_collection_threshold=0.5), AllocatorPlan(garbage_collection_threshold=0.75),
    ),
}  # fmt: skip


def allocator(backend: Backend) -> str:
    """A plan becomes environment variables, each setting by itself, and contradicts nothing that is set in silence."""
    before = dict(os.environ)
    empty = dict(backend.allocator_environment(AllocatorPlan(), {}))
    expect(not empty, f"an empty plan sets {', '.join(empty)}")
    known, lacking = [], []
    for setting, (one, other) in _PLANS.items():
        try:
            first, second = _translated(backend, one, {}), _translated(backend, other, {})
        except ConfigError as error:
            lacking.append(error.message)
            continue
        expect(first and first != second, f"two values of {setting} give the same environment: {first}")
        again = _translated(backend, one, first)
        expect({**first, **again} == first, f"the same {setting} once more changes {first} to {again}")
        try:
            contradicted = _translated(backend, other, first)
        except ConfigError:
            known.append(setting)
        else:
            raise Failed(f"the user's {first} is overwritten by a plan with another {setting}: {contradicted}")
    expect(dict(os.environ) == before, "translating a plan changed this process's environment")
    if not known:
        raise UnsupportedOperation("; ".join(dict.fromkeys(lacking)), device=backend.name, what="allocator_environment")
    return "; ".join([f"translates {', '.join(known)}", *lacking])


def _translated(backend: Backend, plan: AllocatorPlan, environ: Mapping[str, str]) -> dict[str, str]:
    made = dict(backend.allocator_environment(plan, dict(environ)))
    expect(
        all(isinstance(t, str) for pair in made.items() for t in pair), f"an environment of other than texts: {made}"
    )
    return made
