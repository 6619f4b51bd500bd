# SPDX-License-Identifier: Apache-2.0
"""Casts to 8 bits and back: two saturation rules are honest; every other difference in a bit is caught (test_faults)."""

import in_process
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from in_process import CPU

from hal.contract import Contract
from hal.errors import ShapeError
from hal.moe.fp8_ops import BLOCK
from hal.moe.torch_fp8_ops import TorchFP8Ops
from hal_conformance import arrays as codec
from hal_conformance.case import Params
from hal_conformance.cases.fp8 import CASES as FP8
from hal_conformance.faults import VARIATIONS
from hal_conformance.faults.benign_fp8 import (
    CastsByTable,
    NothingSaturates,
    ReadsScaleZeroAsZero,
    TakesSubnormalsForZero,
)
from hal_conformance.faults.fp8 import NanToZero
from hal_conformance.oracle import fp8
from hal_conformance.verdicts import Status

CASES = {case.name: case for case in FP8}
ALL = tuple(CASES.values())
SIGNED = tuple(fp8.FORMATS)


def judge(case, ops, dtype, seed=0, contract=None):
    return in_process.judge(case, ops, Params(case.presets()[0], dtype, "tiny", seed), contract)


HONEST = [v for v in VARIATIONS.values() if v.kind == "benign" and v.families == ("fp8",)]


@pytest.mark.parametrize("ops", [TorchFP8Ops(), *(v.make() for v in HONEST)], ids=lambda ops: type(ops).__name__)
def test_an_honest_implementation_is_exact_in_every_case(ops):
    found = [judge(case, ops, dtype, 1) for case in ALL for dtype in case.dtypes()]
    assert len(found) == 48
    assert {verdict.status for verdict in found} == {Status.EXACT}, found


def test_the_verdict_says_which_saturation_rule_was_found():
    assert judge(CASES["fp8.cast_e5m2"], CastsByTable(), "float32").detail == "overflow saturates"
    assert judge(CASES["fp8.cast_e5m2"], NothingSaturates(), "float32").detail == "overflow does not saturate"


def test_a_failure_names_the_number_its_code_and_the_right_one():
    verdict = judge(CASES["fp8.cast_e4m3fn"], NanToZero(), "bfloat16")
    assert "codes differ, first nan to 0x00 (0), expected 0x7f (nan)" in verdict.detail


def test_subnormal_inputs_are_judged_where_the_contract_preserves_them():
    case = CASES["fp8.cast_e5m2"]
    assert judge(case, TakesSubnormalsForZero(), "float16").status is Status.EXACT
    preserved = Contract(subnormals="preserved")
    assert judge(case, TakesSubnormalsForZero(), "float16", contract=preserved).status is Status.FAIL_NUMERIC
    case = CASES["fp8.uncast_e8m0"]
    assert judge(case, ReadsScaleZeroAsZero(), "float32").status is Status.EXACT
    assert judge(case, ReadsScaleZeroAsZero(), "float32", contract=preserved).status is Status.FAIL_NUMERIC


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_hostile_outputs_get_a_red_verdict_and_never_raise(case):
    params = Params(case.presets()[0], case.dtypes()[0], "tiny", 0)
    inputs = case.inputs(params)
    good = case.run(TorchFP8Ops(), {name: codec.to_torch(array, CPU) for name, array in inputs.items()}, params)
    good = {name: codec.from_torch(tensor) for name, tensor in good.items()}
    for name, array in good.items():
        others = (array.astype(np.complex64), np.full_like(array, 7)) if array.size else ()
        for bad in (None, array[None], *others):
            outputs = {k: v for k, v in good.items() if k != name} | ({} if bad is None else {name: bad})
            assert case.judge(inputs, outputs, params, Contract()).status.colour == "red"


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_inputs_are_a_pure_function_of_their_parameters(case):
    params = Params(case.presets()[0], case.dtypes()[-1], "tiny", 5)
    first, second = case.inputs(params), case.inputs(params)
    other = case.inputs(Params(params.preset, params.dtype, "tiny", 6))
    for name, array in first.items():
        assert array.tobytes() == second[name].tobytes() != other[name].tobytes()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_value_of_a_16_bit_dtype_is_cast(dtype):
    x = CASES["fp8.cast_e4m3fn"].inputs(Params("ling-lite", dtype, "tiny", 1))["x"]
    assert len(np.unique(x.view(np.uint16))) == 2**16


def test_float32_inputs_hold_every_midpoint_and_nan_of_every_kind():
    x = CASES["fp8.cast_e4m3fn"].inputs(Params("ling-lite", "float32", "tiny", 1))["x"]
    assert len(x) > 40_000
    assert {0x7F800001, 0xFF800001, 0x7FC00000, 0x7F800000} <= set(x.view(np.uint32).tolist())
    for format in fp8.FORMATS.values():
        assert np.isin(format.midpoints.astype(np.float32), x).all()


@pytest.mark.parametrize("name", SIGNED)
def test_what_codes_mean_agrees_with_ml_dtypes(name):
    theirs = np.arange(256, dtype=np.uint8).view(getattr(ml_dtypes, f"float8_{name}")).astype(np.float64)
    assert np.array_equal(theirs, fp8.FORMATS[name].values, equal_nan=True)
    assert np.array_equal(np.signbit(theirs[:128]), np.signbit(fp8.FORMATS[name].values[:128]))


def test_the_same_bits_mean_half_as_much_in_fnuz():
    for fn, fnuz in (("e4m3fn", "e4m3fnuz"), ("e5m2", "e5m2fnuz")):
        a, b = fp8.FORMATS[fn].values, fp8.FORMATS[fnuz].values
        both = np.isfinite(a) & np.isfinite(b)
        assert both.sum() > 240
        assert (a[both] == 2.0 * b[both]).all()


@settings(max_examples=200, deadline=None)
@given(x=st.floats(allow_nan=False, allow_infinity=False, width=32), name=st.sampled_from(SIGNED))
def test_a_cast_is_to_the_nearest_code_and_casting_back_changes_nothing(x, name):
    values = fp8.FORMATS[name].values
    code = fp8.cast(np.array([x]), name, saturate=True)
    got, finite = values[code[0]], values[np.isfinite(values)]
    assert abs(got - x) == np.abs(finite - x).min()
    assert fp8.cast(np.array([got]), name, saturate=True) == code
    # An odd code is never the result of a tie. (Far beyond the largest number float64 does not tell distances apart.)
    if abs(x) <= finite.max() and (np.abs(finite - x) == abs(got - x)).sum() == 2 and got != 0:
        assert code[0] % 2 == 0


@settings(max_examples=100, deadline=None)
@given(
    values=st.lists(st.floats(-(2.0**126), 2.0**126, width=32), min_size=BLOCK, max_size=BLOCK),
    name=st.sampled_from(["e4m3fn", "e5m2"]),
)
def test_scaled_blocks_of_torch_and_of_the_oracle_are_the_same_and_near_the_numbers(values, name):
    x = np.array([values], np.float32)
    codes, scales = fp8.scale(x.astype(np.float64), name)
    made = TorchFP8Ops().scale_fp8(torch.from_numpy(x), name)
    assert made.scales.tolist() == scales.tolist()
    assert made.codes.tolist() == codes.tolist()
    back = fp8.FORMATS[name].values[codes] * fp8.E8M0[scales][:, None]
    size = 2.0 ** -(fp8.FORMATS[name].mantissa)
    least = fp8.FORMATS[name].values[1] * fp8.E8M0[scales][:, None]
    assert (np.abs(back - x) <= np.maximum(np.abs(x) * size, least)).all()


def test_what_is_no_format_or_no_block_is_refused():
    ops = TorchFP8Ops()
    with pytest.raises(ShapeError, match="no format 'e3m4'"):
        ops.cast_fp8(torch.zeros(1), "e3m4")
    with pytest.raises(ShapeError, match="codes are"):
        ops.uncast_fp8(torch.zeros(1), "e5m2", "float32")
    with pytest.raises(ShapeError, match="x_NB has shape"):
        ops.scale_fp8(torch.zeros(2, 16), "e5m2")
    with pytest.raises(ShapeError, match="e4m3fnuz"):
        ops.scale_fp8(torch.zeros(2, BLOCK), "e4m3fnuz")
