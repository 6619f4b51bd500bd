# SPDX-License-Identifier: Apache-2.0
"""`hal backend check` finds what is wrong: each deliberately wrong backend fails in the part that is wrong."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hal.check.checks import PARTS

WRAP = """
import dataclasses
from hal_cpu.backend import backend as cpu
facets = cpu.open(info, changes)
{lines}
return facets
"""


def check(hal_command: Any, name: str) -> tuple[int, dict[str, dict[str, str]]]:
    done = hal_command("backend", "check", name, "--json", "--timeout", "120")
    assert done.stdout, done.stderr
    report = json.loads(done.stdout)
    assert (report["schema"], report["backend"]) == ("hal.backend-check/1", name)
    assert tuple(finding["part"] for finding in report["findings"]) == PARTS
    return done.returncode, {finding["part"]: finding for finding in report["findings"]}


def test_the_cpu_fulfils_everything_or_says_what_it_lacks(distributions: Any, hal_command: Any) -> None:
    status, found = check(hal_command, "cpu")
    assert [f for f in found.values() if f["outcome"] == "fails"] == []
    assert status == 0
    lacking = {part for part, f in found.items() if f["outcome"] == "unsupported"}
    assert lacking == {"memory.allocated", "precision.reduced"}


WRONG = {
    "memory.stats": "class M(type(facets.memory)):\n    def stats(self): return __import__('hal').MemoryStats(free=0)\n"
    "facets.memory.__class__ = M",
    "memory.allocated": "class M(type(facets.memory)):\n    def allocated(self): return 0\nfacets.memory.__class__ = M",
    "memory.limit": "class M(type(facets.memory)):\n    def _limit(self, n): pass\nfacets.memory.__class__ = M",
    "memory.out_of_memory": "class M(type(facets.memory)):\n    def _out_of_memory(self, e): return None\n"
    "facets.memory.__class__ = M",
    "random.seed": "class R(type(facets.random)):\n    def _seed(self, seed): pass\nfacets.random.__class__ = R",
    "random.state": "class R(type(facets.random)):\n    def _set_state(self, s): pass\nfacets.random.__class__ = R",
    "contract": "facets = dataclasses.replace(facets, contract=dataclasses.replace(facets.contract, evidence=''))",
    "close.restores": "import os; os.environ['MYCHIP_LEAK'] = '1'",
}


@pytest.mark.parametrize("part", WRONG)
def test_a_part_that_is_wrong_is_found(distributions: Any, hal_command: Any, part: str) -> None:
    distributions.stub("mychip", opens=WRAP.format(lines=WRONG[part]), torch_device="cpu")
    status, found = check(hal_command, "mychip")
    assert status == 1
    assert found[part]["outcome"] == "fails", found[part]
    assert found["open"]["outcome"] == "fulfilled"


def test_a_device_that_cuts_float32_inputs_is_not_called_ieee(distributions: Any, hal_command: Any) -> None:
    lines = "class P(type(facets.precision)):\n    def measure_input_bits(self, op): return 11\nfacets.precision.__class__ = P"
    distributions.stub("mychip", opens=WRAP.format(lines=lines), torch_device="cpu")
    _, found = check(hal_command, "mychip")
    assert found["precision.ieee"]["outcome"] == "unsupported"
    assert "matmul keeps 11" in found["precision.ieee"]["detail"]


def test_a_listing_that_changes_is_found(distributions: Any, hal_command: Any) -> None:
    distributions.stub("mychip")
    distributions.backend(
        "fickle", "from dataclasses import replace\nfrom itertools import count\nfrom hal.backend import *\n"
        "from hal.backend import Claim, Discovery\nfrom fake_dist_mychip import Stub\nnumbers = count()\n"
        "class Fickle(Stub):\n    name = 'fickle'\n    def discover(self):\n"
        "        info = super().discover().claims[0].info\n"
        "        info = replace(info, id='fickle:0', backend='fickle', torch_device='cpu', total_memory=1 + next(numbers))\n"
        "        return Discovery((Claim(info),))\nbackend = Fickle()",
    )  # fmt: skip
    status, found = check(hal_command, "fickle")
    assert (status, found["discover.repeatable"]["outcome"]) == (1, "fails")


def test_a_part_that_kills_the_process_fails_and_the_rest_is_not_called_fulfilled(
    distributions: Any, hal_command: Any
) -> None:
    lines = (
        "import os, signal\nclass R(type(facets.random)):\n    def _seed(self, seed): os.kill(os.getpid(), signal.SIGKILL)\n"
        "facets.random.__class__ = R"
    )
    distributions.stub("mychip", opens=WRAP.format(lines=lines), torch_device="cpu")
    status, found = check(hal_command, "mychip")
    assert status == 1
    assert "killed by SIGKILL" in found["random.seed"]["detail"]
    assert found["memory.stats"]["outcome"] == "fulfilled"
    assert found["contract"] == {
        "part": "contract", "outcome": "fails", "detail": "not tried: the process was killed by SIGKILL at random.seed",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("opens", "said"),
    [
        ("raise OSError('no firmware')", "no firmware"),
        ("from hal.errors import Absent\nraise Absent('taken out', device='mychip:0')", "taken out"),
        ("return 42", "not hal.Facets"),
    ],
)
def test_a_device_that_does_not_open_has_status_three_and_no_findings(
    distributions: Any, hal_command: Any, opens: str, said: str
) -> None:
    distributions.stub("mychip", opens=opens)
    done = hal_command("backend", "check", "mychip", "--json")
    assert (done.returncode, done.stdout) == (3, "")
    assert said in done.stderr


def test_an_unknown_backend_has_status_three(distributions: Any, hal_command: Any) -> None:
    done = hal_command("backend", "check", "nope")
    assert (done.returncode, "no backend of this name" in done.stderr) == (3, True)
