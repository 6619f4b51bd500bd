# SPDX-License-Identifier: Apache-2.0
"""Each API that training code uses of CUDA is exercised through `hal run`, and does what the table says."""

import json
import subprocess
import sys
from pathlib import Path

import coverage_table
import pytest
from exercises import EXERCISES

import hal.launch.surface  # noqa: F401  fills the table
from hal.launch.api import DOORS, TABLE

HERE = Path(__file__).parent
HAL = str(Path(sys.executable).parent / "hal")

counted = pytest.mark.skipif(not coverage_table.COUNT.exists(), reason="the count of APIs in ../shared is not here")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What came out of each exercise: nothing, or an error."""
    done = subprocess.run(
        [HAL, "run", "--device", "cpu", str(HERE / "exercises.py")], cwd=tmp_path_factory.mktemp("exercises"),
        capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    return json.loads(done.stdout)


@counted
def test_every_row_of_the_count_has_an_exercise():
    assert [row.name for row in coverage_table.rows() if not row.apart and row.name not in EXERCISES] == []


@pytest.mark.parametrize("name", EXERCISES)
def test_an_exercise_does_what_the_table_says(name, outcomes):
    if coverage_table.Row(name, 1, 1).on("cpu").verdict == "refused":
        assert outcomes[name].startswith(("UnsupportedOperation: cpu: ", "AttributeError: module 'torch"))
    else:
        assert outcomes[name] == ""


@counted
def test_98_percent_of_all_sites_are_native_or_emulated():
    found = coverage_table.rows()
    assert coverage_table.share(found, "cpu") >= 0.98
    assert coverage_table.share(found, "ascend") >= 0.98


@counted
def test_the_page_of_the_documentation_is_that_of_today():
    assert coverage_table.PAGE.read_text() == coverage_table.page(coverage_table.rows())


TORCHS_OWN = {
    "torch.cuda.CudaError", "torch.cuda.DeferredCudaCallError", "torch.cuda.cudaStatus",  # errors, and what names them
    "torch.cuda.amp.common.amp_definitely_not_available", "torch.cuda.amp.amp_definitely_not_available",  # both ask us
}  # fmt: skip


def test_every_public_name_of_torch_cuda_has_an_answer():
    import torch
    import torch.cuda.comm

    loaded = [name for name in sys.modules if name == "torch.cuda" or name.startswith("torch.cuda.")]
    public = [name for name in loaded if not any(part.startswith("_") for part in name.split("."))]
    without = []
    for module in sorted(set(public) - {"torch.cuda.sparse"}):  # types of a layout, which nothing makes any more
        for name in getattr(sys.modules[module], "__all__", vars(sys.modules[module])):
            found = getattr(sys.modules[module], name, None)
            own = getattr(found, "__module__", "") or ""
            here = own.startswith("torch.cuda") or module == "torch.cuda.comm"
            if callable(found) and here and not name.startswith("_"):
                full = f"{module}.{name}"
                if full not in {*TABLE, *DOORS, *TORCHS_OWN}:
                    without.append(full)
    assert without == []
    assert torch.cuda.comm.gather
