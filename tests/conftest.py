# SPDX-License-Identifier: Apache-2.0
"""Profiles of hypothesis, one thread for torch since two workers of pytest share two cores, patience, and a cache."""

import os
import time

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("dev", max_examples=20, deadline=None)
hypothesis.settings.register_profile("ci", max_examples=50, deadline=None, derandomize=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory):
    """A cache of this session's own, so that no test reads or leaves anything in the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HAL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def eventually():
    """Return what waits until a condition holds, and says whether it did.

    A busy machine may take ten times as long as usual over starting a process, so the patience costs nothing where all
    is well, and is far beyond what any wait here takes. `meanwhile` must hold for as long as waiting makes sense.
    """

    def wait(condition, *, seconds=300.0, meanwhile=lambda: True):
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline or not meanwhile():
                return bool(condition())
            time.sleep(0.1)
        return True

    return wait


def pytest_terminal_summary(terminalreporter):
    """Say how many recorded products of real matrix units were compared; each once by each implementation."""
    passed = terminalreporter.stats.get("passed", [])
    count = sum(value for report in passed for name, value in report.user_properties if name == "records")
    if count:
        terminalreporter.write_line(f"recorded products of matrix units: {count:,} compared, bit by bit, none differs")
