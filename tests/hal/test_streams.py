# SPDX-License-Identifier: Apache-2.0
"""What a device's guard in torch lacks, torch says in words only."""

import pytest
import torch

from hal.errors import UnsupportedOperation
from hal.streams import TorchStreams, _refusals

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "words",
    ["Backend doesn't support events.", "cpu backend doesn't support events.", "Backend doesn't support elapsedTime."],
)
def test_a_guard_that_lacks_something_is_unsupported(words):
    with pytest.raises(UnsupportedOperation, match="doesn't support") as caught, _refusals(CPU, "event"):
        raise RuntimeError(words)
    assert (caught.value.device, caught.value.what) == ("cpu", "event")


def test_any_other_error_passes_unchanged():
    with pytest.raises(RuntimeError, match="illegal") as caught, _refusals(CPU):
        raise RuntimeError("an illegal memory access was encountered")
    assert type(caught.value) is RuntimeError


def test_torchs_own_guard_of_the_cpu_is_understood():
    with pytest.raises(UnsupportedOperation):
        TorchStreams(CPU, torch.cpu).event().record()
