# SPDX-License-Identifier: Apache-2.0
"""Which parts of the interface a backend fulfils, tried on the machine at hand; see `hal backend check`."""

from hal.check.findings import Finding, check_backend

__all__ = ["Finding", "check_backend"]
