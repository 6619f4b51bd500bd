# SPDX-License-Identifier: Apache-2.0
"""The compiled core where memory ends: it returns, and Python raises MemoryError."""

import subprocess
from pathlib import Path

import pytest
import torch

from hal.matrix_unit import MATRIX_UNITS
from hal_sim import build, native, product


@pytest.fixture(scope="module")
def checks(tmp_path_factory):
    """The checks of failures.cpp, compiled so that an undefined shift ends them."""
    try:
        compiler = build._compiler()
    except build.BuildFailed as error:
        pytest.skip(str(error))
    program = tmp_path_factory.mktemp("failures") / "checks"
    flags = ("-std=c++17", "-O1", "-pthread", "-fwrapv", "-ffp-contract=off", *build._target())
    trap = ("-fsanitize=shift-exponent", "-fsanitize-undefined-trap-on-error")  # needs no library of the sanitizer's
    sources = (f"-I{build.SOURCES[0].parent}", str(Path(__file__).parent / "failures.cpp"))
    subprocess.run([*compiler, *flags, *trap, *sources, "-o", str(program)], check=True)
    return program


@pytest.mark.parametrize("name", ["any allocation", "pool", "sizes", "zero"])
def test_the_core_where_memory_or_a_range_ends(name, checks):
    done = subprocess.run([str(checks), name], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_memory_is_a_memory_error_from_each_function(dtype):
    class Full:
        def __getattr__(self, name):
            return lambda *arguments: 1

    unit = MATRIX_UNITS["sm_90"][str(dtype).removeprefix("torch.")]
    a, b = torch.ones(1, 2, 3, dtype=dtype), torch.ones(1, 3, 4, dtype=dtype)
    for reference in (False, True):
        with pytest.raises(MemoryError, match="1 x 2 x 3 by 3 x 4"):
            native.multiply(Full(), a, b, None, unit, (-126, -126), reference=reference)


@pytest.mark.parametrize("exponent", [50, 56, 58, 61])
def test_one_number_repeated_beyond_all_memory_is_refused(exponent):
    x, y = torch.ones(1, 1, 1).expand(1, 2, 2**exponent), torch.ones(1, 1, 1).expand(1, 2**exponent, 1)
    with pytest.raises(MemoryError):
        product.multiply(x, y, MATRIX_UNITS["sm_90"]["float32"], ("float32", "float32"))
