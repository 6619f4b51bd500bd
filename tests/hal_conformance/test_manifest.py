# SPDX-License-Identifier: Apache-2.0
"""A recording says what explains its numbers."""

from __future__ import annotations

import types

import torch

import hal
from hal_conformance import manifest
from hal_conformance.subject import describe


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
