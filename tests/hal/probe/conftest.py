# SPDX-License-Identifier: Apache-2.0
"""What the tests of the probe share lies beside them; a cache of this session's own for the simulated devices."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HAL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
