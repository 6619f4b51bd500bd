# SPDX-License-Identifier: Apache-2.0
"""The exit statuses of the `hal` command, and which error ends with which."""

from __future__ import annotations

from hal.errors import Absent, Broken, ConfigError, HalError, PluginError, UnknownDevice

FINDINGS = 1
USAGE = 2
DEVICE = 3
READER_GONE = 141  # 128 + SIGPIPE, as the shell says it of others
INTERNAL = 70  # EX_SOFTWARE of sysexits.h; no command uses it for anything else


def exit_status(error: HalError) -> int:
    """Return the exit status that stands for an error."""
    if isinstance(error, (Absent, Broken, UnknownDevice, PluginError)):
        return DEVICE
    return USAGE if isinstance(error, ConfigError) else FINDINGS
