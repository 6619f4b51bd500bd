# SPDX-License-Identifier: Apache-2.0
"""The three answers to "can this device do that?": natively, by emulation, or not, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Support:
    """An answer with its reason. It is true in a condition unless it is "unsupported".

    Attributes:
        status: "native": the device's own library does it; "emulated": something else does it in its place;
            "unsupported": it cannot be had.
        reason: how it is emulated, why it is unsupported, or what showed that it is native.
    """

    status: Literal["native", "emulated", "unsupported"]
    reason: str

    def __bool__(self) -> bool:
        return self.status != "unsupported"

    def __str__(self) -> str:
        return f"{self.status} ({self.reason})"
