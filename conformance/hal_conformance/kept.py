# SPDX-License-Identifier: Apache-2.0
"""Arrays that were made already: neighbouring tasks have the same weights, and dtypes round the same numbers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable

from hal_conformance.case import Array


class Kept:
    """The arrays that were used last, up to a number of bytes; they are read-only.

    Args:
        limit: bytes in all. An array of more than a quarter of it is not kept.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._arrays: OrderedDict[Hashable, Array] = OrderedDict()
        self._bytes = 0

    def get(self, key: Hashable, make: Callable[[], Array]) -> Array:
        """Return the array of that key, making it if it is not here."""
        if key in self._arrays:
            self._arrays.move_to_end(key)
            return self._arrays[key]
        array = make()
        array.flags.writeable = False
        if array.nbytes <= self._limit // 4:
            self._arrays[key] = array
            self._bytes += array.nbytes
            while self._bytes > self._limit:
                _, oldest = self._arrays.popitem(last=False)
                self._bytes -= oldest.nbytes
        return array
