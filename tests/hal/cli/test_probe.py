# SPDX-License-Identifier: Apache-2.0
"""`hal probe`: the table, the JSON, the exit status, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from click.testing import CliRunner

from hal.cli.probe import probe
from hal.errors import ConfigError, HalError
from hal.probe import report


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("HAL_CACHE", str(tmp_path_factory.getbasetemp() / "probe-cache"))


def called(*arguments):
    return CliRunner().invoke(probe, list(arguments), catch_exceptions=True)


def test_the_table_of_a_known_unit_fits_and_says_which_it_is():
    done = called("sim:v100")
    assert done.exit_code == 0
    assert "float16  11 bits   4        23 bits, cut  24 bits, toward zero" in done.stdout
    assert "groups of 4 at once, k ascending" in done.stdout
    assert "all of this is the known arithmetic of sm_70" in done.stdout
    assert "nothing contradicts the declared contract" in done.stdout
    assert "not multiplied: bfloat16: V100 has no matrix unit for bfloat16" in done.stdout


def test_json_is_all_of_it():
    found = json.loads(called("sim:v100", "--json").stdout)
    assert found["schema"] == "hal.probe/1"
    assert found["nearest"] == {"archs": ["sm_70"], "exact": True, "differences": {}}
    assert found["units"]["float16"]["tree"].startswith("((((")


def test_a_contradiction_is_a_sentence_and_exit_status_1(monkeypatch):
    facts = report.probe("sim:v100")
    contract = replace(facts.contract, topk_ties="lower_index")
    monkeypatch.setattr(report, "probe", lambda name, inner: replace(facts, contract=contract, topk_ties="neither"))
    done = called("sim:v100")
    assert done.exit_code == 1
    assert "the contract promises the lower index of equal numbers, top-k takes neither" in done.stdout


def test_products_are_recorded_and_predicted(tmp_path):
    file = tmp_path / "v100.safetensors"
    assert called("sim:v100", "--record", str(file)).exit_code == 0
    done = called("--predict", "sim:v100/splitk=2", "--against", str(file))
    assert done.exit_code == 0
    assert "float16  aligned" in done.stdout
    both = json.loads(called("--predict", str(file), "--against", str(file), "--json").stdout)
    assert both["schema"] == "hal.prediction/1"
    assert [each["share"] for each in both["agreement"]] == [1.0] * 4


@pytest.mark.parametrize("arguments", [
    (), ("--predict", "cpu"), ("cpu", "--predict", "cpu", "--against", "cpu"), ("--record", "f"),
    ("cpu", "--format", "bfloat16"), ("cpu", "--inner", "3"), ("cpu", "--inner", "x"),
])  # fmt: skip
def test_options_that_do_not_go_together_are_wrong_usage(arguments):
    assert called(*arguments).exit_code == 2


def test_a_format_that_is_none_and_a_device_that_is_none_are_errors(tmp_path):
    assert isinstance(called("cpu", "--record", str(tmp_path / "f"), "--format", "int8").exception, ConfigError)
    assert isinstance(called("nothing:7").exception, HalError)
    assert list(tmp_path.iterdir()) == []
