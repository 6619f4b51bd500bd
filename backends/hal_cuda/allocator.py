# SPDX-License-Identifier: Apache-2.0
"""The environment variable of torch's GPU allocator."""

from __future__ import annotations

from collections.abc import Mapping

from hal.errors import ConfigError
from hal.memory import AllocatorPlan, merge_allocator_settings
from hal_cuda.build import TorchBuild

UNIFIED = "PYTORCH_ALLOC_CONF"


def allocator_environment(
    plan: AllocatorPlan, environ: Mapping[str, str], own: str, build: TorchBuild | None
) -> dict[str, str]:
    """Return the variable that carries a plan, merged with what the user set.

    The name that the user chose is kept. Where there is none, torch 2.10 and later take the unified name,
    earlier ones the
    vendor's own: 2.9.1 ignored the unified one on CUDA (pytorch#183387).

    Raises:
        ConfigError: both names are set, to different values, or a key is already set to another value.
    """
    wanted = plan.settings()
    if not wanted:
        return {}
    if own in environ and UNIFIED in environ and environ[own] != environ[UNIFIED]:
        raise ConfigError(
            f"{own}={environ[own]!r} and {UNIFIED}={environ[UNIFIED]!r} contradict each other",
            hint=f"unset {own}",
        )
    named = [name for name in (own, UNIFIED) if name in environ]
    variable = named[0] if named else UNIFIED if build is not None and build.at_least(2, 10) else own
    return {name: merge_allocator_settings(name, environ.get(name), wanted) for name in named or [variable]}
