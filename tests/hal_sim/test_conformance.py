# SPDX-License-Identifier: Apache-2.0
"""The suite judges simulated devices by the contract of their rule, and tells a unit that is not what it says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HAL = str(Path(sys.executable).parent / "hal")


def conformance(folder, *arguments):
    done = subprocess.run(
        [HAL, "conformance", "run", "--scale", "tiny", "--json", str(folder / "r.json"), *arguments],
        capture_output=True, text=True, check=False, timeout=600, cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
    )  # fmt: skip
    return done, json.loads((folder / "r.json").read_text())


@pytest.mark.parametrize("chip", ["v100", "h200/splitk=2", "mi250", "mi300x"])
def test_a_simulated_device_agrees_within_its_contract(chip, tmp_path):
    families = ("contract", "router", "experts", "layer")
    # A CDNA2 unit takes float16 gradients below 2^-14 for zero, far beyond any bound (test below).
    dtypes = ("float32", "bfloat16") if chip == "mi250" else ("float32", "bfloat16", "float16")
    done, report = conformance(
        tmp_path, "--device", f"sim:{chip}", *(word for family in families for word in ("--case", f"{family}.*")),
        *(word for dtype in dtypes for word in ("--dtype", dtype)),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (subject,) = report["subjects"]
    assert subject["info"]["simulated"]
    statuses = {row["status"] for row in report["results"]}
    assert {"EXACT", "PASS"} <= statuses
    assert ("UNSUPPORTED" in statuses) == (chip == "v100")  # bfloat16


def test_the_gradients_that_a_cdna2_unit_flushes_are_red(tmp_path):
    """PyTorch's documentation warns of it (notes/numerical_accuracy), and works around it in its own backward passes."""
    done, report = conformance(
        tmp_path, "--device", "sim:mi250", "--case", "layer.unaligned*", "--dtype", "float16"
    )  # fmt: skip
    assert done.returncode == 1
    assert "FAIL-NUMERIC" in {row["status"] for row in report["results"]}


def test_a_unit_that_keeps_fewer_bits_than_its_contract_says_is_caught(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import hal.matrix_unit as m\n"
        "from types import MappingProxyType\n"
        "import dataclasses\n"
        "cuts = m.MATRIX_UNITS['sm_90']['float16']\n"
        "coarse = dataclasses.replace(cuts, fraction_bits=13, result='float32_13')\n"
        "import hal_sim.simulation as s\n"
        "original = s.multiply\n"
        "s.multiply = lambda a, b, unit, *rest: original(a, b, coarse if unit == cuts else unit, *rest)\n"
    )
    done, report = conformance(tmp_path, "--device", "sim:h200", "--case", "experts.random*", "--dtype", "float16",
                               "--strict")  # fmt: skip
    assert done.returncode == 1
    assert {row["status"] for row in report["results"]} <= {"FAIL-NUMERIC", "DEGRADED"}
