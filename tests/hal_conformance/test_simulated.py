# SPDX-License-Identifier: Apache-2.0
"""What never reaches a simulated unit is run on the CPU alone; what takes long is run if a user asks for it."""

import dataclasses

import pytest

from hal_conformance.execution.judging import result
from hal_conformance.execution.plan import Catalogue, Selection, plan
from hal_conformance.execution.simulated import as_on_cpu, left_out, passed_over, same_as_cpu
from hal_conformance.execution.subject import Subject
from hal_conformance.report.certificate import certificates
from hal_conformance.report.junit import junit
from hal_conformance.report.markdown import markdown
from hal_conformance.report.report import Report
from hal_conformance.report.tally import notable, verdict
from hal_conformance.result import summary
from hal_conformance.verdicts import Judgement, Status

TASKS = plan(Selection(("norm.rms", "layer.forward_free"), ("bfloat16",), "tiny"), Catalogue().all())


def opened(**info):
    return {
        "contract": {"matmul": {"bfloat16": {}}},
        "info": {"id": "sim:h200", "simulated": True, "torch_device": "cpu", "name": "H200", **info},
    }


def on_cpu(status=Status.PASS, subject="cpu", impl="torch"):
    found = Judgement(status, 0.5, {"bound": 0.5, "rms": 0.1, "bias": None, "exact": None})
    return {task: result(task, found, subject, impl, 1.0) for task in TASKS}


def run(status=Status.PASS):
    """Return the rows of a CPU, and of a simulated device of which the layer was run and the norm was not."""
    cpu = on_cpu(status)
    own = {t: dataclasses.replace(row, subject="sim:h200", status=Status.PASS) for t, row in on_cpu().items()}
    return [*cpu.values(), *{**own, **same_as_cpu(opened(), "torch", cpu)}.values()]


def test_only_what_does_not_multiply_is_the_same():
    found = same_as_cpu(opened(), "torch", on_cpu())
    assert {task.case.name for task in found} == {"norm.rms"}
    assert len(found) < len(TASKS)
    assert {(r.subject, r.status, r.margin, r.seconds, r.detail) for r in found.values()} == {
        ("sim:h200", Status.SAME_AS_CPU, None, 0.0, "PASS")
    }


@pytest.mark.parametrize(
    ("facts", "impl"), [({}, "mine:ops"), ({"simulated": False}, "torch"), ({"torch_device": "cuda:0"}, "torch")]
)
def test_nothing_is_the_same_for_other_devices_and_other_peoples_operators(facts, impl):
    assert same_as_cpu(opened(**facts), impl, on_cpu()) == {}


def test_of_a_dtype_that_the_device_does_not_have_nothing_is_the_same():
    assert same_as_cpu({**opened(), "contract": {"matmul": {"float16": {}}}}, "torch", on_cpu()) == {}


def test_it_counts_for_nobody_and_is_no_news():
    rows = run()
    same = sum(row.status is Status.SAME_AS_CPU for row in rows)
    assert same
    assert summary(rows)["SAME-AS-CPU"] == same
    assert notable(rows) == []
    assert f"({len(rows) - same} green, {same} same as cpu; 1.0 s)" in verdict(rows, 0, 1.0)
    assert "NOTHING WAS JUDGED" in verdict([r for r in rows if r.status is Status.SAME_AS_CPU], 0, 1.0)


def test_a_certificate_takes_the_cpus_verdict():
    planned = {"bfloat16": [(task.name, task.case.family) for task in TASKS]}
    for status, state in ((Status.PASS, "held"), (Status.FAIL_NUMERIC, "failed"), (Status.DEGRADED, "open")):
        of_sim = [c for c in certificates(as_on_cpu(run(status)), planned) if c.subject == "sim:h200"]
        (operators,) = [level for found in of_sim for level in found.levels if level.name == "L1"]
        assert operators.state == state


def test_every_form_of_the_report_shows_it():
    rows = run()
    report = Report("tiny", 0, [{"id": "sim:h200", "impl": "torch", **opened()}], rows)
    assert b"SAME-AS-CPU: PASS" in junit(report)
    assert b"same as cpu" in markdown(report)


@pytest.mark.parametrize(
    ("scale", "simulator", "named", "out"),
    [
        ("tiny", "compiled", False, ""), ("tiny", "torch's operators", False, ""), ("small", "compiled", False, ""),
        ("small", "torch's operators", False, "without a compiler"), ("small", "torch's operators", True, ""),
        ("full", "compiled", False, "published shapes"), ("full", "compiled", True, ""),
    ],
)  # fmt: skip
def test_a_simulated_device_that_nobody_named_is_left_out_where_it_takes_long(scale, simulator, named, out):
    subject = Subject("sim:h200", named=named, beside=not named)
    found = left_out(subject, scale) or left_out(subject, scale, {"versions": {"simulator": simulator}})
    assert out in found
    assert bool(out) == bool(found)


def test_without_a_compiler_a_device_that_nobody_named_runs_one_preset_of_each_case_in_16_bits():
    tasks = plan(Selection(("layer.forward_free", "experts.random"), scale="tiny"), Catalogue().all())
    facts = {**opened(), "versions": {"simulator": "torch's operators"}}
    rows = passed_over(Subject("sim:h200", named=False, beside=True), facts, tasks)
    assert {row.status for row in rows.values()} == {Status.SKIPPED}
    run = [(task.case.name, task.params.dtype) for task in tasks if task not in rows]
    assert sorted(run) == sorted({(t.case.name, t.params.dtype) for t in tasks if t.params.dtype != "float32"})
    assert passed_over(Subject("sim:h200"), facts, tasks) == {}
    facts["versions"]["simulator"] = "compiled"
    assert passed_over(Subject("sim:h200", named=False, beside=True), facts, tasks) == {}
