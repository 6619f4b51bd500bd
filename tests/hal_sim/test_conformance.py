# SPDX-License-Identifier: Apache-2.0
"""The suite judges simulated devices by the contract of their rule, and tells a unit that is not what it says."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hal
from hal_conformance import arrays
from hal_conformance.cases import ALL
from hal_conformance.execution.plan import Catalogue, Selection, plan
from hal_conformance.portable import portable
from hal_sim import simulation

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
    done, report = conformance(
        tmp_path, "--device", f"sim:{chip}", *(word for family in families for word in ("--case", f"{family}.*"))
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (subject,) = report["subjects"]
    assert subject["info"]["simulated"]
    statuses = {row["status"] for row in report["results"]}
    assert {"EXACT", "PASS"} <= statuses
    assert ("UNSUPPORTED" in statuses) == (chip == "v100")  # bfloat16


def test_the_gradients_that_a_cdna2_unit_flushes_are_within_its_contract_and_beyond_any_other():
    """PyTorch's documentation warns of it (notes/numerical_accuracy), and works around it in its own backward passes."""
    tasks = plan(Selection(("layer.unaligned", "head.norm", "attention.latent_backward"), ("float16",), "tiny"), ALL)
    with hal.open_device("sim:mi250") as device:
        promised = device.contract
        returned = {}
        for task in tasks:
            given = {n: arrays.to_torch(a, torch.device("cpu")) for n, a in task.case.inputs(task.params).items()}
            found = task.case.run(portable, given, task.params)
            returned[task] = {name: arrays.from_torch(tensor) for name, tensor in found.items()}
    assert promised.matmul["float16"].flushes_below == 2.0**-14
    keeps = {name: dataclasses.replace(rule, flushes_below=0.0) for name, rule in promised.matmul.items()}
    for contract, colour in ((promised, "green"), (dataclasses.replace(promised, matmul=keeps), "red")):
        for task, outputs in returned.items():
            verdict = task.case.judge(task.case.inputs(task.params), outputs, task.params, contract)
            assert verdict.status.colour == colour, (str(task), verdict)


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
        "groups = s.multiply_groups\n"
        "s.multiply_groups = lambda unit, *rest: groups(coarse if unit == cuts else unit, *rest)\n"
    )
    done, report = conformance(tmp_path, "--device", "sim:h200", "--case", "experts.random*", "--dtype", "float16",
                               "--strict")  # fmt: skip
    assert done.returncode == 1
    assert {row["status"] for row in report["results"]} <= {"FAIL-NUMERIC", "DEGRADED"}


def outputs(tasks, device, count):
    """Run tasks on a device; return whether each multiplies there, and the digests of what came back."""
    found = {}
    with hal.open_device(device):
        for task in tasks:
            given = {n: arrays.to_torch(a, torch.device("cpu")) for n, a in task.case.inputs(task.params).items()}
            before = len(count)
            returned = task.case.run(portable, given, task.params)
            digests = {name: arrays.digest(arrays.from_torch(tensor)) for name, tensor in returned.items()}
            found[task] = len(count) > before, digests
    return found


def test_what_is_said_never_to_reach_the_unit_does_not_and_is_the_cpus_bit_by_bit(monkeypatch):
    count = []
    for name in ("multiply", "multiply_groups"):
        own = getattr(simulation, name)
        monkeypatch.setattr(simulation, name, lambda *given, own=own: count.append(0) or own(*given))
    tasks = plan(Selection(dtypes=("float32", "bfloat16"), scale="tiny"), Catalogue().all())
    on_sim = outputs(tasks, "sim:h200", count)
    assert not [str(task) for task in tasks if on_sim[task][0] != task.case.multiplies]
    same = [task for task in tasks if not task.case.multiplies]
    on_cpu = outputs(same, "cpu", count)
    assert not [str(task) for task in same if on_cpu[task][1] != on_sim[task][1]]


@pytest.mark.parametrize("core", ["native", "torch"])
def test_beside_the_cpu_two_simulated_devices_are_run_where_they_multiply(core, tmp_path, monkeypatch):
    monkeypatch.setenv("HAL_SIM_CORE", core)
    done, report = conformance(tmp_path, "--case", "norm.rms", "--case", "layer.forward_free", "--dtype", "bfloat16")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {"sim:h200", "sim:mi300x"} <= {subject["id"] for subject in report["subjects"]}
    for subject in ("sim:h200", "sim:mi300x"):
        statuses = {}
        for row in report["results"]:
            if row["subject"] == subject:
                statuses.setdefault(row["case"].partition("[")[0], set()).add(row["status"])
        assert statuses["norm.rms"] == {"SAME-AS-CPU"}
        assert ("SKIPPED" in statuses["layer.forward_free"]) == (core == "torch")
        assert statuses["layer.forward_free"] & {"PASS", "PASS-AMBIGUOUS"}
    assert {(pair["a"], pair["b"]) for pair in report["agreement"]} >= {("cpu", "sim:h200"), ("sim:h200", "sim:mi300x")}


def test_at_small_scale_two_simulated_devices_need_a_compiler(tmp_path, monkeypatch):
    monkeypatch.setenv("HAL_SIM_CORE", "torch")
    done, report = conformance(tmp_path, "--case", "norm.rms_one_token", "--scale", "small")
    assert done.returncode == 0
    assert {n["subject"] for n in report["not_run"] if n["kind"] == "left out"} == {"sim:h200", "sim:mi300x"}
