# SPDX-License-Identifier: Apache-2.0
"""A recording says what explains its numbers."""

from __future__ import annotations

import types

import torch

import hal
from hal_conformance import manifest
from hal_conformance.execution.subject import describe


def test_an_opened_device_is_described_with_libraries_flags_and_environment(monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    monkeypatch.setenv("SECRET_TOKEN", "not for a recording")
    with hal.open_device("cpu") as device:
        found = describe(device)
    assert found["versions"]["torch"] == torch.__version__
    assert {"numpy", "ml_dtypes", "python", "host", "hal", "platform"} <= found["versions"].keys()
    assert found["environment"]["ONEDNN_MAX_CPU_ISA"] == "AVX2"
    assert "SECRET_TOKEN" not in found["environment"]
    assert found["kernels"] == {}
    assert all(isinstance(value, str) for value in found["flags"].values())


def test_a_flag_that_changes_numbers_shows(monkeypatch):
    before = manifest.flags()
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", not torch.backends.cudnn.benchmark)
    after = manifest.flags()
    assert {name for name in before if before[name] != after[name]} == {"cudnn.benchmark"}


def test_a_profiler_that_fails_is_said_and_costs_nothing_else(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("CUPTI_ERROR_INSUFFICIENT_PRIVILEGES")

    monkeypatch.setattr(torch, "ones", refuse)
    device = types.SimpleNamespace(torch_device=types.SimpleNamespace(type="cuda"))
    assert set(manifest.kernels(device).values()) == {"cannot be read (RuntimeError)"}


def test_an_implementation_is_told_from_another_of_its_name(tmp_path, monkeypatch):
    import importlib
    import sys

    monkeypatch.syspath_prepend(str(tmp_path))
    seen = []
    for text in ("ops = object()\n", "ops = object()  # changed\n"):
        (tmp_path / "mine_for_manifest.py").write_text(text)
        sys.modules.pop("mine_for_manifest", None)
        importlib.invalidate_caches()
        module = importlib.import_module("mine_for_manifest")
        kind = type("Ops", (), {"__module__": "mine_for_manifest"})
        seen.append(manifest.implementation(kind(), "mine_for_manifest:ops"))
        assert manifest.implementation(module, "torch") == manifest.implementation(kind, "torch") == seen[-1]
    assert seen[0] != seen[1]
    assert seen[0]["implementation.mine_for_manifest.source"].startswith("mine_for_manifest.py ")


def test_the_version_of_an_installed_implementation_shows():
    import click

    assert manifest.implementation(click, "torch")["implementation.click"].startswith("click ")


def test_what_an_adapter_is_put_round_shows_and_pythons_own_files_do_not():
    import click  # noqa: F401

    found = manifest.implementation(types.SimpleNamespace(), "click:ops")
    assert found["implementation.click.source"].startswith("__init__.py ")
    assert not any("types" in name for name in found)


def test_an_implementation_without_a_source_file_is_none_the_worse(monkeypatch):
    import sys

    module = types.ModuleType("in_an_archive")
    module.__file__ = "/no/such/archive.zip/in_an_archive.py"
    monkeypatch.setitem(sys.modules, "in_an_archive", module)
    assert manifest.implementation(module, "in_an_archive:ops") == {}


def test_a_card_has_the_uuid_that_its_driver_gives(monkeypatch):
    with hal.open_device("cpu") as device:
        assert manifest.uuid(device) is None
    module = types.SimpleNamespace(get_device_properties=lambda where: types.SimpleNamespace(uuid=f"GPU-{where}"))
    monkeypatch.setattr(torch, "get_device_module", lambda where: module)
    assert manifest.uuid(types.SimpleNamespace(torch_device="cuda:3")) == "GPU-cuda:3"
