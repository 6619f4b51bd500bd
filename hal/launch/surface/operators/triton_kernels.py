# SPDX-License-Identifier: Apache-2.0
"""Kernels in triton where triton is installed, and has no driver for the device: the error says what to do."""

from __future__ import annotations

import sys
from typing import Any

from hal.launch.awaited import when_loaded
from hal.launch.libraries import LIBRARIES
from hal.launch.patches import Patches
from hal.launch.redirection import Redirection

_MODULE = "triton.runtime.driver"


def install(redirection: Redirection, patches: Patches) -> None:
    """Replace triton's search for a driver, once somebody loads it."""

    def replace(search: Any) -> None:
        def create_driver() -> Any:
            try:
                return search()
            except RuntimeError as error:
                why = f"triton has no driver for {redirection.device.info.id}, and its kernels do not run ({error})"
                raise redirection.refuse("triton", why, LIBRARIES["triton"].instead) from None

        patches.set(sys.modules[_MODULE], "_create_driver", create_driver)

    when_loaded(_MODULE, "_create_driver", replace)
