# SPDX-License-Identifier: Apache-2.0
"""A level holds only where everything that belongs to it was judged and is green."""

from hypothesis import given
from hypothesis import strategies as st

from hal_conformance.report.certificate import LEVELS, certificates
from hal_conformance.result import Result
from hal_conformance.verdicts import Status

PLANNED = {"float32": [("experts.integers[a]", "experts"), ("router.logits[a]", "router"), ("layer.forward[a]", "layer"),
                       ("trajectory.step[a]", "trajectory")]}  # fmt: skip


def row(case, family, status=Status.PASS):
    bitwise = case.startswith("experts")
    detectors = {"bound": None if bitwise else 0.5, "rms": None, "bias": None, "exact": 0.0 if bitwise else None}
    return Result(case, family, "cpu", "torch", "float32", status, None, detectors, "", 0.0)


def rows(**changed):
    statuses = {family: Status.PASS for _, family in PLANNED["float32"]} | {"experts": Status.EXACT} | changed
    return [row(case, family, statuses[family]) for case, family in PLANNED["float32"]]


def states(results):
    (found,) = certificates(results, PLANNED)
    return {level.name: level.state for level in found.levels}, found


def test_a_complete_green_run_reaches_the_layer_since_collectives_are_not_part_of_the_suite():
    found, certificate = states(rows())
    assert found == {"L0": "held", "L1": "held", "L2": "held", "L3": "open", "L4": "held"}
    assert certificate.reached == "L2"
    assert certificate.sentence() == "L0 L1 L2 held; L3 open: not part of this suite; L4 held"


def test_red_fails_its_level_and_what_is_exact_fails_the_lowest():
    found, certificate = states(rows(experts=Status.FAIL_NUMERIC))
    assert (found["L0"], found["L1"], certificate.reached) == ("failed", "failed", None)


def test_amber_and_what_was_not_judged_leave_a_level_open():
    assert states(rows(layer=Status.NONDET))[0]["L2"] == "open"
    assert states(rows(router=Status.UNSUPPORTED))[0]["L1"] == "open"


def test_a_part_of_the_suite_certifies_nothing_whole():
    found, certificate = states(rows()[:1])
    assert found == dict.fromkeys(LEVELS, "open")
    assert certificate.reached is None


@given(st.lists(st.sampled_from(Status), min_size=4, max_size=4))
def test_no_level_holds_with_anything_but_green_in_it(statuses):
    results = [row(case, family, status) for (case, family), status in zip(PLANNED["float32"], statuses, strict=True)]
    found, _ = states(results)
    families = {"L1": results[:2], "L2": results[2:3], "L4": results[3:]}
    for level, mine in families.items():
        assert (found[level] == "held") == all(r.status.colour == "green" for r in mine)
