# SPDX-License-Identifier: Apache-2.0
"""What the facets of an opened device share: its id, its ledger, and that they end when the device is closed."""

from __future__ import annotations

from typing import final

from hal.changes import Changes
from hal.errors import DeviceClosed


class Facet:
    """One aspect of an opened device, such as its memory.

    A facet may be kept in a variable and outlive the device. Whatever it would change or ask of a closed device is
    refused: each public method begins with `self.check_open()`, and every change to the process goes through
    `self._changes`, whose `close()` puts it back.

    Args:
        device_id: for messages.
        changes: the device's ledger. A backend may leave it out: `Device` attaches the one of the handle.
    """

    def __init__(self, device_id: str, changes: Changes | None = None) -> None:
        self.device_id = device_id
        self._changes = Changes(device_id) if changes is None else changes

    @final
    def attach(self, changes: Changes) -> None:
        """Belong to this handle from now on. Called once, by `Device`, before a user sees the facet."""
        self._changes = changes

    @final
    def check_open(self) -> None:
        """Raise unless the device is open.

        Raises:
            DeviceClosed: it was closed.
        """
        if self._changes.closed:
            raise DeviceClosed("the device is closed", device=self.device_id, hint="open it again")
