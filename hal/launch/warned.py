# SPDX-License-Identifier: Apache-2.0
"""Warnings: what torch warns of in a call that went through a function of ours stands under the program's line."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

from hal.launch.caller import outside
from hal.launch.patches import Patches

_OURS = str(Path(__file__).parent) + os.sep


def install(patches: Patches) -> None:
    """Correct the place of a warning as it is shown: nothing is looked up for a call that warns of nothing."""
    module: Any = warnings
    own = module._showwarnmsg

    def show(message: Any) -> None:
        frame = outside(sys._getframe(1)) if message.filename.startswith(_OURS) else None
        if frame is not None:
            message.filename, message.lineno = frame.f_code.co_filename, frame.f_lineno
        own(message)

    patches.set(module, "_showwarnmsg", show)
