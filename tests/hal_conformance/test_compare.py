# SPDX-License-Identifier: Apache-2.0
"""Recordings are judged on a host that has no device, against the oracle and against each other."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import recordings
from rich.console import Console

from hal_conformance.execution.plan import Selection
from hal_conformance.recordings import comparison_table
from hal_conformance.recordings.bundle import Unreadable
from hal_conformance.recordings.compare import compare, labels
from hal_conformance.recordings.packed import distance, pack
from hal_conformance.report.document import to_json
from hal_conformance.result import verdict_status
from hal_conformance.verdicts import Status


def shown(found):
    stream = io.StringIO()
    comparison_table.show(found, Console(file=stream, width=100, markup=False, highlight=False))
    return stream.getvalue()


def test_one_right_recording_is_green():
    found = compare([recordings.parse(recordings.make())])
    assert [row.status for row in found.report.results] == [Status.EXACT, Status.EXACT]
    assert verdict_status(found.report.results) == 0
    assert "\x1b[2J" not in shown(found)


def test_a_recording_has_the_certificates_of_what_it_holds():
    off = recordings.parse(recordings.make(change=recordings.one_ulp), "off")
    found = compare([recordings.parse(recordings.make(), "a"), off], catalogue=recordings.FAKE)
    certified = {entry.subject: [level.state for level in entry.levels] for entry in found.report.certificates}
    assert certified == {
        "fake:0@a": ["open", "open", "open", "open", "open"],  # it holds one case of several
        "fake:0@off": ["open", "failed", "open", "open", "open"],
    }
    assert "certificate at tiny, float32: L0" in shown(found)


def test_two_equal_recordings_are_bit_equal_and_told_apart():
    found = compare([recordings.parse(recordings.make(), name) for name in ("a", "a")])
    assert [subject["id"] for subject in found.report.subjects] == ["fake:0@a#1", "fake:0@a#2"]
    assert (found.compared, found.equal, found.differences, found.facts) == (2, 2, [], [])
    assert "2 of 2 outputs are bit-equal" in shown(found)


def test_one_flipped_mantissa_bit_is_found_and_measured():
    good, bad = recordings.make(), recordings.make(change=recordings.one_ulp)
    found = compare([recordings.parse(good, "a"), recordings.parse(bad, "b")])
    statuses = [row.status for row in found.report.results]
    assert statuses == [Status.EXACT, Status.FAIL_NUMERIC] * 2
    first = found.differences[0]
    assert (first.case, first.output, first.a, first.b) == ("double.one[a]", "y", "fake:0@a", "fake:0@b")
    assert first.share == pytest.approx(1 / 6)
    assert first.worst == pytest.approx(2.0**-22)
    assert first.margins == (0.0, pytest.approx(2.0**-22))
    assert verdict_status(found.report.results) == 1
    text = shown(found)
    assert "0 of 2 outputs are bit-equal" in text
    assert "(fake:0@a, fake:0@b)" in text
    json.loads(to_json(found.as_json()))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["run/a.st", "run/b.st"], ["a.st", "b.st"]),
        (["/data/monday/cuda-0.st", "/data/tuesday/cuda-0.st"], ["monday/cuda-0.st", "tuesday/cuda-0.st"]),
        (["x/1/a.st", "x/2/a.st", "b.st"], ["1/a.st", "2/a.st", "b.st"]),
        (["a/" + "n" * 300 + "/one.st", "a/" + "n" * 300 + "/two.st"], ["one.st", "two.st"]),
        (["x", "x", "x#1"], ["x#1", "x#2", "x#1"]),
        (["a.st", "d/a.st"], ["a.st", "d/a.st"]),
    ],
)
def test_labels_tell_recordings_apart_by_as_little_as_it_takes(names, expected):
    found = labels([recordings.parse(recordings.make(), name) for name in names])
    if expected[0] != "x#1":
        assert found == [f"fake:0@{name}" for name in expected]
    assert len(set(found)) == len(names)


def test_recordings_without_a_case_in_common_are_refused():
    one, other = (recordings.parse(recordings.make(Selection((case,), scale="tiny")), case)
                  for case in ("double.one[a]", "double.two[a]"))  # fmt: skip
    with pytest.raises(Unreadable, match=r"double.one\[a\] has no case in common with any other recording"):
        compare([one, other])
    with pytest.raises(Unreadable, match=r"double.two\[a\] has no case in common"):
        compare([one, one, other])


def test_a_long_label_is_cut_in_its_middle():
    names = ["run-" + "x" * 200 + f"-node{n:02}.st" for n in (7, 8)]
    found = labels([recordings.parse(recordings.make(), name) for name in names])
    assert [label[-10:] for label in found] == ["-node07.st", "-node08.st"]
    assert all(len(label) <= 120 for label in found)


@pytest.mark.parametrize(
    "claimed",
    [["PASS", 1e19, None, None, None, None], ["PASS", None, 50, None, None, None], ["PASS", 0.5, 0.5, 9e9, None, None],
     ["PASS", -7, None, None, None, None], ["EXACT", None, None, None, None, 3], ["DEGRADED", 50, 50, None, None, None],
     ["DEGRADED", 0.5, 0.5, 0.1, None, None], ["NONDET", 50, 50, None, None, None], ["PASS", 0.1, 0.9, None, None, None],
     ["PASS", 0.5, 0.5, None, -99, None]],
)  # fmt: skip
def test_a_claim_that_contradicts_itself_is_refused(claimed):
    def claim(manifest):
        manifest["cases"][0]["claim"] = [*claimed, ""]

    with pytest.raises(Unreadable, match=f"contradicts itself: {claimed[0]} with"):
        recordings.parse(recordings.with_manifest(recordings.make(), claim))


@pytest.mark.parametrize(("status", "why"), [
    ("INCONCLUSIVE", "where there are no statistics"), ("KNOWN", "of what multiplies no matrices in bfloat16"),
])  # fmt: skip
def test_a_verdict_that_a_case_cannot_have_is_refused(status, why):
    def claim(manifest):
        manifest["cases"][0]["claim"] = [status, None, None, None, None, None, ""]

    with pytest.raises(Unreadable, match=f"contradicts itself: {status} {why}"):
        recordings.parse(recordings.with_manifest(recordings.make(), claim))


def test_differences_of_the_manifests_come_first():
    opened = copy.deepcopy(recordings.OPENED)
    opened["versions"] = {"driver": "2\x1b[31m", "library": "9"}
    other = recordings.make(opened=opened)
    found = compare([recordings.parse(recordings.make(), "a"), recordings.parse(other, "b")])
    assert [(fact.name, fact.values) for fact in found.facts] == [
        ("versions.driver", ("1", r"2\x1b[31m")),
        ("versions.hal", ("0", None)),
        ("versions.library", (None, "9")),
    ]
    assert shown(found).lstrip().startswith("manifests differ:")


def test_of_many_differences_of_the_manifests_the_first_are_printed_and_all_are_in_the_json():
    opened = copy.deepcopy(recordings.OPENED)
    opened["environment"] = {"CUDA_VISIBLE_DEVICES": "3", **{f"E{number}": "x" * 5 for number in range(40_000)}}
    opened["versions"] = {"driver": "2", "hal": "0"}
    other = recordings.make(opened=opened)
    found = compare([recordings.parse(recordings.make(), "a"), recordings.parse(other, "b")])
    text = shown(found)
    assert len(text.splitlines()) < 250
    assert "manifests differ:\n  versions.driver\n    fake:0@a: 1\n    fake:0@b: 2\n  environment.E0\n" in text
    assert f"  and {40_002 - comparison_table.FACTS} more; --json has them all" in text
    assert "CUDA_VISIBLE_DEVICES" not in text, "which card it is comes last"
    assert len(found.as_json()["differences"]["manifest"]) == 40_002


def test_of_many_recordings_each_value_is_printed_once():
    made = []
    for number in range(30):
        opened = copy.deepcopy(recordings.OPENED)
        opened["versions"] |= {"driver": "2" if number == 29 else "1", "host": f"node-{number}"}
        made.append(recordings.parse(recordings.make(opened=opened), f"r{number}"))
    text = shown(compare(made))
    assert "  versions.driver\n    fake:0@r0 and 28 others: 1\n    fake:0@r29: 2\n" in text
    assert f"    fake:0@r11: node-11\n    and {30 - comparison_table.VALUES} more values\n" in text


def test_a_crash_on_the_recording_host_is_red_here():
    found = compare([recordings.parse(recordings.make(edit=recordings.crashed))])
    assert found.report.results[0].status is Status.CRASH
    assert found.report.results[0].detail == r"died\x1b[2J"


def test_a_recording_of_which_nothing_was_judged_does_not_hide_behind_another():
    dead = recordings.make(edit=recordings.unsupported)
    found = compare([recordings.parse(recordings.make(), "good"), recordings.parse(dead, "dead")])
    assert found.unjudged() == ["fake:0@dead"]
    assert "verdict: FAILS: nothing of fake:0@dead could be judged" in shown(found)
    assert found.exit_status() == 1
    assert compare([recordings.parse(recordings.make(), "good")]).exit_status() == 0


def test_other_inputs_are_invalid():
    def edit(manifest):
        inputs = manifest["cases"][0]["inputs"]
        inputs["x"] = inputs["empty"]

    found = compare([recordings.parse(recordings.with_manifest(recordings.make(), edit))])
    assert found.report.results[0].status is Status.INVALID
    assert "the inputs x differ" in found.report.results[0].detail


def test_recordings_of_other_seeds_are_not_compared():
    other = recordings.make(Selection(recordings.SELECTION.cases, scale="tiny", seed=1))
    with pytest.raises(Unreadable, match="seed 1"):
        compare([recordings.parse(recordings.make()), recordings.parse(other)])


def test_a_case_that_one_recording_lacks_is_counted():
    other = recordings.make(Selection(("double.*",), scale="tiny"))
    found = compare([recordings.parse(recordings.make()), recordings.parse(other)])
    assert len(found.report.results) == 2 + 8
    assert found.partial == 6


def test_the_distance_of_what_is_not_finite_is_said_in_words():
    a = np.array([1, np.nan, np.inf], np.float32)
    x, y, z, none = (pack("y", b, 0) for b in (a, np.float32([1, 2, 3]), a.astype(np.float64), np.zeros((0, 2))))
    assert distance(x, x) == (0.0, 0.0, "")
    share, worst, detail = distance(x, y)
    assert (share, worst, detail) == (pytest.approx(2 / 3), None, "rows 1, 2 of 3; not finite in one of them")
    assert distance(x, z)[:2] == (1.0, None)
    assert distance(none, none)[:2] == (0.0, 0.0)


def test_comparing_imports_no_torch_and_neither_does_the_list_of_cases():
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import recordings as r\n"
        "from hal_conformance.recordings.compare import compare\n"
        "from hal_conformance.execution.plan import Catalogue\n"
        "assert len(Catalogue().all()) > 100\n"
        "assert compare([r.parse(r.make())]).report.results\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def altered(recording, change):
    """A recording in which one output holds something else than its digest says, as a forged file would."""
    entry = recording.entries[0]
    name, packed = next(iter(entry.outputs.items()))
    outputs = {**entry.outputs, name: change(packed)}
    entries = (dataclasses.replace(entry, outputs=outputs), *recording.entries[1:])
    return dataclasses.replace(recording, entries=entries)


@pytest.mark.parametrize("liar_first", [False, True])
@pytest.mark.parametrize("what", ["values", "digest"])
def test_a_recording_that_contradicts_its_digest_is_refused_in_either_order(what, liar_first):
    honest = recordings.parse(recordings.make(), "honest")

    def change(packed):
        if what == "values":
            values = packed.values.copy()
            values.reshape(-1)[0] += 1
            return dataclasses.replace(packed, values=values)
        return dataclasses.replace(packed, digest=bytes(32))

    liar = altered(recordings.parse(recordings.make(), "liar"), change)
    pair = [liar, honest] if liar_first else [honest, liar]
    with pytest.raises(Unreadable, match="one of the recordings was altered"):
        compare(pair)


def test_what_a_recording_holds_is_judged_whatever_its_digest_says():
    def change(packed):
        return dataclasses.replace(packed, values=packed.values + np.float32(7))

    liar = altered(recordings.parse(recordings.make(), "liar"), change)
    statuses = [row.status for row in compare([liar]).report.results]
    assert statuses == [Status.FAIL_NUMERIC, Status.EXACT]


def test_a_manifest_of_any_length_is_shown_in_part():
    many = {f"KEY_{number}": "1" for number in range(5000)}
    opened = copy.deepcopy(recordings.OPENED)
    opened["environment"] = many
    pair = [recordings.parse(recordings.make(), "a"), recordings.parse(recordings.make(opened=opened), "b")]
    found = compare(pair)
    text = shown(found)
    assert len(text.splitlines()) < 250
    assert "more; --json has them all" in text
    assert len(found.facts) >= 5000
