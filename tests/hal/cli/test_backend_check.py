# SPDX-License-Identifier: Apache-2.0
"""`hal backend check` finds what is wrong: each deliberately wrong backend fails in the part that is wrong."""

from __future__ import annotations

import json
import textwrap
from typing import Any

import pytest

from hal.check.checks import PARTS

LIAR = """
import contextlib, dataclasses, os, signal, sys
from dataclasses import replace
from hal.backend import Claim, Discovery
from hal.changes import Switch
from fake_dist_honest import Stub
from hal_cpu.backend import backend as cpu

def lie(thing, **methods):
    thing.__class__ = type("Lying", (type(thing),), methods)

class Liar(Stub):
    name = "liar"

    def discover(self):
        info = super().discover().claims[0].info
        return Discovery((Claim(replace(info, id="liar:0", backend="liar", torch_device="cpu")),))

    def open(self, info, changes):
        import torch
        facets = cpu.open(info, changes)
{opens}
        return facets

{methods}

backend = Liar()
"""


def liar(distributions: Any, opens: str = "", methods: str = "") -> None:
    """Install the backend `liar`: the CPU's, with lines that run at the end of `open` and with further methods."""
    distributions.stub("honest")
    code = LIAR.format(
        opens=textwrap.indent(textwrap.dedent(opens), " " * 8),
        methods=textwrap.indent(textwrap.dedent(methods), " " * 4),
    )
    distributions.backend("liar", code)


def check(hal_command: Any, name: str) -> tuple[int, dict[str, dict[str, str]]]:
    done = hal_command("backend", "check", name, "--json", "--timeout", "120")
    assert done.stdout, done.stderr
    report = json.loads(done.stdout)
    assert (report["schema"], report["backend"], report["status"]) == ("hal.backend-check/1", name, "checked")
    assert tuple(finding["part"] for finding in report["findings"]) == PARTS
    return done.returncode, {finding["part"]: finding for finding in report["findings"]}


def test_the_cpu_fulfils_everything_or_says_what_it_lacks(distributions: Any, hal_command: Any) -> None:
    status, found = check(hal_command, "cpu")
    assert [f for f in found.values() if f["outcome"] == "fails"] == []
    assert status == 0
    lacking = {part for part, f in found.items() if f["outcome"] == "unsupported"}
    assert lacking == {"allocator", "memory.allocated", "memory.snapshot", "precision.reduced"}


LIES = {
    # What is wrong with the backend, and in which parts it must show: in these, and in no other.
    "facets": (
        """
        real = type(facets.memory)._stats
        lie(facets.memory, _stats=lambda self: replace(real(self), sources={}), _allocated=lambda self: 0,
            _pin=lambda self, tensor: None, _snapshot=lambda self: None,
            _limit_switch=lambda self: Switch("none", lambda: 0, lambda value: None), _limit_value=lambda self, n: 0)
        lie(facets.precision, autocast=lambda self, dtype, enabled=True: contextlib.nullcontext(),
            fp8_formats=lambda self: {}, deterministic=lambda self, enabled=True: None)
        lie(facets.random, _seed=lambda self, seed: None, _set_state=lambda self, state: None)

        start = type(facets.collectives).init
        def init(self, **options):
            group = start(self, **options)
            lie(group, all_gather=lambda self, output, tensor: None)
            return group
        lie(facets.collectives, init=init)

        class Backwards(type(facets.streams.event())):
            def elapsed_ms(self, later): return -1.0
        lie(facets.streams, event=lambda self: Backwards())
        facets = replace(facets, contract=replace(facets.contract, evidence=""))
        """,
        """
        def versions(self): return {"driver": 5}
        def advice(self): return "reinstall it"
        def allocator_environment(self, plan, environ): return {"FOO": "1"}
        """,
        {
            "advice", "allocator", "memory.stats", "memory.allocated", "memory.pin", "memory.snapshot", "memory.limit",
            "precision.autocast", "precision.fp8", "precision.deterministic", "random.seed", "random.state",
            "collectives", "streams", "contract", "versions", "close.refuses",
        },
    ),
    "memory": (
        """
        real = type(facets.memory)._stats
        def _stats(self):
            stats = real(self)
            return replace(stats, reserved=2**30, sources={**stats.sources, "reserved": "invented"})
        lie(facets.memory, _stats=_stats, _reset_peak=lambda self: None, _out_of_memory=lambda self, error: None)
        """,
        """
        def allocator_environment(self, plan, environ): return {"FOO": str(plan.settings())} if plan.settings() else {}
        """,
        # Without our error, a limit does not show either; a plan overwrites what the user set.
        {"allocator", "memory.peak", "memory.empty_cache", "memory.out_of_memory", "memory.limit"},
    ),
    "process": (
        """
        os.environ["MYCHIP_LEAK"] = "1"
        sys.path.append("/leak")
        sys.setrecursionlimit(5000)
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.enable_flash_sdp(False)
        torch.set_printoptions(precision=2)
        torch.manual_seed(3)
        lie(facets.memory, stats=lambda self: self._stats())
        """,
        "",
        {"open.generators", "close.refuses", "close.restores"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("lies", LIES)
def test_each_part_that_is_wrong_fails_and_no_other(distributions: Any, hal_command: Any, lies: str) -> None:
    opens, methods, wrong = LIES[lies]
    liar(distributions, opens, methods)
    status, found = check(hal_command, "liar")
    assert status == 1
    assert {part for part, finding in found.items() if finding["outcome"] == "fails"} == wrong, found
    if lies == "process":
        # torch's own names for its switches; before torch 2.9 there were fewer.
        for what in ("MYCHIP_LEAK", "/leak", "getrecursionlimit", "benchmark", "allow_tf32", "flash", "printoptions"):
            assert what in found["close.restores"]["detail"]
        assert "torch" in found["open.generators"]["detail"]
        assert "memory.stats" in found["close.refuses"]["detail"]


def test_switches_of_float32_that_stay_set_are_found(distributions: Any, hal_command: Any) -> None:
    pytest.importorskip("torch", minversion="2.9")
    liar(
        distributions,
        "torch.backends.mkldnn.conv.fp32_precision = 'bf16'\ntorch.backends.cuda.matmul.fp32_precision = 'tf32'",
    )
    _, found = check(hal_command, "liar")
    for what in ("fp32_precision of mkldnn, conv", "fp32_precision of cuda, matmul"):
        assert what in found["close.restores"]["detail"], found["close.restores"]


def test_a_device_that_cuts_float32_inputs_is_not_called_ieee(distributions: Any, hal_command: Any) -> None:
    liar(distributions, "lie(facets.precision, measure_input_bits=lambda self, operation: 11)")
    _, found = check(hal_command, "liar")
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
    liar(distributions, "lie(facets.random, _seed=lambda self, seed: os.kill(os.getpid(), signal.SIGKILL))")
    status, found = check(hal_command, "liar")
    assert status == 1
    assert "killed by SIGKILL" in found["random.seed"]["detail"]
    assert found["memory.stats"]["outcome"] == "fulfilled"
    assert found["contract"] == {
        "part": "contract", "outcome": "fails", "detail": "not tried: the process was killed by SIGKILL at random.seed",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("opens", "verdict", "said"),
    [
        ("raise OSError('no firmware')", "broken", "no firmware"),
        ("from hal.errors import Absent\nraise Absent('taken out', device='mychip:0')", "absent", "taken out"),
        ("return 42", "broken", "not hal.Facets"),
        ("import os; os._exit(9)", "broken", "opening mychip:0: the process ended with status 9"),
        ("import time; time.sleep(3600)", "broken", "opening mychip:0: the process did not answer within 15 s"),
    ],
)
def test_a_device_that_does_not_open_has_status_three_and_no_findings(
    distributions: Any, hal_command: Any, opens: str, verdict: str, said: str
) -> None:
    distributions.stub("mychip", opens=opens)
    assert_refused(hal_command, verdict, said)


@pytest.mark.parametrize(
    ("body", "verdict", "said"),
    [
        ("import os; os._exit(7)", "broken", "importing it: the process ended with status 7"),
        ("raise OSError('no library')", "broken", "no library"),
        ("raise BaseException('a panic')", "broken", "a panic"),
        ("import time; time.sleep(3600)", "broken", "importing it: the process did not answer within 15 s"),
        ("backend = 42", "broken", "is a int"),
    ],
)
def test_a_backend_that_cannot_be_imported_has_status_three_and_stops_nothing(
    distributions: Any, hal_command: Any, body: str, verdict: str, said: str
) -> None:
    distributions.backend("mychip", body)
    assert_refused(hal_command, verdict, said)


@pytest.mark.parametrize(
    ("lists", "verdict", "said"),
    [
        ("time.sleep(3600)", "broken", "listing its devices: the process did not answer within 15 s"),
        ("return Discovery((Claim(replace(info, total_memory='80GB')),))", "broken", "total_memory is '80GB'"),
        ("return Discovery((), ('a card of another maker',))", "absent", "a card of another maker"),
        ("print('{\"part\": \"open\"}'); raise Absent('no card', device='mychip')", "absent", "no card"),
    ],
)
def test_a_backend_that_cannot_list_has_status_three_and_stops_nothing(
    distributions: Any, hal_command: Any, lists: str, verdict: str, said: str
) -> None:
    distributions.stub("honest")
    distributions.backend(
        "mychip", "import time\nfrom dataclasses import replace\nfrom hal import Absent\n"
        "from hal.backend import Claim, Discovery\nfrom fake_dist_honest import Stub\n"
        "class Other(Stub):\n    name = 'mychip'\n    def discover(self):\n"
        "        info = replace(super().discover().claims[0].info, id='mychip:0', backend='mychip')\n"
        f"        {lists}\nbackend = Other()",
    )  # fmt: skip
    assert_refused(hal_command, verdict, said)


def assert_refused(hal_command: Any, verdict: str, said: str) -> None:
    done = hal_command("backend", "check", "mychip", "--json", "--timeout", "15")
    assert done.returncode == 3, done.stdout
    report = json.loads(done.stdout)
    assert (report["status"], report["findings"]) == (verdict, [])
    assert said in report["reason"]
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unknown_backend_has_status_three_and_no_report(distributions: Any, hal_command: Any) -> None:
    done = hal_command("backend", "check", "nope", "--json")
    assert (done.returncode, done.stdout, "no backend of this name" in done.stderr) == (3, "", True)
