# SPDX-License-Identifier: Apache-2.0
"""Code that is traced or scripted: it gets the same answers as code that is run."""

from hal.launch.surface.compiler import (
    dynamo,
    fakes,
    script,
    traced,
)

__all__ = [
    "dynamo",
    "fakes",
    "script",
    "traced",
]
