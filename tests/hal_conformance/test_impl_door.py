# SPDX-License-Identifier: Apache-2.0
"""The public door: `hal conformance run --impl module:object`, in a process of its own, as a user calls it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SOME = ("router.weights", "router.tie_order", "experts.*", "combine.*", "dispatch.permutation", "losses.aux")


def run(name, tmp_path, cases):
    report = tmp_path / "report.json"
    arguments = [f"--case={case}" for case in cases]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "hal.cli.main",
            "conformance",
            "run",
            "--device",
            "cpu",
            "--scale",
            "tiny",
            "--impl",
            f"hal_conformance.faults:{name}",
            "--json",
            str(report),
            "--dtype",
            "bfloat16",
            "--dtype",
            "float32",
            *arguments,
        ],
        cwd=HERE,
        env={**os.environ, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    return done, json.loads(report.read_text())


@pytest.mark.parametrize(
    ("name", "case", "status"),
    [
        ("drops_a_token", "experts.integers", "FAIL-NUMERIC"),
        ("swaps_two_rows", "experts.one_hot", "FAIL-NUMERIC"),
        ("leaks_bias", "router.weights", "FAIL-NUMERIC"),
        ("skips_renormalisation", "router.weights", "FAIL-NUMERIC"),
        ("accumulates_in_bfloat16", "experts.cancelling", "FAIL-NUMERIC"),
        ("combines_in_bfloat16", "combine.exact", "FAIL-NUMERIC"),
        ("higher_index_first", "router.tie_order", "FAIL-DISCRETE"),
    ],
)
def test_a_wrong_implementation_is_red_and_exits_1(name, case, status, tmp_path):
    done, report = run(name, tmp_path, [case])
    assert done.returncode == 1, done.stderr
    found = {row["status"] for row in report["results"] if row["case"].startswith(case)}
    assert status in found
    assert status in done.stdout


@pytest.mark.parametrize(
    ("name", "case", "status", "words"),
    [
        ("writes_its_weights", "experts.backward", "FAIL-STRUCTURE", "wrote into its input w2_EDF"),
        ("writes_before_the_slice", "experts.sliced", "FAIL-STRUCTURE", "experts wrote into its argument"),
        ("fails_without_rows", "experts.no_rows", "CRASH", "invalid configuration argument"),
        ("route_without_gradient", "router.backward", "FAIL-STRUCTURE", "requires no gradient"),
        ("detached_scores", "router.backward", "FAIL-STRUCTURE", "requires no gradient"),
        ("needs_trained_weights", "experts.frozen", "FAIL-STRUCTURE", "requires no gradient"),
        ("refuses_odd_widths", "experts.unaligned", "CRASH", "misaligned address"),
        ("replays_long_only", "router.int32", "CRASH", "expected scalar type Long"),
        ("dispatches_long_only", "dispatch.int32", "CRASH", "expected scalar type Long"),
        ("dispatches_wide_only", "dispatch.small_integers", "CRASH", "expected scalar type Int or Long"),
        ("combines_long_only", "combine.int32", "CRASH", "expected scalar type Long"),
        ("balances_long_only", "losses.aux_int32", "CRASH", "expected scalar type Long"),
        ("no_scores_of_frozen_tokens", "router.frozen", "FAIL-STRUCTURE", "scores_TE: a NoneType came back"),
    ],
)
def test_what_an_implementation_does_in_training_alone_is_seen(name, case, status, words, tmp_path):
    done, report = run(name, tmp_path, [case])
    assert done.returncode == 1, done.stderr
    assert {row["status"] for row in report["results"] if row["case"].startswith(f"{case}[")} == {status}
    assert words in report["results"][0]["detail"]


@pytest.mark.parametrize("name", ["reversed", "split_k", "blocked", "wide"])
def test_an_honest_implementation_in_another_order_is_green_and_exits_0(name, tmp_path):
    done, report = run(name, tmp_path, SOME)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(report["results"]) > 100
    assert {row["status"] for row in report["results"]} <= {"EXACT", "PASS", "PASS-AMBIGUOUS"}
