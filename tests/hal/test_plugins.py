# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import threading
from typing import Any

import pytest

from hal import plugins
from hal.errors import Broken, ConfigError, DuplicateBackend, IncompatiblePlugin, PluginError


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


@pytest.mark.parametrize("what", ["raise RuntimeError('no driver')", "import sys; sys.exit('no driver')"])
def test_a_module_that_raises_is_broken_with_the_original_error_as_its_cause(distributions: Any, what: str) -> None:
    owner = distributions.backend("mychip", what)
    with pytest.raises(Broken, match="no driver") as caught:
        plugins.load(plugin("mychip"))
    assert isinstance(caught.value.__cause__, (RuntimeError, SystemExit))
    assert owner in str(caught.value)


@pytest.mark.parametrize(
    ("version", "error"),
    [("(2, 0)", "2.0"), ("(0, 9)", "0.9"), ("(1, 1)", "1.1"), ("'1.0'", "does not say"), ("None", "does not say")],
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
    import hal

    distributions.backend("mychip", "import os; os.environ['MYCHIP_RAN'] = '1'")
    monkeypatch.delenv("MYCHIP_RAN", raising=False)
    monkeypatch.setenv("HAL_BACKENDS", "cpu")
    assert [info.id for info in hal.list_devices()] == ["cpu"]
    import os

    assert "MYCHIP_RAN" not in os.environ


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
