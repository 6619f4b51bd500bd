# SPDX-License-Identifier: Apache-2.0
"""`hal probe`: a table or JSON, recordings, agreement of two devices, and its exit statuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from hal.cli.main import main
from hal.probe import prediction, report

SMALL = {"aligned": ((64, 64, 64),), "large K": ((16, 2048, 16),)}


@pytest.fixture(autouse=True)
def _few_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    from hal.probe import recording

    for module in (prediction, recording):
        monkeypatch.setattr(module, "CLASSES", SMALL)


def probe(*arguments: str | Path) -> Any:
    return CliRunner().invoke(main, ["probe", *map(str, arguments)])


def test_the_table_tells_all_that_was_found() -> None:
    done = probe("sim:v100", "--inner", "16")
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0].startswith("sim:v100")
    assert "fingerprint " in lines[0]
    (row,) = [line for line in lines if line.startswith("float16 ")]
    assert row.split() == [
        "float16",
        "11",
        "bits",
        "4",
        "23",
        "bits,",
        "cut",
        "24",
        "bits,",
        "toward",
        "zero",
        "kept",
        "infinity",
        "kept",
    ]
    assert "K = 16: groups of 4 at once, k ascending" in done.stdout
    assert "runs alike; batches alike" in done.stdout
    assert "not multiplied: " in done.stdout
    assert lines[-2:] == [
        "all of this is the known arithmetic of sm_70; so are 8640 elements of whole products "
        "(64 rows and columns, K = 16, 512), bit by bit",
        "nothing contradicts the declared contract",
    ]


def test_json_is_of_its_schema_and_agrees_with_python() -> None:
    done = probe("sim:v100", "--inner", "16", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found == json.loads(json.dumps(report.probe("sim:v100", 16).as_json()))
    assert found["schema"] == "hal.probe/1"
    assert found["nearest"]["archs"] == ["sm_70"]


def test_a_process_of_its_own_gives_the_same_status_and_plain_text(hal_command: Any) -> None:
    done = hal_command("probe", "sim:v100", "--inner", "16")
    assert done.returncode == 0, done.stderr
    assert "sm_70" in done.stdout
    assert "\x1b" not in done.stdout


def test_slices_of_k_are_told_beside_the_unit_that_sums_each() -> None:
    done = probe("sim:v100/splitk=2", "--inner", "16")
    assert done.exit_code == 0, done.output
    assert "all of this is the known arithmetic of sm_70, with K in 2 slices; so are" in done.stdout


def test_an_arithmetic_that_nobody_knows_is_told_with_its_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = report.probe("sim:v100/splitk=4", 16)
    units = {**facts.units, "float16": replace(facts.units["float16"], sums="up")}
    monkeypatch.setattr(report, "probe", lambda *_: replace(facts, units=units))
    done = probe("sim:v100/splitk=4")
    assert "no known arithmetic; nearest is sm_70, which differs in float16: sums, with K in 4 slices" in done.stdout


def test_what_is_unusual_of_a_sum_is_in_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = report.probe("sim:v100", 16)
    unit = replace(facts.units["float16"], exponents="normalised", products_under_sum=31, rest_under_sum="rounded down",
                   stored="toward zero", small_sum="rounded down", longer={"512": "no tree: it \x1bchanges"})  # fmt: skip
    monkeypatch.setattr(report, "probe", lambda *_: replace(facts, units={**facts.units, "float16": unit}))
    out = probe("sim:v100").stdout
    assert (
        "23 bits, cut, normalised; 31 under a larger sum, rounded down  24 bits, toward zero, small ones down, " in out
    )
    assert "small ones down, stored toward zero" in out
    lost = replace(unit, infinity="largest (-infinity in a)", nan="+0", zero_signs="+0 (-2^-27)",
                   overflow_stored="nan (2^16 as a sum)")  # fmt: skip
    monkeypatch.setattr(report, "probe", lambda *_: replace(facts, units={"float16": lost}))
    assert (
        "  sums to NaN (2^16 as a sum)  infinity to the largest number (-infinity in a), NaN to +0, zeros +0 (-2^-27)\n"
        in probe("sim:v100").stdout
    )
    monkeypatch.setattr(
        report, "probe", lambda *_: replace(facts, units={"float16": replace(lost, overflow="cancels")})
    )
    assert "  cancels, sums to NaN (2^16 as a sum)  infinity to" in probe("sim:v100").stdout
    assert "K = 512: no tree: it ?changes\n" in out


def test_elements_that_no_question_foretold_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = report.probe("sim:v100", 16)
    wrong = dict(facts.products["float16"].results)
    wrong[16, "wide"] = wrong[16, "wide"] + 1
    products = {**facts.products, "float16": replace(facts.products["float16"], results=wrong)}
    monkeypatch.setattr(report, "probe", lambda *_: replace(facts, products=products))
    done = probe("sim:v100")
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("no known arithmetic")]
    assert line.startswith("no known arithmetic: all answers are those of sm_70, but of 8640 elements of whole")
    assert line.endswith(" of 4160 in float16")
    assert not replace(facts, products=products).likeness.exact


def test_a_broken_promise_is_told_and_is_status_one(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = report.probe("sim:v100", 16)
    facts = replace(honest, contract=replace(honest.contract, topk_ties="lower_index"), topk_ties="higher index")
    monkeypatch.setattr(report, "probe", lambda *_: facts)
    sentence = "the contract promises the lower index of equal numbers, top-k takes higher index"
    done = probe("sim:v100")
    assert done.exit_code == 1
    assert done.stdout.splitlines()[-1] == sentence
    done = probe("sim:v100", "--json")
    assert done.exit_code == 1
    assert json.loads(done.stdout)["contradictions"] == [sentence]


def test_runs_and_batches_that_differ_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = report.probe("sim:v100", 16)
    other = replace(facts.kernels["float16"], deterministic=False, differing_batches=(1, 2), single_row="other",
                    vector="refused: no \x1b[2J")  # fmt: skip
    facts = replace(facts, kernels={"float16": other}, orders={"float16": {"single row": "k descending"}})
    monkeypatch.setattr(report, "probe", lambda *_: facts)
    done = probe("sim:v100")
    assert (
        "RUNS DIFFER; other bits in batches of 1, 2 rows; 1 row: other bits; a vector: refused: no ?[2J" in done.stdout
    )
    assert "single row: k descending" in done.stdout
    assert "\x1b" not in done.output


def test_a_recording_takes_the_place_of_a_device_on_either_side(tmp_path: Path) -> None:
    path = tmp_path / "h200.safetensors"
    done = probe("sim:h200", "--record", path, "--format", "bfloat16")
    assert done.exit_code == 0, done.output
    assert done.stdout == ""
    assert f"2 products of sim:h200 written to {path}" in done.stderr
    for sides in (("sim:h200", path), (path, "sim:h200"), (path, path)):
        done = probe("--predict", sides[0], "--against", sides[1], "--format", "bfloat16")
        assert done.exit_code == 0, done.output
        rows = [line.split() for line in done.stdout.splitlines() if line.startswith("bfloat16")]
        assert rows == [
            ["bfloat16", "aligned", "1", "of", "1", "100.0000%", "-"],
            ["bfloat16", "large", "K", "1", "of", "1", "100.0000%", "-"],
        ]


def test_where_two_devices_differ_is_told_shape_by_shape() -> None:
    arguments = ("--predict", "sim:h200", "--against", "sim:h200/splitk=4", "--format", "bfloat16")
    done = probe(*arguments)
    assert done.exit_code == 0, done.output
    assert "0 of 1" in done.stdout
    assert "16x2048x16 (" in done.stdout
    found = json.loads(probe(*arguments, "--json").stdout)
    assert found["schema"] == "hal.prediction/1"
    assert (found["predicted"]["source"], found["against"]["source"]) == ("sim:h200", "sim:h200/splitk=4")
    aligned, large = found["agreement"]
    assert (aligned["share"], aligned["differing"]) == (1.0, {})
    assert set(large["differing"]) == {"16x2048x16"}


def test_devices_without_a_format_in_common_have_nothing_to_compare() -> None:
    done = probe("--predict", "sim:v100", "--against", "sim:h200", "--format", "bfloat16")
    assert done.exit_code == 0
    assert done.stdout == "no product that both have\n"
    assert "sim:v100: no bfloat16: " in done.stderr


def test_products_that_are_refused_are_told_once_for_each_format_and_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = {"aligned": ((16, 16, 16),), "unaligned": ((65, 100, 63), (127, 129, 131), (33, 513, 77))}
    monkeypatch.setattr(prediction, "CLASSES", shapes)
    arguments = ("--predict", "sim:h200", "--against", "sim:l40s", "--format", "float8_e4m3fn", "--format", "bfloat16")
    done = probe(*arguments)
    assert done.exit_code == 0, done.output
    assert done.stderr.splitlines() == [
        f"{device}: no float8_e4m3fn (3 products, such as 65x100x63): scaled_mm: (65, 100) and (100, 63): "
        "K and N must be multiples of 16"
        for device in ("sim:h200", "sim:l40s")
    ]
    refused = json.loads(probe(*arguments, "--json").stdout)["predicted"]["refused"]
    assert len(refused) == 3
    monkeypatch.setattr(prediction, "CLASSES", {"unaligned": ((65, 100, 63),)})
    lines = probe(*arguments).stderr.splitlines()
    assert lines[0].startswith("sim:h200: no float8_e4m3fn (65x100x63): scaled_mm: (65, 100)")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [((), "give DEVICE, or both"), (("cpu", "--predict", "cpu", "--against", "cpu"), "give DEVICE, or both"),
     (("--predict", "cpu"), "give DEVICE, or both"), (("cpu", "--against", "cpu"), "give DEVICE, or both"),
     (("--predict", "cpu", "--against", "cpu", "--record", "f"), "--record writes the products of DEVICE"),
     (("cpu", "--format", "bfloat16"), "--format is for --record and --predict"),
     (("cpu", "--inner", "7"), "7 is not in the range"), (("cpu", "--inner", "4097"), "4097 is not in the range"),
     (("cpu", "--record", "f", "--format", "int8"), "no format 'int8'"),
     (("cpu", "--record", "f", "--format", "tf32"), "no format 'tf32'"),
     (("cpu", "--record", ".", "--format", "bfloat16"), "is a directory")],
)  # fmt: skip
def test_wrong_usage_is_status_two_and_writes_nothing(
    arguments: tuple[str, ...], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = probe(*arguments)
    assert done.exit_code == 2
    assert words in done.stderr
    assert done.stdout == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [("nonesuch:0",), ("nonesuch:0", "--record", "f"), ("--predict", "sim:h200", "--against", "missing.safetensors",
     "--format", "bfloat16")],
)  # fmt: skip
def test_an_unknown_device_is_status_three_and_writes_nothing(
    arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = probe(*arguments)
    assert done.exit_code == 3, done.output
    assert done.stderr.startswith("hal: ")
    assert done.stdout == ""
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_no_recording_is_status_two(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("{}")
    done = probe("--predict", tmp_path / "f", "--against", "cpu")
    assert done.exit_code == 2
    assert done.stderr.startswith(f"hal: {tmp_path / 'f'} is no recording of products")
