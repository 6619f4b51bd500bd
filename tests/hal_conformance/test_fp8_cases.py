# SPDX-License-Identifier: Apache-2.0
"""Casts to 8 bits and back: two saturation rules are honest; every other difference in a bit is caught."""

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hal.contract import Contract
from hal.errors import ShapeError
from hal.moe.fp8_ops import BLOCK, Scaled
from hal.moe.torch_fp8_ops import TorchFP8Ops
from hal_conformance import arrays as codec
from hal_conformance.case import Params
from hal_conformance.cases.fp8 import CASES as FP8
from hal_conformance.oracle import fp8
from hal_conformance.verdicts import Status

CASES = {case.name: case for case in FP8}
ALL = tuple(CASES.values())
CPU = torch.device("cpu")
SIGNED = tuple(fp8.FORMATS)


def judge(case, ops, dtype, seed=0, contract=None):
    params = Params(case.presets()[0], dtype, "tiny", seed)
    inputs = case.inputs(params)
    outputs = case.run(ops, {name: codec.to_torch(array, CPU) for name, array in inputs.items()}, params)
    outputs = {name: codec.from_torch(t) for name, t in outputs.items()}
    return case.judge(inputs, outputs, params, contract or Contract())


def verdicts(ops, seed, cases=ALL):
    return {(case.name, dtype): judge(case, ops, dtype, seed) for case in cases for dtype in case.dtypes()}


def wide_of(codes, format):
    values = torch.from_numpy((fp8.E8M0 if format == "e8m0" else fp8.FORMATS[format].values).copy())
    return values[codes.long()]


class ByTable(TorchFP8Ops):
    """Looks codes up, and finds them by their midpoints; saturates in every format."""

    saturate = True

    def cast_fp8(self, x, format):
        return torch.from_numpy(fp8.cast(x.double().numpy(), format, saturate=self.saturate))

    def uncast_fp8(self, codes, format, dtype):
        return wide_of(codes, format).to(getattr(torch, dtype))


class Overflows(ByTable):
    saturate = False


class InFloat64(TorchFP8Ops):
    """Scales in float64, by a logarithm that is exact."""

    def scale_fp8(self, x_NB, format):
        codes, scales = fp8.scale(x_NB.double().numpy(), format)
        return Scaled(torch.from_numpy(codes), torch.from_numpy(scales))


class ClampsFirst(TorchFP8Ops):
    """Saturates by clamping; a NaN passes."""

    def cast_fp8(self, x, format):
        largest = float(fp8.FORMATS[format].values[fp8.FORMATS[format].count - 1])
        return super().cast_fp8(x.clamp(-largest, largest), format)


class TakesSubnormalsForZero(TorchFP8Ops):
    """Subnormal float16 inputs are zero, which the contract leaves open."""

    def cast_fp8(self, x, format):
        least = torch.finfo(x.dtype).tiny
        return super().cast_fp8(torch.where(x.abs() < least, x * 0, x), format)


class ByMlDtypes(TorchFP8Ops):
    """Another library's casts, from float32."""

    def cast_fp8(self, x, format):
        with np.errstate(invalid="ignore", over="ignore"):
            made = x.float().numpy().astype(getattr(ml_dtypes, f"float8_{format}"))
        return torch.from_numpy(made.view(np.uint8))


HONEST = {
    cls.__name__: cls()
    for cls in (TorchFP8Ops, ByTable, Overflows, InFloat64, ClampsFirst, TakesSubnormalsForZero, ByMlDtypes)
}


@pytest.mark.parametrize("name", HONEST)
@pytest.mark.parametrize("seed", [0, 1])
def test_an_honest_implementation_is_exact_in_every_case(name, seed):
    found = verdicts(HONEST[name], seed)
    assert len(found) == 32
    assert {verdict.status for verdict in found.values()} == {Status.EXACT}, found


def test_the_verdict_says_which_saturation_rule_was_found():
    assert judge(CASES["fp8.cast_e5m2"], ByTable(), "float32").detail == "overflow saturates"
    assert judge(CASES["fp8.cast_e5m2"], Overflows(), "float32").detail == "overflow does not saturate"


class Truncates(TorchFP8Ops):
    """Rounds towards zero."""

    def cast_fp8(self, x, format):
        nearest = super().cast_fp8(x, format)
        further = wide_of(nearest, format).abs() > x.double().abs()
        return torch.where(further & ((nearest & 0x7F) > 0), nearest - 1, nearest)


class TiesAway(TorchFP8Ops):
    """Rounds ties away from zero."""

    def cast_fp8(self, x, format):
        return super().cast_fp8(torch.nextafter(x.float(), x.float().sign() * torch.inf), format)


class RoundsTwice(TorchFP8Ops):
    """float32 to float16 to 8 bits (triton PR#10846)."""

    def cast_fp8(self, x, format):
        return super().cast_fp8(x.half() if x.dtype == torch.float32 else x, format)


class RoundsTwiceByBfloat16(TorchFP8Ops):
    def cast_fp8(self, x, format):
        return super().cast_fp8(x.bfloat16() if x.dtype == torch.float32 else x, format)


class ReadsFnuzAsFn(TorchFP8Ops):
    """The bits of a fnuz format are read as those of its sibling (vllm PR#7210)."""

    def uncast_fp8(self, codes, format, dtype):
        return super().uncast_fp8(codes, format.removesuffix("uz") if format == "e4m3fnuz" else format, dtype)


class WritesFnuzAsFn(TorchFP8Ops):
    def cast_fp8(self, x, format):
        return super().cast_fp8(x, "e5m2" if format == "e5m2fnuz" else format)


class NanToZero(TorchFP8Ops):
    def cast_fp8(self, x, format):
        return super().cast_fp8(x.nan_to_num(0.0, torch.inf, -torch.inf), format)


class NanSaturates(TorchFP8Ops):
    """min and max that drop NaN make it the largest number (triton PR#3997)."""

    def cast_fp8(self, x, format):
        return super().cast_fp8(x.nan_to_num(torch.inf, torch.inf, -torch.inf), format)


class NanIsNegativeZero(TorchFP8Ops):
    """The one NaN of fnuz is read as -0 (triton#10745)."""

    def uncast_fp8(self, codes, format, dtype):
        x = super().uncast_fp8(codes, format, dtype)
        return torch.where(codes == 0x80, -0.0, x) if format.endswith("fnuz") else x


class InfinityIsANumber(TorchFP8Ops):
    """e5m2's infinity is read as 65536 (triton PR#11784)."""

    def uncast_fp8(self, codes, format, dtype):
        x = super().uncast_fp8(codes, format, dtype)
        return torch.where(x.isinf(), x.sign() * 65536.0, x) if dtype != "float16" else x


class NegativeZeroIsNan(TorchFP8Ops):
    """-0 becomes the code 0x80, which is NaN in fnuz."""

    def cast_fp8(self, x, format):
        codes = super().cast_fp8(x, format)
        return torch.where((x == 0) & x.signbit(), 0x80, codes.int()).to(torch.uint8)


class FlushesSubnormals(TorchFP8Ops):
    """Codes below the smallest normal number are zero."""

    def cast_fp8(self, x, format):
        codes = super().cast_fp8(x, format)
        mantissa = fp8.FORMATS[format].mantissa
        return torch.where((codes & 0x7F) < 2**mantissa, codes & 0x80 if not format.endswith("fnuz") else 0, codes)


class ReadsSubnormalsAsZero(TorchFP8Ops):
    def uncast_fp8(self, codes, format, dtype):
        x = super().uncast_fp8(codes, format, dtype)
        return x if format == "e8m0" else torch.where((codes & 0x7F) == 1, 0 * x, x)


class SaturatesToInfinity(TorchFP8Ops):
    """Mixes the two rules: numbers saturate, infinities do not."""

    def cast_fp8(self, x, format):
        largest = float(fp8.FORMATS[format].values[fp8.FORMATS[format].count - 1])
        return super().cast_fp8(torch.where(x.isinf(), x, x.clamp(-largest, largest)), format)


class SaturatesBeforeRounding(TorchFP8Ops):
    """What lies beyond the largest number overflows, though it would round to it."""

    def cast_fp8(self, x, format):
        largest = float(fp8.FORMATS[format].values[fp8.FORMATS[format].count - 1])
        return super().cast_fp8(torch.where(x.abs() > largest, x * torch.inf, x), format)


class WrongAtTheTail(TorchFP8Ops):
    """The last elements beyond a multiple of 16 are left as they were."""

    def uncast_fp8(self, codes, format, dtype):
        x = super().uncast_fp8(codes, format, dtype)
        return torch.cat([x[: len(x) // 16 * 16], torch.zeros_like(x[len(x) // 16 * 16 :])])


class ScaleRoundsUp(TorchFP8Ops):
    """The scale is rounded up to the next power of two, so that nothing saturates (vllm PR#46676)."""

    def scale_fp8(self, x_NB, format):
        largest = x_NB.float().abs().amax(-1, keepdim=True)
        limit = float(fp8.FORMATS[format].values[fp8.FORMATS[format].count - 1])
        power = (
            torch.ceil(torch.log2((largest / limit).clamp(min=2.0**-127))).nan_to_num(0.0, 0.0, 0.0).clamp(-127, 127)
        )
        codes = super().cast_fp8(torch.ldexp(x_NB.double(), -power).float().clamp(-limit, limit), format)
        return Scaled(codes, (power[:, 0] + 127).to(torch.uint8))


class NoSaturationInBlocks(TorchFP8Ops):
    """Elements beyond the largest number become NaN or infinite."""

    def scale_fp8(self, x_NB, format):
        _, scales = super().scale_fp8(x_NB, format)
        x = np.ldexp(x_NB.double().numpy(), 127 - scales.int().numpy()[:, None])
        return Scaled(torch.from_numpy(fp8.cast(x, format, saturate=False)), scales)


class ZeroScaleForZero(TorchFP8Ops):
    """A block of zeros has scale 1."""

    def scale_fp8(self, x_NB, format):
        codes, scales = super().scale_fp8(x_NB, format)
        return Scaled(codes, torch.where((x_NB == 0).all(-1), 127, scales.int()).to(torch.uint8))


class InfiniteBlocksSaturate(TorchFP8Ops):
    """A block with an infinity has the largest scale, and hides the overflow."""

    def scale_fp8(self, x_NB, format):
        codes, scales = super().scale_fp8(x_NB, format)
        return Scaled(codes, torch.where(x_NB.isinf().any(-1), 254, scales.int()).to(torch.uint8))


class NanBlocksAreIgnored(TorchFP8Ops):
    """The maximum passes over NaN (vllm PR#43557)."""

    def scale_fp8(self, x_NB, format):
        return super().scale_fp8(x_NB.nan_to_num(0.0, torch.inf, -torch.inf), format)


class ScaleZeroIsZero(TorchFP8Ops):
    """Scale code 0 is read as 0 although the contract preserves subnormal numbers."""

    def uncast_fp8(self, codes, format, dtype):
        x = super().uncast_fp8(codes, format, dtype)
        return torch.where(codes == 0, 0 * x, x)


class ScaleNanIsANumber(TorchFP8Ops):
    """Scale code 255 is read as 2^128, infinity (vllm PR#43557)."""

    def uncast_fp8(self, codes, format, dtype):
        x = super().uncast_fp8(codes, format, dtype)
        return torch.where(x.isnan(), torch.inf, x) if format == "e8m0" else x


CAUGHT_BY = {
    Truncates: "fp8.cast_e4m3fn",
    TiesAway: "fp8.cast_e4m3fn",
    RoundsTwice: "fp8.cast_e5m2",
    RoundsTwiceByBfloat16: "fp8.cast_e4m3fnuz",
    ReadsFnuzAsFn: "fp8.uncast_e4m3fnuz",
    WritesFnuzAsFn: "fp8.cast_e5m2fnuz",
    NanToZero: "fp8.cast_e4m3fn",
    NanSaturates: "fp8.cast_e4m3fn",
    NanIsNegativeZero: "fp8.uncast_e5m2fnuz",
    InfinityIsANumber: "fp8.uncast_e5m2",
    NegativeZeroIsNan: "fp8.cast_e4m3fnuz",
    FlushesSubnormals: "fp8.cast_e5m2",
    ReadsSubnormalsAsZero: "fp8.uncast_e4m3fn",
    SaturatesToInfinity: "fp8.cast_e5m2",
    SaturatesBeforeRounding: "fp8.cast_e4m3fnuz",
    WrongAtTheTail: "fp8.uncast_e4m3fn",
    ScaleRoundsUp: "fp8.scale_e4m3fn",
    NoSaturationInBlocks: "fp8.scale_e4m3fn",
    ZeroScaleForZero: "fp8.scale_e5m2",
    InfiniteBlocksSaturate: "fp8.scale_e5m2",
    NanBlocksAreIgnored: "fp8.scale_e4m3fn",
    ScaleZeroIsZero: "fp8.uncast_e8m0",
    ScaleNanIsANumber: "fp8.uncast_e8m0",
}


@pytest.mark.parametrize("wrong", CAUGHT_BY, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("seed", [0, 3])
def test_a_wrong_implementation_is_caught_by_the_case_that_is_meant_for_it(wrong, seed):
    case = CASES[CAUGHT_BY[wrong]]
    found = [judge(case, wrong(), dtype, seed, Contract(subnormals="preserved")) for dtype in case.dtypes()]
    assert any(verdict.status is Status.FAIL_NUMERIC for verdict in found), found


def test_a_failure_names_the_number_its_code_and_the_right_one():
    verdict = judge(CASES["fp8.cast_e4m3fn"], NanToZero(), "bfloat16")
    assert "codes differ, first nan to 0x00 (0), expected 0x7f (nan)" in verdict.detail


def test_subnormal_inputs_are_judged_where_the_contract_preserves_them():
    case = CASES["fp8.cast_e5m2"]
    assert judge(case, TakesSubnormalsForZero(), "float16").status is Status.EXACT
    preserved = Contract(subnormals="preserved")
    assert judge(case, TakesSubnormalsForZero(), "float16", contract=preserved).status is Status.FAIL_NUMERIC


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_hostile_outputs_get_a_red_verdict_and_never_raise(case):
    params = Params(case.presets()[0], case.dtypes()[0], "tiny", 0)
    inputs = case.inputs(params)
    good = case.run(TorchFP8Ops(), {name: codec.to_torch(array, CPU) for name, array in inputs.items()}, params)
    good = {name: codec.from_torch(tensor) for name, tensor in good.items()}
    for name, array in good.items():
        for bad in (None, array[None], array.astype(np.complex64), np.full_like(array, 7)):
            outputs = {k: v for k, v in good.items() if k != name} | ({} if bad is None else {name: bad})
            assert case.judge(inputs, outputs, params, Contract()).status.colour == "red"


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_inputs_are_a_pure_function_of_their_parameters(case):
    params = Params(case.presets()[0], case.dtypes()[-1], "tiny", 5)
    (first,), (second,) = case.inputs(params).values(), case.inputs(params).values()
    (other,) = case.inputs(Params(params.preset, params.dtype, "tiny", 6)).values()
    assert first.tobytes() == second.tobytes() != other.tobytes()


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
    # An odd code is never the result of a tie.
    if (np.abs(finite - x) == abs(got - x)).sum() == 2 and got != 0:
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
