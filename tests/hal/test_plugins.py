# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import sys
import threading
import time
from typing import Any

import pytest

import hal
from hal import plugins
from hal.errors import Broken, ConfigError, DuplicateBackend, IncompatiblePlugin, PluginError
from hal.scaffold import write_package


def plugin(name: str) -> plugins.Plugin:
    return next(p for p in plugins.registered() if p.name == name)


def test_the_builtin_backends_are_registered_like_everyone_elses() -> None:
    assert {"cpu", "cuda", "rocm", "ascend", "ppu"} <= {p.name for p in plugins.registered()}


def test_a_backend_of_another_distribution_is_found_with_its_owner(distributions: Any) -> None:
    owner = distributions.stub("mychip")
    assert plugin("mychip").owners == (owner,)
    assert plugins.load(plugin("mychip")).name == "mychip"


def test_two_owners_of_one_name_are_both_refused_and_both_named(distributions: Any) -> None:
    owners = [distributions.backend("mychip", "backend = 1", dist=dist) for dist in ("first", "second")]
    with pytest.raises(DuplicateBackend) as caught:
        plugins.load(plugin("mychip"))
    assert all(owner in str(caught.value) for owner in owners)


@pytest.mark.parametrize(
    "what", ["raise RuntimeError('no driver')", "import sys; sys.exit('no driver')", "raise BaseException('no driver')"]
)
def test_a_module_that_raises_is_broken_with_the_original_error_as_its_cause(distributions: Any, what: str) -> None:
    owner = distributions.backend("mychip", what)
    with pytest.raises(Broken, match="no driver") as caught:
        plugins.load(plugin("mychip"))
    assert caught.value.__cause__ is not None
    assert owner in str(caught.value)


@pytest.mark.parametrize(
    ("version", "error"),
    [
        ("(2, 0)", "2.0"),
        ("(0, 9)", "0.9"),
        ("(1, 1)", "1.1"),
        ("'1.0'", "does not say"),
        ("None", "does not say"),
        ("(True, False)", "does not say"),
    ],
)
def test_a_plugin_of_another_interface_is_refused(distributions: Any, version: str, error: str) -> None:
    code = f"""
from hal.backend import Backend
class Stub(Backend):
    plugin_api, name, vendor = {version}, "mychip", "nobody"
    def discover(self): ...
    def open(self, info, changes): ...
backend = Stub
"""
    distributions.backend("mychip", code)
    with pytest.raises(IncompatiblePlugin, match=error):
        plugins.load(plugin("mychip"))


@pytest.mark.parametrize(
    "name", ["auto", "all", "one,two", "MyChip", "my-chip", "my chip", "my:chip", "class", "a" * 51]
)
def test_a_name_by_which_nobody_could_ask_for_it_is_refused_before_its_code_runs(
    distributions: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    owner = distributions.backend(name, "import os; os.environ['MYCHIP_RAN'] = '1'", dist="odd")
    monkeypatch.delenv("MYCHIP_RAN", raising=False)
    with pytest.raises(PluginError, match=f"{owner} .*registers a backend as '{name}', which"):
        plugins.load(plugin(name))
    with pytest.raises(ConfigError, match=r"is no name for a backend|is there already"):
        write_package(name, distributions.folder, "cpu")  # one rule for both
    (answer,) = hal.explain(admitted=[plugin(name)])
    assert (answer.status, "which" in answer.reason) == ("broken", True)
    assert "MYCHIP_RAN" not in os.environ


@pytest.mark.parametrize("value", ["42", "None", "object", "int"])
def test_what_is_no_backend_is_refused(distributions: Any, value: str) -> None:
    distributions.backend("mychip", f"backend = {value}")
    with pytest.raises(PluginError, match=r"expected: an instance of hal\.Backend"):
        plugins.load(plugin("mychip"))


def test_a_backend_that_cannot_be_made_from_its_class_is_broken(distributions: Any) -> None:
    distributions.backend("mychip", "from hal.backend import Backend\nclass backend(Backend):\n    name = 'mychip'")
    with pytest.raises(Broken, match="abstract"):
        plugins.load(plugin("mychip"))


def test_a_backend_that_calls_itself_otherwise_is_refused(distributions: Any) -> None:
    distributions.stub("mychip")
    distributions.add("other", "", {"hal.backends": {"alias": "fake_dist_mychip:backend"}}, dist="aliases")
    with pytest.raises(PluginError, match="calls itself 'mychip' and is registered as 'alias'"):
        plugins.load(plugin("alias"))


def test_an_allow_list_admits_each_name_once_in_its_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAL_BACKENDS", " cuda, cpu,cuda,")
    assert [p.name for p in plugins.allowed()] == ["cuda", "cpu"]


@pytest.mark.parametrize("setting", ["", " , ", "cpu,nope"])
def test_an_allow_list_that_cannot_be_read_is_an_error_that_names_the_choices(
    monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    monkeypatch.setenv("HAL_BACKENDS", setting)
    with pytest.raises(ConfigError, match="cpu"):
        plugins.allowed()


def test_an_allow_list_keeps_the_code_of_the_others_from_running(
    distributions: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    distributions.backend("mychip", "import os; os.environ['MYCHIP_RAN'] = '1'")
    monkeypatch.delenv("MYCHIP_RAN", raising=False)
    monkeypatch.setenv("HAL_BACKENDS", "cpu")
    assert [info.id for info in hal.list_devices()] == ["cpu"]
    assert "MYCHIP_RAN" not in os.environ


def test_an_interrupt_while_a_plugin_is_imported_is_the_users(distributions: Any) -> None:
    distributions.backend("mychip", "raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        plugins.load(plugin("mychip"))


@pytest.mark.parametrize("text", ["[hal.backends]\nthis is no entry point\n", "x = y\n[hal.backends]\nz = a:b\n"])
def test_a_malformed_distribution_costs_only_itself_and_is_named(distributions: Any, text: str) -> None:
    owner = distributions.stub("mychip")
    bad = distributions.malformed("bad", text)
    assert plugin("mychip").owners == (owner,)
    assert plugin("cpu")
    if "this" in text or plugins.unreadable():  # some versions of Python read past a line without a section
        assert [problem.startswith(f"{bad}: ") for problem in plugins.unreadable()] == [True]


def test_beside_a_malformed_distribution_the_first_of_one_name_is_the_installed_one(distributions: Any) -> None:
    distributions.malformed("bad")
    second = distributions.backend("mychip", "backend = 1", dist="twice", version="1.0")
    site = distributions.folder / "newer"
    (site / "twice-2.0.dist-info").mkdir(parents=True)
    (site / "twice-2.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: twice\nVersion: 2.0\n")
    (site / "twice-2.0.dist-info" / "entry_points.txt").write_text("[hal.backends]\nmychip = newer:backend\n")
    distributions.monkeypatch.syspath_prepend(site)
    assert second == "twice 1.0"
    assert plugin("mychip").owners == ("twice 2.0",)
    assert len(plugins.unreadable()) == 1


def test_a_distribution_without_metadata_is_named_by_its_folder(distributions: Any) -> None:
    site = distributions.add("bare", "", {"hal.backends": {"bare": "bare:backend"}}, dist="bare")
    (site / "bare-1.0.dist-info" / "METADATA").unlink()
    assert str(site) in plugin("bare").owners[0]


def test_a_plugin_that_is_slow_to_import_stops_no_other_thread(distributions: Any) -> None:
    distributions.backend("slow", "import threading\ngo = threading.Event()\ngo.wait(60)\nbackend = 1")
    distributions.stub("mychip")

    def load_slow() -> None:
        with pytest.raises(PluginError):
            plugins.load(plugin("slow"))

    first = threading.Thread(target=load_slow)
    first.start()
    while "fake_dist_slow" not in sys.modules or not hasattr(sys.modules["fake_dist_slow"], "go"):
        time.sleep(0.01)
    second = threading.Thread(target=lambda: plugins.load(plugin("mychip")))
    second.start()
    second.join(30)
    finished = not second.is_alive()
    sys.modules["fake_dist_slow"].go.set()
    first.join()
    assert finished


def test_a_plugin_may_ask_hal_from_another_thread_while_it_is_imported(distributions: Any) -> None:
    distributions.stub("mychip")
    distributions.backend(
        "curious", "import threading\nfrom hal import plugins\nfound = []\n"
        "ask = threading.Thread(daemon=True, target=lambda: found.append(\n"
        "    plugins.load(next(p for p in plugins.registered() if p.name == 'mychip'))))\n"
        "ask.start()\nask.join(30)\nbackend = found[0]",
    )  # fmt: skip
    with pytest.raises(PluginError, match="calls itself 'mychip'"):
        plugins.load(plugin("curious"))


def test_many_threads_load_one_plugin_once(distributions: Any) -> None:
    distributions.stub("mychip")
    start = threading.Barrier(16)
    loaded = []

    def load() -> None:
        start.wait()
        loaded.append(plugins.load(plugin("mychip")))

    threads = [threading.Thread(target=load) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loaded) == 16
    assert len({id(backend) for backend in loaded}) == 1
