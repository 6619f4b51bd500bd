# SPDX-License-Identifier: Apache-2.0
"""Curves among honest ones, and equivalence over seeds: statistics that say no more than they know."""

import math
from types import MappingProxyType

import numpy as np
import pytest
import torch

from hal.contract import Contract
from hal_conformance import arrays as codec
from hal_conformance.case import Params
from hal_conformance.cases import band, paired
from hal_conformance.faults import VARIATIONS
from hal_conformance.language import curves, ensemble, twins
from hal_conformance.language.text import VOCABULARY, batch, text
from hal_conformance.portable import portable
from hal_conformance.verdicts import Status

CPU = torch.device("cpu")
TINY = Params("ling-lite", "float32", "tiny", 0)


def band_verdict(ops, case=band.CASES[1], params=TINY):
    inputs = case.inputs(params)
    found = case.run(ops, {name: codec.to_torch(array, CPU) for name, array in inputs.items()}, params)
    return case.judge(inputs, {name: codec.from_torch(t) for name, t in found.items()}, params, Contract())


@pytest.mark.parametrize("dtype", ensemble.DTYPES)
@pytest.mark.parametrize("case", band.CASES, ids=lambda case: case.name)
def test_the_portable_operators_are_among_the_honest_runs(case, dtype):
    found = band_verdict(portable, case, Params("ling-lite", dtype, "tiny", 0))
    assert found.status is Status.PASS, found
    assert 0.0 < found.margin <= 1.0


OPERATORS = {*twins.CHOICES, "experts"}
HONEST = [name for name, v in VARIATIONS.items() if v.kind == "benign" and any(hasattr(v.make(), o) for o in OPERATORS)]


@pytest.mark.parametrize("name", HONEST)
def test_an_honest_implementation_is_among_the_honest_runs(name):
    """Not only those of which the ensemble is made; in bfloat16, where an implementation is known by its roundings."""
    for case in band.CASES:
        found = band_verdict(VARIATIONS[name].make(), case, Params("ling-lite", "bfloat16", "tiny", 0))
        assert found.status is Status.PASS, (case.name, found)


class SmallerSteps:
    """AdamW with a learning rate that is off by a thousandth."""

    def adamw_step(self, p, g, m, v, step, hyper):
        from dataclasses import replace

        return portable.adamw_step(p, g, m, v, step, replace(hyper, lr=hyper.lr * 1.001))


def test_a_learning_rate_that_is_off_by_a_thousandth_leaves_the_band_in_float32():
    found = band_verdict(SmallerSteps())
    assert found.status is Status.DEGRADED, found
    assert found.margin > 1.0
    assert "further out than all" in found.detail


def test_a_loss_that_is_not_finite_is_no_matter_of_statistics():
    case = band.CASES[1]
    outputs = {name: np.full(ensemble.FEW, np.nan, np.float32) for name in curves.CURVES}
    found = case.judge(case.inputs(TINY), outputs, TINY, Contract())
    assert found.status is Status.FAIL_NONFINITE
    assert "step 1" in found.detail


def test_the_p_value_counts_twins_that_are_as_far_out(monkeypatch):
    """A curve on the median is the most ordinary one; one beyond the largest is beyond all."""
    case, known = band.CASES[1], ensemble.ensemble()
    lead = "llama/float32"
    median = known[f"{lead}/median"][:, : ensemble.FEW]
    unit = ensemble.unit(median, known[f"{lead}/mad"][:, : ensemble.FEW])
    largest = known[f"{lead}/largest/{ensemble.FEW}"]

    def at(deviation):
        curve = (median + deviation * unit).astype(np.float64)
        outputs = dict(zip(curves.CURVES, curve.astype(np.float32), strict=True))
        return case.judge({}, outputs, TINY, Contract()).status

    assert at(0.0) is Status.PASS
    assert at(float(largest[-1]) * 0.9) is Status.PASS
    assert at(float(largest[-1]) * 4.0 + 4.0) is Status.DEGRADED


def test_the_shipped_ensemble_is_sorted_and_complete():
    known = ensemble.ensemble()
    for name in curves.MODELS:
        for dtype in ensemble.DTYPES:
            for steps in (ensemble.FEW, curves.STEPS):
                largest = known[f"{name}/{dtype}/largest/{steps}"]
                assert len(largest) == ensemble.TWINS
                assert (np.diff(largest) >= 0).all()
            assert known[f"{name}/{dtype}/median"].shape == (2, curves.STEPS)
            assert len(known[f"{name}/{dtype}/final"]) == ensemble.SEEDS >= paired.SEEDS


@pytest.mark.parametrize("name", curves.MODELS)
def test_a_twin_is_the_same_function(name):
    """In float64 its loss differs by the ulp that its parameters were moved by, and no more."""
    from hal_conformance.language.training import begin, run

    spec = curves.model(name)
    start = curves.start(spec, 0)

    def loss(parameters):
        placed = {key: torch.from_numpy(a.astype(np.float64)) for key, a in parameters.items()}
        training = begin(portable, spec, placed, curves.RECIPE, torch.float64)
        return next(run(training, curves.RECIPE, 0, 1)).losses.total.item()

    assert loss(twins.twin(start, spec, 7)) == pytest.approx(loss(start), rel=1e-5)


def paired_verdict(difference, dtype="float32", case=paired.CASES[1]):
    params = Params("ling-lite", dtype, "full", 0)
    reference = ensemble.ensemble()[f"llama/{dtype}/final"][: paired.SEEDS]
    finals = np.repeat((reference + difference)[:, None], ensemble.WINDOW, 1).astype(np.float32)
    return case.judge({}, {"entropy_SW": finals}, params, Contract())


def margin():
    return paired.SHARE * float(ensemble.ensemble()["llama/float32/final"].std(ddof=1))


def test_equal_runs_are_equivalent():
    assert paired_verdict(np.zeros(paired.SEEDS)).status is Status.PASS


def test_a_difference_larger_than_the_margin_is_degraded():
    found = paired_verdict(np.full(paired.SEEDS, 1.5 * margin()) + np.linspace(-1, 1, paired.SEEDS) * 0.1 * margin())
    assert found.status is Status.DEGRADED


def test_scattered_differences_are_inconclusive_and_say_how_many_seeds_it_takes():
    found = paired_verdict(np.linspace(-1, 1, paired.SEEDS) * 8 * margin())
    assert found.status is Status.INCONCLUSIVE
    assert "80 % power" in found.detail


def test_paired_cases_run_at_full_alone():
    assert all(case.scales(preset) == ("full",) for case in paired.CASES for preset in case.presets())


@pytest.mark.parametrize(("probability", "freedom", "quantile"), [
    (0.95, 10, 1.8125), (0.95, 23, 1.7139), (0.9, 10, 1.3722), (0.9, 60, 1.2958), (0.975, 30, 2.0423),
])  # fmt: skip
def test_students_quantiles_are_the_tables(probability, freedom, quantile):
    assert paired.student(probability, freedom) == pytest.approx(quantile, abs=2e-4)


def test_the_planned_number_of_seeds_has_the_power_it_promises():
    generator = np.random.default_rng(0)
    deviation, limit = 1.0, 0.5
    n = paired.needed(deviation, limit)
    half = paired.student(0.95, n - 1)
    runs = generator.normal(0.0, deviation, (4000, n))
    means, spreads = runs.mean(1), runs.std(1, ddof=1) / math.sqrt(n)
    power = (np.abs(means) + half * spreads <= limit).mean()
    # Four standard deviations of a share over 4,000 runs.
    assert power == pytest.approx(paired.POWER, abs=4 * math.sqrt(0.8 * 0.2 / 4000) + 0.01)


def test_the_text_is_ascii_and_batches_follow_it():
    assert text().max() < VOCABULARY
    tokens, targets = batch(3, 5, 4, 16)
    assert (tokens[:, 1:] == targets[:, :-1]).all()
    assert bytes(tokens[0].astype(np.uint8)) in bytes(text().astype(np.uint8))
    assert not np.array_equal(tokens, batch(3, 6, 4, 16)[0])


def test_the_ensemble_is_read_only():
    assert isinstance(ensemble.ensemble(), MappingProxyType)
    with pytest.raises(ValueError, match="read-only"):
        ensemble.ensemble()["llama/float32/median"][0, 0] = 0
