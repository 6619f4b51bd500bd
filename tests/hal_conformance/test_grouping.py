# SPDX-License-Identifier: Apache-2.0
"""Among cards that should be alike the odd one out is named."""

from __future__ import annotations

import copy
import io
import json

import fake_cases
import numpy as np
import pytest
import recordings
import torch
from click.testing import CliRunner
from rich.console import Console

from hal.contract import Contract
from hal.moe import ExpertWeights
from hal.moe.torch_ops import torch_ops
from hal_conformance import arrays
from hal_conformance.cases import ALL
from hal_conformance.cli import conformance
from hal_conformance.execution.observation import Observation
from hal_conformance.execution.plan import Catalogue, Selection, plan
from hal_conformance.execution.subject import Subject
from hal_conformance.recordings import comparison_table, recording
from hal_conformance.recordings.bundle import Unreadable
from hal_conformance.recordings.compare import compare
from hal_conformance.report.document import to_json
from hal_conformance.verdicts import Judgement, Status


def card(number, driver="550.54", change=lambda y: y, environment=None, **versions):
    opened = copy.deepcopy(recordings.OPENED)
    opened["info"]["id"] = f"fake:{number}"
    opened["environment"] = environment or {}
    opened["versions"] |= {"driver": driver, "host": f"host-{number}", **versions}
    return recordings.parse(recordings.make(opened=opened, change=change), f"card-{number}")


def shown(found, width=160, **options):
    stream = io.StringIO()
    comparison_table.show(found, Console(file=stream, width=width, markup=False, highlight=False), **options)
    return stream.getvalue()


class FlippedBit:
    """The portable operators on a card that flips one mantissa bit of one expert's weights while it computes."""

    def experts(self, x_RD, counts_E, weights):
        w1 = weights.w1_EFD.clone()
        w1.view(torch.int32)[int(counts_E.argmax()), 5, 18] ^= 1 << 9  # of the channel that one-hot rows pick
        return torch_ops.experts(x_RD, counts_E, ExpertWeights(w1, weights.w3_EFD, weights.w2_EDF))


def test_of_ten_cards_the_one_with_a_flipped_bit_of_a_weight_is_named(tmp_path):
    selection = Selection(("experts.one_hot[mixtral-8x7b]", "experts.random[mixtral-8x7b]"), ("float32",), "tiny")
    opened = {**recordings.OPENED, "contract": Contract().as_json()}

    def record(ops, number):
        seen = []
        for task in plan(selection, ALL):
            inputs = task.case.inputs(task.params)
            tensors = {name: arrays.to_torch(array, torch.device("cpu")) for name, array in inputs.items()}
            outputs = {n: arrays.from_torch(t) for n, t in task.case.run(ops, tensors, task.params).items()}
            seen.append(Observation(task, None, outputs=outputs, hashes=arrays.digests(inputs)))
        mine = {**opened, "versions": {"driver": "550.54", "host": f"node-{number}"}}
        data = recording.write(Subject("cpu"), mine, selection, seen)
        (tmp_path / f"{number}.safetensors").write_bytes(data)
        return recording.parse(data, f"{number}", Catalogue())

    cards = [record(FlippedBit() if number == 6 else torch_ops, number) for number in range(10)]
    found = compare(cards, group_by="driver")
    (group,) = found.grouping.groups.values()
    (odd,) = group.odd.values()
    assert (odd.recording, odd.others, odd.tasks, odd.explained_by) == ("fake:0@6", 9, 2, [])
    assert odd.first.startswith("experts.one_hot[mixtral-8x7b] float32: y_RD, rows ")
    assert found.odd() == ["fake:0@6"]
    assert found.exit_status() == 1
    text = shown(found)
    assert "odd one out: fake:0@6" in text
    assert "in 2 tasks; nothing in its manifest says why" in text
    assert "; 9 others agree" in text
    odd_ones = json.loads(to_json(found.as_json()))["grouping"]["groups"][0]["odd"]
    assert [entry["recording"] for entry in odd_ones] == ["fake:0@6"]
    files = [str(path) for path in sorted(tmp_path.iterdir())]
    ran = CliRunner().invoke(conformance, ["compare", *files, "--group-by", "driver"])
    assert ran.exit_code == 1
    assert "6.safetensors is not like the others of its group, and nothing says why" in ran.stderr
    assert CliRunner().invoke(conformance, ["compare", *files[:3], "--group-by", "colour"]).exit_code == 2


def test_cards_that_are_alike_are_green():
    found = compare([card(number) for number in range(3)], group_by="versions.driver")
    (group,) = found.grouping.groups.values()
    assert (group.value, group.compared, group.alike, group.odd) == ("550.54", 2, 2, {})
    assert found.grouping.colour() == "green"
    assert found.exit_status(strict=True) == 0
    assert "550.54: 3 recordings, all alike in 2 of 2 tasks" in shown(found)


def test_of_two_that_differ_nobody_is_named():
    found = compare([card(0), card(1, change=recordings.one_ulp)], group_by="driver")
    (group,) = found.grouping.groups.values()
    assert (group.split, group.open, group.odd) == (2, 0, {})
    assert found.grouping.colour() == "amber"
    assert "2 without a majority (any may be wrong; first double.one[a] float32: y, rows 0 of 2" in shown(found)


def test_of_two_against_two_nobody_is_named_and_it_is_no_lack_of_determinism():
    found = compare(
        [judged_alike(n, change=recordings.one_ulp if n > 1 else lambda y: y) for n in range(4)], group_by="driver"
    )
    (group,) = found.grouping.groups.values()
    assert (group.split, group.open, group.odd) == (2, 0, {})
    assert found.grouping.colour() == "amber"
    assert found.exit_status(strict=True) == 1


def test_two_cards_that_share_the_reason_do_not_rule_each_other_out():
    cards = [card(0), card(1), card(2), *(card(n, change=recordings.one_ulp, cublas="12.1") for n in (3, 4))]
    found = compare(cards, group_by="arch")
    (group,) = found.grouping.groups.values()
    assert [odd.explained_by for odd in group.odd.values()] == [["versions.cublas is 12.1, elsewhere (not there)"]] * 2
    assert found.grouping.colour() == "amber"


def test_what_the_majority_does_not_share_explains_nothing():
    cards = [*(card(n, serial=str(n)) for n in range(3)), card(3, change=recordings.one_ulp, serial="3")]
    assert compare(cards, group_by="driver").odd() == ["fake:3@card-3"]


@pytest.mark.parametrize(
    "variable", ["TORCH_HOME", "CUDA_CACHE_PATH", "TRITON_CACHE_DIR", "NCCL_SOCKET_IFNAME", "HAL_CONFORMANCE_TIMEOUT"]
)
def test_where_files_lie_excuses_no_card(variable):
    cards = [card(n, change=recordings.one_ulp if n == 2 else lambda y: y, environment={variable: "b"} if n == 2 else {})
             for n in range(3)]  # fmt: skip
    assert compare(cards, group_by="driver").odd() == ["fake:2@card-2"]


@pytest.mark.parametrize("status", [Status.UNSUPPORTED, Status.CRASH])
def test_a_card_without_outputs_where_the_others_have_some_is_odd(status):
    cards = [card(n) for n in range(3)]
    for entry in cards[2].entries:
        for field, value in {"status": status, "detail": "no kernel", "outputs": {}, "claim": None}.items():
            object.__setattr__(entry, field, value)
    found = compare(cards, group_by="driver")
    (group,) = found.grouping.groups.values()
    (odd,) = group.odd.values()
    assert (odd.recording, odd.tasks) == ("fake:2@card-2", 2)
    assert odd.first == f"double.one[a] float32: {status.value} (no kernel)"
    assert (group.compared, group.alike) == (2, 0)
    assert found.odd() == ["fake:2@card-2"]


def test_one_that_has_outputs_where_most_have_none_is_no_odd_one():
    cards = [card(n) for n in range(4)]
    for one in cards[:3]:
        for entry in one.entries:
            for field, value in {"status": Status.UNSUPPORTED, "detail": "", "outputs": {}, "claim": None}.items():
                object.__setattr__(entry, field, value)
    found = compare(cards, group_by="driver")
    assert found.odd() == []
    assert found.grouping.colour() == "green"


def test_a_reason_must_hold_for_all_that_it_explains():
    """Cards of an older driver are like the rest in one task: the driver does not explain who is alone there."""

    def of(number, first=lambda y: y, second=lambda y: y, driver="550"):
        made = judged_alike(number, driver=driver)
        for entry, change in zip(made.entries, (first, second), strict=True):
            (name,) = entry.outputs
            changed = recordings.parse(recordings.make(change=change)).entries[made.entries.index(entry)].outputs[name]
            object.__setattr__(entry, "outputs", {name: changed})
        return made

    old = {"driver": "535", "first": recordings.one_ulp}
    cards = [*(of(n) for n in range(4)), of(4, **old), of(5, **old, second=recordings.one_ulp)]
    (group,) = compare(cards, group_by="arch").grouping.groups.values()
    assert {odd.recording: bool(odd.explained_by) for odd in group.odd.values()} == {
        "fake:4@card-4": True, "fake:5@card-5": False,
    }  # fmt: skip


def test_a_value_that_only_it_has_is_a_reason_though_the_others_have_two():
    drivers = ["550", "550", "555", "555", "999"]
    cards = [card(n, driver, change=recordings.one_ulp if n == 4 else lambda y: y) for n, driver in enumerate(drivers)]
    (group,) = compare(cards, group_by="arch").grouping.groups.values()
    assert [odd.explained_by for odd in group.odd.values()] == [["versions.driver is 999, elsewhere 550 or 555"]]


def test_a_host_without_memory_says_nothing_about_its_card():
    cards = [card(n) for n in range(3)]
    for entry in cards[2].entries:
        for field, value in {"status": Status.SKIPPED, "detail": "", "outputs": {}, "claim": None}.items():
            object.__setattr__(entry, field, value)
    assert compare(cards, group_by="driver").odd() == []


def test_a_fact_that_only_the_odd_one_has_explains_it():
    cards = [card(0), card(1), card(2, change=recordings.one_ulp, cublas="13.1\x1b[2J")]
    found = compare(cards, group_by="driver")
    (group,) = found.grouping.groups.values()
    (odd,) = group.odd.values()
    assert odd.explained_by == [r"versions.cublas is 13.1\x1b[2J, elsewhere (not there)"]
    assert found.grouping.colour() == "amber"
    assert "\x1b" not in shown(found)


@pytest.mark.parametrize(
    "variable",
    [
        "CUDA_VISIBLE_DEVICES", "ASCEND_RT_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES",
        "MUSA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "LOCAL_RANK", "RANK", "OMPI_COMM_WORLD_RANK", "HAL_DEVICE",
    ],
)  # fmt: skip
def test_which_card_it_is_excuses_no_card(variable):
    cards = [card(n, change=recordings.one_ulp if n == 2 else lambda y: y, environment={variable: "2" if n == 2 else "0"})
             for n in range(3)]  # fmt: skip
    found = compare(cards, group_by="driver")
    (group,) = found.grouping.groups.values()
    assert [odd.explained_by for odd in group.odd.values()] == [[]]
    assert found.odd() == ["fake:2@card-2"]


def test_a_variable_that_changes_numbers_explains_still():
    cards = [card(0), card(1), card(2, change=recordings.one_ulp, environment={"CUBLAS_WORKSPACE_CONFIG": ":16:8"})]
    assert compare(cards, group_by="driver").odd() == []


def judged_alike(number, change=lambda y: y, **options):
    """Return a card whose other bits are within its bound: no result of it is red."""
    made = card(number, change=change, **options)
    for entry in made.entries:
        object.__setattr__(entry, "claim", Judgement(Status.PASS, 0.5))
    return made


@pytest.fixture
def lenient(monkeypatch):
    monkeypatch.setattr(fake_cases.Doubling, "judge", lambda *_: Judgement(Status.PASS, 0.5))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    ("cards", "status", "strictly"),
    [
        ([{}, {}, {}], 0, 0),
        ([{}, {}, {"change": recordings.one_ulp}], 1, 1),
        ([{}, {}, {"change": recordings.one_ulp, "cublas": "13"}], 0, 1),
        ([{}, {"change": recordings.one_ulp}], 0, 1),
    ],
)
def test_the_last_line_says_what_the_exit_status_says(cards, status, strictly, strict, lenient):
    found = compare([judged_alike(number, **options) for number, options in enumerate(cards)], group_by="driver")
    assert all(row.status is Status.PASS for row in found.report.results)
    expected = strictly if strict else status
    assert found.exit_status(strict=strict) == expected
    last = shown(found, 40, strict=strict).rstrip().splitlines()[-1]
    assert last.startswith("verdict: FAILS: " if expected else "verdict: agrees "), last
    if status:
        assert "fake:2@card-2 is not like the others of its group, and nothing says why" in last
    elif strictly and not strict:
        assert "look at what is amber" in last


def test_groups_that_differ_are_told_and_nobody_in_them_is_odd():
    old = [card(number, "535") for number in range(2)]
    new = [card(number, "550", change=recordings.one_ulp) for number in range(2, 4)]
    grouping = compare([*old, *new], group_by="driver").grouping
    assert [group.odd for group in grouping.groups.values()] == [{}, {}]
    assert (grouping.compared, grouping.alike) == (2, 0)
    assert grouping.first.startswith("double.one[a] float32: y, rows 0 of 2 (fake:0@card-0, fake:2@card-2)")
    assert grouping.colour() == "green"


def test_a_task_in_which_everybody_differs_is_not_deterministic_and_accuses_nobody():
    def noisy(number):
        def change(y):
            other = y.copy()
            other.view(f"u{y.itemsize}").flat[1] ^= number
            return other

        return change

    found = compare([card(number, change=noisy(number)) for number in range(4)], group_by="driver")
    (group,) = found.grouping.groups.values()
    assert (group.open, group.split, group.odd) == (2, 0, {})
    assert found.grouping.colour() == "green"
    assert "2 not deterministic (each has bits of its own; first" in shown(found)


def test_a_fact_that_no_recording_has_is_wrong_usage():
    with pytest.raises(Unreadable, match="no recording says colour; they say driver, device"):
        compare([card(0)], group_by="colour")
    without = [
        recordings.parse(recordings.make(opened={**recordings.OPENED, "versions": {}, "flags": {"n": n}}), n)
        for n in "abc"
    ]
    (group,) = compare(without, group_by="driver").grouping.groups.values()
    assert (group.value, group.alike) == ("(not there)", 2)


def test_of_many_green_recordings_each_has_one_line():
    text = shown(compare([card(number) for number in range(5)], group_by="driver"))
    assert text.count(": 2 green, 0 not judged") == 5
    assert "worst" not in text


@pytest.mark.parametrize("processes", [1, 2])
def test_more_processes_find_the_same(processes):
    cards = [card(0), card(1), card(2, change=recordings.one_ulp)]
    found = compare(cards, group_by="host", processes=processes)
    assert [group.recordings for group in found.grouping.groups.values()] == [
        ["fake:0@card-0"], ["fake:1@card-1"], ["fake:2@card-2"]
    ]  # fmt: skip
    assert [row.case for row in found.report.results[:3]] == ["double.one[a]"] * 3
    assert len(found.differences) == 2
    assert np.isfinite(found.differences[0].worst)


def test_a_recording_that_is_given_twice_has_one_vote():
    good, odd = card(0), card(1, change=recordings.one_ulp)
    found = compare([good, odd, odd], group_by="driver")
    (group,) = found.grouping.groups.values()
    assert (group.recordings, group.odd, found.odd()) == (["fake:0@card-0", "fake:1@card-1#2"], {}, [])
    assert found.grouping.colour() == "amber"  # two that differ: either may be wrong
    text = shown(found)
    assert "fake:1@card-1#3 is the same recording as fake:1@card-1#2, and has no vote in its group" in text
    assert [len(entry) for entry in (found.recordings, found.report.subjects)] == [3, 3]  # and is judged all the same
    again = compare([good, good, card(2), odd], group_by="driver")
    assert again.odd() == ["fake:1@card-1"]
