# SPDX-License-Identifier: Apache-2.0
"""A few thousand mutated recordings; `fuzz_recordings.py` tries as many as one likes."""

from __future__ import annotations

import fuzz_recordings


def test_a_mutated_recording_is_read_or_refused_in_one_line_and_nothing_else():
    found = fuzz_recordings.fuzz(1500, seed=7)
    assert found["read and compared"] > 50, "mutants that get past the reader reach the judge"
    assert len(found) > 15, "refused for many different reasons"
