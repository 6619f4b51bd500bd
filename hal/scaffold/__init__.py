# SPDX-License-Identifier: Apache-2.0
"""Writes the package of a new backend; see `hal backend new`."""

from hal.scaffold.package import write_package

__all__ = ["write_package"]
