# SPDX-License-Identifier: Apache-2.0
"""JSON documents, as the suite writes them."""

from __future__ import annotations

import json


def to_json(document: object) -> bytes:
    """Return JSON text that every parser accepts: ASCII, and no NaN or infinity.

    Raises:
        ValueError: a number is not finite.
    """
    return (json.dumps(document, indent=1, allow_nan=False) + "\n").encode()
