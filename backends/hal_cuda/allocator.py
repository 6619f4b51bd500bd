# SPDX-License-Identifier: Apache-2.0
"""The environment variable of torch's GPU allocator."""

from __future__ import annotations

from collections.abc import Mapping

from hal.allocator_plan import AllocatorPlan, merge_allocator_settings, parse_allocator_settings
from hal.errors import ConfigError
from hal_cuda.build import TorchBuild

UNIFIED, CUDA, HIP = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"


def allocator_environment(
    plan: AllocatorPlan, environ: Mapping[str, str], own: str, build: TorchBuild | None
) -> dict[str, str]:
    """Return the one variable that carries a plan, merged with what the user set.

    torch reads the first that is set of several names and ignores the others (c10/core/AllocatorConfig.cpp), so the
    plan goes into that one, and what the user wrote under the others must not contradict it. Where none is set,
    torch 2.10 and later get the unified name and earlier ones the vendor's `own`: 2.9 knows the unified name and
    ignores it on CUDA (pytorch#183387).

    Raises:
        ConfigError: a key is set to two values, by two variables or by a variable and the plan, or a variable cannot
            be read.
    """
    wanted = plan.settings()
    if not wanted:
        return {}
    unified = build is None or build.at_least(2, 10)
    read = [name for name in ((UNIFIED, CUDA, HIP) if unified else (CUDA, HIP)) if name in (UNIFIED, CUDA, own)]
    given = [name for name in read if name in environ]
    target = given[0] if given else UNIFIED if unified else own
    settings = {name: parse_allocator_settings(name, environ[name]) for name in given}
    merged = environ.get(target)
    for shadowed in given[1:]:
        try:
            merged = merge_allocator_settings(target, merged, settings[shadowed])
        except ConfigError as error:
            raise ConfigError(
                f"{target}={environ[target]!r} and {shadowed}={environ[shadowed]!r} contradict each other",
                hint=f"unset {shadowed}: torch reads {target}",
            ) from error
    return {target: merge_allocator_settings(target, merged, wanted)}
