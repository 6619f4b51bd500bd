# SPDX-License-Identifier: Apache-2.0
"""The catalogue of the self-check, in process: every fault is flagged, every benign variation is green.

`hal conformance selfcheck` runs all of it, through workers. Here are the variations whose cases take no time: those of
experts and layers are left to it.
"""

from itertools import cycle

import pytest
import torch
from in_process import judge

import hal
from hal_conformance import selfcheck
from hal_conformance.cases import ALL
from hal_conformance.execution.plan import Selection
from hal_conformance.faults import VARIATIONS

SLOW = {"experts", "layer", "trajectory"}
QUICK = [v for v in VARIATIONS.values() if v.families and v.families[0] not in SLOW and "compiled" not in v.name]


@pytest.fixture(scope="module")
def contract():
    return hal.open_device("cpu").contract


def colours(variation, contract, seed=0, dtypes=()):
    ops = variation.make()
    for task in selfcheck.tasks(Selection(scale="tiny", seed=seed, dtypes=dtypes), ALL, variation):
        if task.case.family not in SLOW:
            try:
                verdict = judge(task.case, ops, task.params, contract)
            except Exception as error:  # noqa: BLE001  a fault may raise anything
                yield "red", f"{task}: raised {error!r}"
            else:
                yield verdict.status.colour, f"{task}: {verdict.status.value}: {verdict.detail}"


@pytest.mark.parametrize("variation", [v for v in QUICK if v.kind == "fault"], ids=lambda v: v.name)
def test_a_fault_is_flagged(variation, contract):
    assert any(colour in ("red", "amber") for colour, _ in colours(variation, contract)), variation.what


BENIGN = [v for v in QUICK if v.kind == "benign"]


@pytest.mark.parametrize(
    ("variation", "wide"), [*zip(BENIGN, cycle((True, False)))], ids=lambda v: getattr(v, "name", v)
)
def test_a_benign_variation_is_green(variation, wide, contract):
    """In float32 or in 16 bits, in turn; the command itself runs all, with seed 0."""
    found = list(colours(variation, contract, seed=11, dtypes=("float32",) if wide else ("bfloat16", "float16")))
    assert found
    assert [what for colour, what in found if colour != "green"] == []


def test_every_family_has_faults_and_honest_variations():
    for kind in ("fault", "benign"):
        found = {family for v in VARIATIONS.values() if v.kind == kind for family in v.families}
        assert found >= {
            "router", "dispatch", "experts", "combine", "losses", "layer", "determinism", "norm", "rotary",
            "attention", "head", "gradients", "optimizer", "fp8",
        }, kind  # fmt: skip


def test_a_gradient_by_hand_is_the_one_that_was_written():
    from hal_conformance.faults.by_hand import by_hand, cut_to_bfloat16

    x, w = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in "xw")
    assert torch.autograd.gradcheck(
        lambda x, w: by_hand(lambda x, w: x * w**2, lambda dy, x, w: (dy * w**2, 2 * dy * x * w), x, w), (x, w)
    )
    assert cut_to_bfloat16(torch.tensor([1.0078124, -1.0078124])).tolist() == [1.0, -1.0]
