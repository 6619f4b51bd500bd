# SPDX-License-Identifier: Apache-2.0
"""A step of a whole model names the stage that is wrong, and is green for honest operators."""

import numpy as np
import pytest
import torch

from hal.contract import Contract
from hal.moe.torch_ops import TorchMoEOps
from hal_conformance import arrays as codec
from hal_conformance.case import Params
from hal_conformance.cases import step
from hal_conformance.language.model import rotary_table
from hal_conformance.portable import Portable, portable

CPU = torch.device("cpu")
LING, LLAMA = step.CASES


def outputs_of(case, ops, params):
    inputs = case.inputs(params)
    found = case.run(ops, {name: codec.to_torch(array, CPU) for name, array in inputs.items()}, params)
    return inputs, {name: codec.from_torch(tensor) for name, tensor in found.items()}


def verdict(case, ops, dtype="float32", seed=0):
    params = Params("ling-lite", dtype, "tiny", seed)
    return case.judge(*outputs_of(case, ops, params), params, Contract())


class Changed:
    """Overrides some operators by functions of the honest one."""

    def __init__(self, **changes):
        self._changes = changes

    def __getattr__(self, name):
        if name in self._changes:
            return lambda *args, **more: self._changes[name](getattr(portable, name), *args, **more)
        raise AttributeError(name)


EVERY = 7
"""Of some three hundred outputs: judging a step takes a tenth of a second. All were tried, one by one."""


def doubled_gradient(tensor):
    return 2 * tensor - tensor.detach()


WRONG = {
    "rms_norm": (Changed(rms_norm=lambda f, x, w, eps: f(x, w, 0.1)), "step 1, block 0, attention's norm"),
    "rms_norm gradient": (
        Changed(rms_norm=lambda f, x, w, eps: f(x, doubled_gradient(w), eps)), "gradient of the weight",
    ),
    "rotary": (Changed(rotary=lambda f, x, c, s: f(x, c, -s)), "step 1, block 0, sequence 0, rotated q"),
    "not causal": (
        Changed(attention=lambda f, q, k, v, s, causal: f(q, k, v, s, causal=False)),
        "step 1, block 0, sequence 0, attention",
    ),
    "scale": (
        Changed(attention=lambda f, q, k, v, s, causal: f(q, k, v, 1.01 * s, causal=causal)),
        "step 1, block 0, sequence 0, attention",
    ),
    "layer": (
        Changed(layer=lambda f, x, w, spec: f(x, w, spec)._replace(y_TD=f(x, w, spec).y_TD * 1.01)),
        "step 1, block 0, experts: y",
    ),
    "gate gradient": (
        Changed(layer=lambda f, x, w, spec: f(x, w._replace(gate_ED=doubled_gradient(w.gate_ED)), spec)),
        "step 1, block 0, experts: dgate_ED",
    ),
    "norm_head": (
        Changed(norm_head=lambda f, x, w, train, through_norm: f(x, w, train=train, through_norm=True)),
        "the head: gradient of the weight",
    ),
    "cross_entropy": (Changed(cross_entropy=lambda f, x, t: f(x, t) * 1.0001), "step 1, cross-entropy"),
    "clipping": (
        Changed(clip_grad_norm=lambda f, g, limit: f([*g[:-1], 0 * g[-1]], limit)), "step 1, norm of the gradients",
    ),
    "adamw": (
        Changed(adamw_step=lambda f, p, g, m, v, t, h: f(p, g, m, v, t + 1, h)), "step 1, parameters",
    ),
    "adamw later": (
        Changed(adamw_step=lambda f, p, g, m, v, t, h: f(p, g, m, v, 1, h)), "step 2, parameters",
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", LING.dtypes())
@pytest.mark.parametrize("case", step.CASES, ids=lambda case: case.name)
def test_honest_operators_are_green(case, dtype):
    found = verdict(case, portable, dtype, seed=3)
    assert found.status.colour == "green", found
    assert found.detectors["rms"] < 1.0


def test_another_path_of_the_experts_is_green():
    assert verdict(LING, Portable(TorchMoEOps(grouped=False)), "bfloat16").status.colour == "green"


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_operator_is_named_with_its_stage(name):
    ops, stage = WRONG[name]
    found = verdict(LING, ops)
    assert found.status.colour == "red", found
    assert stage in found.detail


def test_a_wrong_expert_shows_in_the_dense_control():
    wrong = Changed(experts=lambda f, x, counts, w: f(x, counts, w._replace(w1_EFD=w.w1_EFD * 1.01)))
    found = verdict(LLAMA, wrong)
    assert found.status.colour == "red"
    assert "block 0, MLP" in found.detail


@pytest.mark.parametrize(("dtype", "first"), [("float32", 0), ("bfloat16", 3)])
def test_every_output_is_judged(dtype, first):
    params = Params("ling-lite", dtype, "tiny", 0)
    inputs, outputs = outputs_of(LING, portable, params)
    unseen = []
    for name in list(outputs)[first::EVERY]:
        array = outputs[name]
        if array.dtype.kind == "i":
            changed = array[::-1].copy()
        else:
            changed = np.array(array, copy=True)
            # A quarter of the largest: more than any rounding of any stage.
            changed.reshape(-1)[0] += np.asarray(0.25 * np.abs(array.astype(np.float64)).max() + 1e-3, array.dtype)
        found = LING.judge(inputs, {**outputs, name: changed}, params, Contract())
        if found.status.colour == "green":
            unseen.append(name)
    assert unseen == []


def test_the_rotary_table_is_the_cosine_to_float32():
    length, width, theta = 257, 16, 600000.0
    cos, sin = rotary_table(length, width, theta)
    angle = np.arange(length)[:, None] * np.float32(theta ** (-np.arange(0, width, 2) / width)).astype(np.float64)
    angle = np.tile(angle, (1, 2))
    for got, want in ((cos, np.cos(angle)), (sin, np.sin(angle))):
        assert np.abs(got - want).max() <= 2.0**-24
