# SPDX-License-Identifier: Apache-2.0
"""A device that torch itself does not have: registered on PrivateUse1, opened by a backend of under 30 lines."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch.utils import backend_registration

from hal_conformance.case import FAMILIES

PLUGGED = Path(__file__).parents[1] / "plugged"

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch cannot register a device from Python",
)


@pytest.fixture
def plug(distributions: Any) -> Path:
    site = distributions.add(
        "hal_plug", (PLUGGED / "hal_plug.py").read_text(), {"hal.backends": {"plug": "hal_plug:backend"}},
        dist="hal-plug",
    )  # fmt: skip
    (site / "torch_plug.py").write_text((PLUGGED / "torch_plug.py").read_text())
    return site


def python(code: str) -> str:
    """Run code in a process of its own: a device type can be registered once only."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_backend_has_at_most_thirty_lines() -> None:
    assert len((PLUGGED / "hal_plug.py").read_text().splitlines()) <= 30


def test_every_part_of_the_interface_is_fulfilled_or_refused_with_a_reason(plug: Path, hal_command: Any) -> None:
    done = hal_command("backend", "check", "plug", "--json")
    parts = {finding["part"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert done.returncode == 0, done.stdout
    assert {finding["outcome"] for finding in parts.values()} == {"fulfilled", "unsupported"}
    for name in ("open", "precision.ieee", "precision.deterministic", "random.portable", "support", "prepare"):
        assert parts[name]["outcome"] == "fulfilled", parts[name]
    # The allocator of this device is none of torch's, and gloo does not serve it: said, not tried.
    assert parts["memory.stats"]["outcome"] == "unsupported"
    assert "gloo serves" in parts["collectives"]["detail"]


def test_the_suite_judges_it_and_finds_nothing(plug: Path, hal_command: Any, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    done = hal_command("conformance", "run", "--device", "plug:0", "--scale", "tiny", "--case", "*[mixtral-8x7b]",
                       "--dtype", "float32", "--dtype", "bfloat16",
                       *(f"--case={family}" for family in FAMILIES if family not in ("router", "experts", "layer")),
                       "--require", "plug:*", "--json", str(file))  # fmt: skip
    report = json.loads(file.read_text())
    assert done.returncode == 0, done.stdout + done.stderr
    assert [subject["id"] for subject in report["subjects"]] == ["plug:0"]
    assert set(report["summary"]) <= {"EXACT", "PASS", "PASS-AMBIGUOUS"}
    assert {row["family"] for row in report["results"]} == set(FAMILIES)


def test_an_optimiser_follows_parameters_that_torch_replaces_and_shared_ones_stay_shared(plug: Path) -> None:
    assert python("""
import torch, hal

device = hal.open_device("plug")  # before any backward pass: torch's engine counts its devices at the first one

class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(8, 4)
        self.head = torch.nn.Linear(4, 8, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.embed(ids))

def steps(place):
    torch.manual_seed(0)
    model, ids = Tied(), torch.arange(8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    before = model.head.weight
    def step():
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(ids), ids.flip(0)).backward()
        optimizer.step()
    step()  # so that the optimiser has a state, which must move along
    if place:
        model, optimizer, ids = device.prepare(model, optimizer, ids)
        assert model.head.weight is not before  # or torch has learnt to keep it, and this test to find another way
        assert model.head.weight is model.embed.weight
        assert [p is model.head.weight for group in optimizer.param_groups for p in group["params"]] == [True]
        assert list(optimizer.state) == [model.head.weight]
        assert model.head.weight.device.type == "plug"
    step()
    return model.head.weight.detach().cpu()

torch.testing.assert_close(steps(True), steps(False), rtol=0, atol=0)
print("same")
""").split() == ["same"]
