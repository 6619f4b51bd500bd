# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch

import hal
from hal.autoload import AUTOLOAD
from hal.backend import Claim, DeviceInfo, Discovery, Specificity
from hal.registry import _of_rank
from hal.surveys import Survey, settle, undecided


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> Any:
    return lambda *names: monkeypatch.setenv("HAL_BACKENDS", ",".join(names))


def claims(backend: str, specificity: Specificity, *torch_devices: str, simulated: bool = False) -> Survey:
    found = tuple(
        Claim(DeviceInfo(f"{backend}:{i}", backend, "v", None, None, None, device, simulated), specificity)
        for i, device in enumerate(torch_devices)
    )
    return Survey(backend, (), Discovery(found), None)


def test_the_most_specific_claim_takes_each_device_by_itself() -> None:
    general = claims("general", Specificity.PLATFORM, "cuda:0", "cuda:1")
    special = claims("special", Specificity.PRODUCT, "cuda:1")
    for order in ([general, special], [special, general]):
        kept, lost = settle(order)
        assert {info.id for info in kept} == {"general:0", "special:0"}
        assert lost == {"general:1": "cuda:1 is special:0, a more specific claim"}


def test_equal_claims_lose_both_and_name_each_other() -> None:
    kept, lost = settle([claims("one", Specificity.PLATFORM, "cuda:0"), claims("two", Specificity.PLATFORM, "cuda:0")])
    assert kept == []
    assert "two:0" in lost["one:0"]
    assert "one:0" in lost["two:0"]
    assert "HAL_BACKENDS" in lost["one:0"]


def test_a_simulated_device_contests_nothing() -> None:
    surveys = [claims("cpu", Specificity.PLATFORM, "cpu"), claims("sim", Specificity.PRODUCT, "cpu", simulated=True)]
    assert [info.id for info in settle(surveys)[0]] == ["cpu:0", "sim:0"]


@pytest.mark.parametrize("specificity", list(Specificity))
def test_nobody_takes_the_hosts_cpu_from_another(specificity: Specificity) -> None:
    surveys = [claims("grab", specificity, "cpu"), claims("cpu", Specificity.PLATFORM, "cpu")]
    kept, lost = settle(surveys)
    assert [info.id for info in kept] == ["grab:0", "cpu:0"]
    assert lost == {}
    assert undecided(surveys) == []


def test_a_second_backend_on_the_cpu_is_listed_opened_and_left_out_by_auto_alike(distributions: Any, only: Any) -> None:
    distributions.stub("grab", torch_device="cpu")
    only("grab", "cpu")
    assert [info.id for info in hal.list_devices()] == ["grab:0", "cpu"]
    for name, opened in {"cpu": "cpu", "grab": "grab:0", "auto": "cpu"}.items():
        with hal.open_device(name) as device:
            assert device.info.id == opened


def test_a_rank_takes_the_device_of_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    many = claims("many", Specificity.PLATFORM, *(f"cuda:{i}" for i in range(4)))
    four = [claim.info for claim in many.discovery.claims]
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert _of_rank(four) == (four[0], "")
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert _of_rank(four) == (four[2], ", of LOCAL_RANK=2")
    assert _of_rank(four[:1]) == (four[0], "")
    monkeypatch.setenv("LOCAL_RANK", "4")
    with pytest.raises(hal.Absent, match=r"many: .*rank 4 of its host, and there are 4 devices"):
        _of_rank(four)
    with hal.open_device("cpu") as device:
        assert device.info.id == "cpu"


PAIR = """
import dataclasses
from hal.backend import Backend, Claim, DeviceInfo, Discovery, Specificity

class Pair(Backend):
    plugin_api = (1, 0)
    name = "pair"
    vendor = "nobody"

    def discover(self):
        return Discovery(tuple(
            Claim(DeviceInfo(f"pair:{i}", "pair", "nobody", None, None, None, f"pair:{i}", evidence=("a stub",)),
                  Specificity.PLATFORM) for i in range(2)))

    def open(self, info, changes):
        from hal_cpu.backend import backend as cpu
        return cpu.open(info, changes)

backend = Pair()
"""


def test_an_index_names_one_device_for_all_ranks(
    distributions: Any, only: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    distributions.backend("pair", PAIR)
    only("pair")
    monkeypatch.setenv("LOCAL_RANK", "1")
    for name, opened in {"pair": "pair:1", "auto": "pair:1", "pair:0": "pair:0"}.items():
        with hal.open_device(name) as device:
            assert device.info.id == opened
            assert ("LOCAL_RANK=1" in device.because) == (opened == "pair:1")


ABSENT_FIRST = PAIR.replace(
    "        from hal_cpu",
    """        if info.id == "pair:0":
            from hal.errors import Absent
            raise Absent("gone", device=info.id)
        from hal_cpu""",
)


def test_auto_goes_on_to_the_next_device_of_a_backend(
    distributions: Any, only: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    distributions.backend("pair", ABSENT_FIRST)
    only("pair", "cpu")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with hal.open_device("auto") as device:
        assert device.info.id == "pair:1"


def test_a_rank_without_a_device_does_not_end_up_on_the_cpu(
    distributions: Any, only: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    distributions.backend("pair", PAIR)
    only("pair", "cpu")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(hal.Absent, match="rank 2 of its host, and there are 2 devices"):
        hal.open_device("auto")


def test_an_unknown_device_names_the_known_ones() -> None:
    with pytest.raises(hal.UnknownDevice, match=r"expected: .*cpu.*auto"):
        hal.open_device("nope:3")


@pytest.mark.parametrize("name", ["cpu:7", "cpu:"])
def test_an_index_that_is_not_there_is_absent(name: str) -> None:
    with pytest.raises(hal.Absent, match="one of: cpu"):
        hal.open_device(name)


def test_a_backend_that_the_allow_list_excludes_is_unknown_and_says_why(only: Any) -> None:
    only("cuda")
    with pytest.raises(hal.UnknownDevice, match="HAL_BACKENDS does not admit"):
        hal.open_device("cpu")


def test_the_variable_names_the_device_where_nobody_else_does(monkeypatch: pytest.MonkeyPatch, only: Any) -> None:
    only("cpu")
    monkeypatch.setenv("HAL_DEVICE", "cpu:0")
    with hal.open_device() as device:
        assert (device.info.id, device.because) == ("cpu", "HAL_DEVICE=cpu:0")
    monkeypatch.setenv("HAL_DEVICE", "nope")
    with pytest.raises(hal.UnknownDevice, match="HAL_DEVICE=nope asks for it"):
        hal.open_device()
    for empty in ("", " "):
        monkeypatch.setenv("HAL_DEVICE", empty)
        with pytest.raises(hal.ConfigError, match=f"HAL_DEVICE is '{empty}'(?s:.*)unset HAL_DEVICE"):
            hal.open_device()
    with hal.open_device("cpu") as device:
        assert device.because == "asked for by name"


@pytest.mark.parametrize("name", [3, b"cpu", ["cpu"], torch.device("cpu"), "", " "], ids=repr)
def test_what_is_no_name_is_an_error_that_says_so(name: Any) -> None:
    for ask in (hal.open_device, lambda name: hal.plan_environment(name, hal.AllocatorPlan())):
        with pytest.raises(hal.ConfigError, match=r"is named by (?s:.*)such as 'cpu'"):
            ask(name)


def test_what_is_no_allocator_plan_is_refused() -> None:
    with pytest.raises(hal.ConfigError, match="allocator is a str"):
        hal.open_device("cpu", allocator="expandable")  # type: ignore[arg-type]


def test_facets_that_are_none_are_the_backends_fault_and_what_opening_changed_is_put_back(
    distributions: Any, only: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MYCHIP_SETTING", raising=False)
    distributions.stub(
        "mychip", opens="import dataclasses\nfrom hal_cpu.backend import backend as cpu\n"
        "changes.set_environment('MYCHIP_SETTING', '1')\n"
        "return dataclasses.replace(cpu.open(info, changes), random=None)",
    )  # fmt: skip
    only("mychip")
    with pytest.raises(hal.Broken, match="opening it raised AttributeError"):
        hal.open_device("mychip:0")
    assert "MYCHIP_SETTING" not in os.environ


def test_auto_says_what_it_chose_and_what_it_passed_over(
    distributions: Any, only: Any, caplog: pytest.LogCaptureFixture
) -> None:
    distributions.backend("broken", "raise OSError('no driver')")
    only("broken", "cpu")
    with caplog.at_level(logging.WARNING, "hal"), hal.open_device("auto") as device:
        assert device.info.id == "cpu"
        assert device.because == "auto: no accelerator was found (broken: BROKEN)"
    assert "no driver" in caplog.text


def test_auto_goes_on_where_an_accelerator_turns_out_to_be_absent_and_says_so(distributions: Any, only: Any) -> None:
    for name in ("first", "second"):
        distributions.stub(
            name, opens=f"from hal.errors import Absent\nraise Absent('{name} is gone', device='{name}:0')"
        )
    distributions.stub("third")
    only("first", "second", "third", "cpu")
    with hal.open_device() as device:
        assert device.info.id == "third:0"
        assert "first:0: absent on opening: first is gone" in device.because
        assert "second:0: absent on opening: second is gone" in device.because
    only("cpu", "first")
    with hal.open_device() as device:
        assert device.info.id == "cpu"
        assert "first is gone" in device.because
    only("first")
    with pytest.raises(hal.Absent, match="first is gone"):
        hal.open_device()


def test_auto_never_passes_over_a_device_that_is_there_and_broken(distributions: Any, only: Any) -> None:
    distributions.stub("dead", opens="raise OSError('firmware does not answer')")
    only("dead", "cpu")
    with pytest.raises(hal.Broken, match=r"firmware does not answer(?s:.*)try: .*HAL_DEVICE=cpu") as caught:
        hal.open_device()
    assert isinstance(caught.value.__cause__, OSError)


def test_auto_names_the_devices_that_two_backends_contest(
    distributions: Any, only: Any, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("one", "two"):
        distributions.stub(name, torch_device="chip:0")
    only("one", "two", "cpu")
    contest = "chip:0 is claimed equally by one:0 and two:0"
    with caplog.at_level(logging.WARNING, "hal"), hal.open_device() as device:
        assert device.info.id == "cpu"
        assert contest in device.because
    assert contest in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "hal"):
        assert [info.id for info in hal.list_devices()] == ["cpu"]
    assert contest in caplog.text
    only("one", "two")
    with pytest.raises(hal.Absent, match=contest):
        hal.open_device()


def test_auto_prefers_an_accelerator(distributions: Any, only: Any) -> None:
    distributions.stub("mychip")
    only("cpu", "mychip")
    with hal.open_device() as device:
        assert device.info.id == "mychip:0"


def test_auto_never_takes_a_simulated_device(distributions: Any, only: Any) -> None:
    distributions.stub("mychip", torch_device="cpu", opens="raise AssertionError")
    distributions.backend(
        "sim", "from fake_dist_mychip import Stub\nfrom dataclasses import replace\n"
        "from hal.backend import Claim, Discovery\n"
        "class Sim(Stub):\n    name = 'sim'\n    def discover(self):\n"
        "        info = super().discover().claims[0].info\n"
        "        return Discovery((Claim(replace(info, id='sim:0', backend='sim', simulated=True)),))\n"
        "backend = Sim()",
    )  # fmt: skip
    only("sim")
    with pytest.raises(hal.Absent, match="no backend found a real device"):
        hal.open_device("auto")


def test_a_broken_backend_leaves_the_list_with_a_warning_and_is_raised_when_asked_for(
    distributions: Any, only: Any, caplog: pytest.LogCaptureFixture
) -> None:
    distributions.backend("broken", "raise OSError('no driver')")
    only("cpu", "broken")
    with caplog.at_level(logging.WARNING, "hal"):
        assert [info.id for info in hal.list_devices()] == ["cpu"]
    assert "no driver" in caplog.text
    with pytest.raises(hal.Broken, match="no driver") as caught:
        hal.open_device("broken")
    assert isinstance(caught.value.__cause__, OSError)


@pytest.mark.parametrize(
    "answer",
    [
        "return None",
        "return [1]",
        "raise ZeroDivisionError('a bug')",
        "raise SystemExit(1)",
        "return Discovery((DeviceInfo('mychip:0', 'mychip', 'v', None, None, None, 'cpu'),))",
        "return Discovery((Claim(DeviceInfo('cpu:0', 'cpu', 'v', None, None, None, 'cpu')),))",
        "return Discovery((Claim(DeviceInfo('mychip2', 'mychip2', 'v', None, None, None, 'cpu')),) * 2)",
        "return Discovery((Claim(DeviceInfo('mychip2', 'mychip2', 'v', None, None, None, 'cpu'), 5),))",
        "return Discovery((Claim(DeviceInfo('mychip2', 'mychip2', 'v', None, None, None, 'cpu'), None),))",
        "return Discovery((Claim(DeviceInfo('mychip2', 'mychip2', 'v', None, None, '80GB', 'cpu')),))",
        "import numpy\n        return Discovery((Claim(DeviceInfo('mychip2', 'mychip2', 'v', None, None, numpy.int64(1), 'cpu')),))",
        "return Discovery((Claim(DeviceInfo('mychip2', 'mychip2', 'v', None, None, True, 'cpu')),))",
        "return Discovery((Claim(DeviceInfo('mychip2', 'mychip2', 'v', 7, None, None, 'cpu')),))",
        "return Discovery((Claim(DeviceInfo(None, 'mychip2', 'v', None, None, None, 'cpu')),))",
        "return Discovery((Claim(DeviceInfo('mychip2', 'mychip2', 'v', None, None, None, None)),))",
        "return Discovery((Claim(DeviceInfo('mychip2', 'mychip2', 'v', None, None, None, 'cpu', evidence='text')),))",
        "return Discovery((), left=None)",
        "return Discovery((), left='text')",
        "raise BaseException('as a panic of another language is')",
    ],
)
def test_an_answer_that_is_no_discovery_makes_the_backend_broken_and_no_other(
    distributions: Any, only: Any, answer: str
) -> None:
    distributions.stub("mychip")
    distributions.backend(
        "mychip2", "from hal.backend import *\nfrom hal.backend import Discovery, Claim, DeviceInfo\n"
        "from fake_dist_mychip import Stub\n"
        f"class Other(Stub):\n    name = 'mychip2'\n    def discover(self):\n        {answer}\nbackend = Other()",
    )  # fmt: skip
    only("mychip2", "cpu")
    assert [info.id for info in hal.list_devices()] == ["cpu"]
    with pytest.raises(hal.Broken):
        hal.open_device("mychip2")
    only("mychip2")
    (explanation,) = hal.explain(timeout_s=60)
    assert explanation.status == "broken"


@pytest.mark.parametrize(
    "what",
    [
        "raise RuntimeError('no')", "raise SystemExit(2)", "raise KeyError('no')", "raise BaseException('no')",
        "raise type('Mute', (Exception,), {'__str__': lambda self: 1 / 0})",
    ],
)  # fmt: skip
def test_whatever_open_raises_is_broken_with_its_cause_and_puts_everything_back(
    distributions: Any, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MYCHIP_SETTING", "before")
    distributions.stub("mychip", opens=f"changes.set_environment('MYCHIP_SETTING', 'after')\n{what}")
    with pytest.raises(hal.Broken, match="mychip:0: opening it raised") as caught:
        hal.open_device("mychip")
    assert caught.value.__cause__ is not None
    assert os.environ["MYCHIP_SETTING"] == "before"


def test_an_interrupt_while_opening_passes_and_puts_everything_back(
    distributions: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MYCHIP_SETTING", "before")
    distributions.stub("mychip", opens="changes.set_environment('MYCHIP_SETTING', 'x')\nraise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        hal.open_device("mychip")
    assert os.environ["MYCHIP_SETTING"] == "before"


def python(code: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_autoload_is_off_only_while_torch_is_imported(distributions: Any) -> None:
    said = "import os\ndef load(): print('loaded')\nprint('autoloaded with', os.environ.get('TORCH_DEVICE_BACKEND_AUTOLOAD'))"
    distributions.add("fake_torch_plugin", said, {"torch.backends": {"plugin": "fake_torch_plugin:load"}}, dist="tp")
    code = f"""
import os, hal
os.environ["{AUTOLOAD}"] = "1"
with hal.open_device("cpu") as device:
    # A child of the user's must find the environment that the user made.
    print(list(device.changes), os.environ["{AUTOLOAD}"])
"""
    assert python(code) == ["[] 1"]


def test_torch_is_imported_with_the_plan_although_another_thread_opens_at_the_same_time(
    distributions: Any, only: Any
) -> None:
    only("planned", "cpu")  # the others look for torch while they list, which the finder below would see
    distributions.stub("mychip")
    distributions.backend(
        "planned", "from fake_dist_mychip import Stub\nimport time\n"
        "class Planned(Stub):\n    name = 'planned'\n    def discover(self):\n"
        "        from dataclasses import replace\n        from hal.backend import Claim, Discovery\n"
        "        info = super().discover().claims[0].info\n"
        "        return Discovery((Claim(replace(info, id='planned:0', backend='planned', torch_device='planned:0')),))\n"
        # Long enough for another thread to import torch between the look at sys.modules and our own import.
        "    def allocator_environment(self, plan, environ):\n        time.sleep(1)\n"
        "        return {'PLANNED': str(plan.max_split_size_mb)}\n"
        "backend = Planned()",
    )  # fmt: skip
    code = """
import os, sys, threading, time, hal

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print("torch is imported with", os.environ.get("PLANNED"))

sys.meta_path.insert(0, Finder())
plan = hal.AllocatorPlan(max_split_size_mb=64)
first = threading.Thread(target=lambda: hal.open_device("planned", allocator=plan))
first.start()
time.sleep(0.5)
hal.open_device("cpu")
first.join()
"""
    assert python(code) == ["torch is imported with 64"]


def test_many_threads_open_one_device_and_all_get_one() -> None:
    start = threading.Barrier(12)
    opened: list[hal.Device] = []

    def use() -> None:
        start.wait()
        opened.append(hal.open_device("cpu"))

    threads = [threading.Thread(target=use) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({device.changes.owner for device in opened}) == 12
    for device in opened:
        device.close()


def test_allocator_settings_that_come_after_torch_are_refused() -> None:
    with pytest.raises(hal.ConfigError, match="torch is already imported"):
        hal.open_device("cpu", allocator=hal.AllocatorPlan(expandable_segments=True))
