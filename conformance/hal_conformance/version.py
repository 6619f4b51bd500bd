# SPDX-License-Identifier: Apache-2.0
"""Which suite this is."""

SUITE_REVISION = 13
"""Counts changes of cases, inputs or recorded outputs; recordings of different suites cannot be compared."""


def suite_version() -> str:
    """Return the version of this suite: the package's, and the revision of its cases."""
    import hal

    return f"{hal.__version__}+suite.{SUITE_REVISION}"
