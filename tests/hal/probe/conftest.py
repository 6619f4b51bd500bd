# SPDX-License-Identifier: Apache-2.0
"""A cache of this session's own, so that no test reads or leaves anything in the user's; what tests share is beside."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HAL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
