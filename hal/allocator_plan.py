# SPDX-License-Identifier: Apache-2.0
"""Allocator settings in vendor-neutral terms, and the variables in which torch's allocators read them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields

from hal.arguments import integer
from hal.errors import ConfigError


@dataclass(frozen=True)
class AllocatorPlan:
    """Allocator settings in vendor-neutral terms; None leaves the vendor's default or the user's own setting.

    Attributes:
        expandable_segments: map memory in growing segments, against fragmentation.
        max_split_size_mb: blocks above this are not split.
        garbage_collection_threshold: share of the memory at which cached blocks are freed, in (0, 1).
    """

    expandable_segments: bool | None = None
    max_split_size_mb: int | None = None
    garbage_collection_threshold: float | None = None

    def __post_init__(self) -> None:
        if not (self.expandable_segments is None or isinstance(self.expandable_segments, bool)):
            raise ConfigError(f"expandable_segments is {self.expandable_segments!r}", expected="True, False or None")
        if self.max_split_size_mb is not None:
            integer("max_split_size_mb", self.max_split_size_mb, least=1)
        threshold = self.garbage_collection_threshold
        if threshold is not None and not (isinstance(threshold, float) and 0 < threshold < 1):
            raise ConfigError(
                f"garbage_collection_threshold is {threshold!r}", expected="a share between 0 and 1, or None"
            )

    def settings(self) -> dict[str, str]:
        """Return the settings that are given, in the `key: value` grammar that torch's allocators share."""
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        return {key: str(value) for key, value in given.items() if value is not None}


# A value may be a bracketed list with commas of its own: roundup_power2_divisions:[256:1,512:2].
_SETTING = re.compile(r"\s*([^\s:,\[\]]+)\s*:\s*(\[[^\[\]]*\]|[^:,\[\]]*[^\s:,\[\]])\s*(?:,|$)")


def parse_allocator_settings(variable: str, text: str) -> dict[str, str]:
    """Return the settings in the text of a variable, `key:value,key:value`; a comma at the end is allowed.

    Raises:
        ConfigError: some part of the text is nothing of the kind.
    """
    found: dict[str, str] = {}
    at = 0
    while text[at:].strip():
        setting = _SETTING.match(text, at)
        if setting is None:
            raise ConfigError(f"{variable}={text!r} cannot be read at {text[at:]!r}", expected="key:value,key:value")
        found[setting[1]] = setting[2]
        at = setting.end()
    return found


def merge_allocator_settings(variable: str, current: str | None, wanted: Mapping[str, str]) -> str:
    """Merge wanted settings into a `key:value,key:value` variable without losing what the user set.

    Raises:
        ConfigError: the user set the same key to another value, or the variable cannot be read.
    """
    merged = parse_allocator_settings(variable, current or "")
    for key, value in wanted.items():
        if not _same_value(merged.setdefault(key, value), value):
            raise ConfigError(
                f"{variable} already sets {key}:{merged[key]}, and the plan asks for {key}:{value}",
                hint=f"remove {key} from {variable}, or from the plan",
            )
    return ",".join(f"{key}:{value}" for key, value in merged.items())


def _same_value(one: str, other: str) -> bool:
    """Tell whether two values mean the same: 0.80 is 0.8, and True is true."""
    try:
        return float(one) == float(other)
    except ValueError:
        return one.replace(" ", "").lower() == other.replace(" ", "").lower()
