# SPDX-License-Identifier: Apache-2.0
"""Casts to 8-bit floating point and back, and block scales: every value, bit by bit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hal.contract import Contract
from hal.moe.fp8_ops import BLOCK, LARGEST_EXPONENT
from hal_conformance import inputs as make
from hal_conformance.case import DTYPES, F64, Array, Arrays, Case, Params
from hal_conformance.cases.base import Base, observed
from hal_conformance.cases.base import wide as widened
from hal_conformance.cases.kept_results import KeptResults
from hal_conformance.numerics.absent import judgeable
from hal_conformance.numerics.bounds import smallest_normal
from hal_conformance.numerics.detectors import Finding, exact, merge, structure
from hal_conformance.oracle import fp8
from hal_conformance.verdicts import Judgement, Status

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class FP8Case(Base):
    """One preset stands for all, since no router is involved.

    Attributes:
        format: a name of `hal.moe.fp8_ops`.
    """

    format: str = "e4m3fn"

    def presets(self) -> tuple[str, ...]:
        """See `Case.presets`."""
        return ("ling-lite",)


def wide(array: Array) -> F64:
    """Return an array in float64; signalling NaN may be among it."""
    with np.errstate(invalid="ignore"):
        return widened(array)


def subnormal(x: F64, dtype: str, contract: Contract) -> Array:
    """Return where a device may take zero instead: subnormal numbers of the wide dtype, unless they are promised."""
    if contract.subnormals == "preserved":
        return np.zeros(x.shape, bool)
    return np.asarray((x != 0) & (np.abs(x) < smallest_normal(dtype)))


def code_finding(name: str, x: F64, got: Array, expected: Array, format: str, may_vanish: Array) -> Finding:
    """Compare codes bit by bit; any NaN of the format is any other, and any zero is one where zeros may stand in."""
    nan = fp8.FORMATS[format].nan
    wrong = (got != expected) & ~(nan[got] & nan[expected]) & ~(may_vanish & (fp8.FORMATS[format].values[got] == 0))
    count = int(wrong.sum())
    if not count:
        return Finding(Status.EXACT, exact=0.0)
    at = int(np.flatnonzero(wrong.reshape(-1))[0])
    x_at, got_at, want_at = x.reshape(-1)[at], int(got.reshape(-1)[at]), int(expected.reshape(-1)[at])
    return Finding(
        Status.FAIL_NUMERIC,
        exact=count / wrong.size,
        detail=f"{name}: {count} of {wrong.size} codes differ, first {x_at:.9g} to 0x{got_at:02x} "
        f"({fp8.FORMATS[format].values[got_at]:.9g}), expected 0x{want_at:02x} "
        f"({fp8.FORMATS[format].values[want_at]:.9g})",
    )


def uncast_finding(name: str, codes: Array, got: Array, format: str, dtype: str, contract: Contract) -> Finding:
    """Compare numbers that were read from codes, bit by bit; the sign of zero counts, since in fnuz its code is NaN."""
    expected = (fp8.E8M0 if format == "e8m0" else fp8.FORMATS[format].values)[codes]
    if (seen := judgeable(got, expected)) is not None:
        codes, got, expected = codes[seen], got[seen], expected[seen]
    x = wide(got)
    same = ((x == expected) & (np.signbit(x) == np.signbit(expected))) | (np.isnan(x) & np.isnan(expected))
    bad = ~(same | (subnormal(expected, dtype, contract) & (x == 0)))
    if not bad.any():
        return Finding(Status.EXACT, exact=0.0)
    at = int(np.flatnonzero(bad)[0])
    detail = (
        f"{name}: {int(bad.sum())} of {bad.size} codes, first 0x{int(codes.flat[at]):02x}: {x.flat[at]}, "
        f"expected {expected.flat[at]}"
    )
    return Finding(Status.FAIL_NUMERIC, exact=float(bad.mean()), detail=detail)


def everything(dtype: str) -> Array:
    """Return all 65,536 values of a 16-bit dtype, or as many of float32 where rounding is decided.

    Of float32: every midpoint between two codes of a format, its neighbours, and what lies so near that float16 or
    bfloat16 in between would round it onto the midpoint; every code; the ends of float32; NaN of either sign, quiet and
    signalling.
    """
    if dtype != "float32":
        return np.arange(2**16, dtype=np.uint16).view(make.NUMPY_DTYPES[dtype])
    edges = []
    for format in fp8.FORMATS.values():
        middle = format.midpoints.astype(np.float32)
        edges += [middle, np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(np.inf))]
        edges += [middle * np.float32(1 + sign * 2.0**-bits) for bits in (10, 12) for sign in (1, -1)]
        edges.append(format.values[: format.count].astype(np.float32))
    ends = np.array([0x7F800000, 0x7F800001, 0x7FC00000, 0x7FFFFFFF, 0x7F7FFFFF, 1, 0x007FFFFF, 0x00800000], np.uint32)
    sizes = np.concatenate([*edges, ends.view(np.float32)])
    return np.concatenate([sizes, -sizes])


class Cast(FP8Case):
    """Every value to a format."""

    def dtypes(self) -> tuple[str, ...]:
        """See `Case.dtypes`."""
        return DTYPES

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`: in an order that the seed chooses, with more than 2^16 elements and a tail; in float32
        with random bits, too."""
        x = everything(p.dtype)
        x = np.resize(x, len(x) + 131)
        if p.dtype == "float32":
            word = make.words(p.seed, "fp8/bits", 2**15).astype(np.uint32)
            # Half of them with exponents that the formats have; the rest is whatever float32 can hold.
            power = make.integers(p.seed, "fp8/exponent", 127 - 20, 127 + 18, 2**14).astype(np.uint32)
            word[: 2**14] = (word[: 2**14] & np.uint32(0x807FFFFF)) | (power << np.uint32(23))
            x = np.concatenate([x, word.view(np.float32)])
        return {"x": x[make.permutation(p.seed, "fp8/order", len(x))]}

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """See `Case.run`."""
        return observed({"codes": ops.cast_fp8(tensors["x"], self.format)})

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`."""
        wrong = structure(outputs, {"codes": (inputs["x"].shape, "uint8")})
        if wrong is not None:
            return wrong
        x, got = wide(inputs["x"]), outputs["codes"]
        may_vanish = subnormal(x, p.dtype, contract)
        found = {
            "saturates": code_finding(
                "codes", x, got, fp8.cast(x, self.format, saturate=True), self.format, may_vanish
            ),
            "does not saturate": code_finding(
                "codes", x, got, fp8.cast(x, self.format, saturate=False), self.format, may_vanish
            ),
        }
        rule, finding = min(found.items(), key=lambda item: item[1].exact or 0.0)
        return merge([Finding(finding.status, exact=finding.exact, detail=finding.detail or f"overflow {rule}")])


class Views(FP8Case):
    """A matrix cast, scaled and read back through views of it, and parts of other sizes."""

    ROWS, COLUMNS = 35, 3 * BLOCK
    READ = 27
    """Columns that are read back: of their numbers a recording holds all (`sampling.WHOLE`)."""

    def dtypes(self) -> tuple[str, ...]:
        """See `Case.dtypes`."""
        return DTYPES

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`."""
        x = make.full_bits(p.seed, "fp8/matrix", self.ROWS, self.COLUMNS)
        x = np.ldexp(x, make.integers(p.seed, "fp8/rows", -8, 8, self.ROWS, 1).astype(np.int32))
        codes = make.words(p.seed, "fp8/code_matrix", self.ROWS, self.READ).astype(np.uint32) >> 24
        return {"x_RC": make.store(x, p.dtype), "codes_RC": codes.astype(np.uint8)}

    @staticmethod
    def views(whole: Any) -> dict[str, Any]:
        """Return views of a matrix, a tensor or an array, by name."""
        one = whole[3:4, 7]
        return {
            "columns": whole.T, "inside": whole[1:, 3:-5], "every third": whole[::3, 1::2], "row": whole[5], "one": one,
            "no axes": one.reshape(()), "none": whole[:0], "three axes": whole.reshape(len(whole), 3, -1),
        }  # fmt: skip

    @staticmethod
    def blocks(whole: Any) -> dict[str, Any]:
        """Return views of a matrix that have rows of 32, by name."""
        return {
            "middle": whole[:, BLOCK : 2 * BLOCK], "every second": whole[::2, :BLOCK], "columns": whole[:BLOCK].T,
            "one block": whole[9:10, :BLOCK], "no blocks": whole[:0, :BLOCK], "thirty-three": whole[:33, -BLOCK:],
        }  # fmt: skip

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """See `Case.run`."""
        found = {}
        for name, x in self.views(tensors["x_RC"]).items():
            found[f"cast/{name}"] = ops.cast_fp8(x, self.format)
        for name, codes in self.views(tensors["codes_RC"]).items():
            found[f"uncast/{name}"] = ops.uncast_fp8(codes, self.format, p.dtype)
        if self.format in LARGEST_EXPONENT:
            for name, x in self.blocks(tensors["x_RC"]).items():
                found[f"codes/{name}"], found[f"scales/{name}"] = ops.scale_fp8(x, self.format)
        return observed(found)

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`: nothing here is beyond 240, so that both rules of overflow give the same."""
        x = wide(inputs["x_RC"])
        cast, read = self.views(x), self.views(inputs["codes_RC"])
        blocks = self.blocks(x) if self.format in LARGEST_EXPONENT else {}
        shapes: dict[str, tuple[tuple[int, ...], str]] = {
            f"cast/{name}": (v.shape, "uint8") for name, v in cast.items()
        }
        shapes |= {f"uncast/{name}": (view.shape, p.dtype) for name, view in read.items()}
        for name, view in blocks.items():
            shapes |= {f"codes/{name}": (view.shape, "uint8"), f"scales/{name}": (view.shape[:1], "uint8")}
        wrong = structure(outputs, shapes)
        if wrong is not None:
            return wrong
        found = []

        def judge_codes(name: str, view: F64, expected: Array) -> None:
            may_vanish = subnormal(view, p.dtype, contract)
            found.append(code_finding(name, view, outputs[name], expected, self.format, may_vanish))

        for name, view in cast.items():
            judge_codes(f"cast/{name}", view, fp8.cast(view, self.format, saturate=True))
        for name, view in read.items():
            at = f"uncast/{name}"
            found.append(uncast_finding(at, view, outputs[at], self.format, p.dtype, contract))
        for name, view in blocks.items():
            expected, scales = fp8.scale(view, self.format)
            found.append(exact(f"scales/{name}", outputs[f"scales/{name}"], scales))
            judge_codes(f"codes/{name}", view, expected)
        return merge(found)


class Uncast(FP8Case):
    """Every code of a format to a wide dtype."""

    def dtypes(self) -> tuple[str, ...]:
        """See `Case.dtypes`: float16 has no 2^127."""
        return DTYPES if self.format != "e8m0" else ("float32", "bfloat16")

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`: every code, in more than 2^16 elements, and one more, so that there is a tail."""
        codes = np.resize(np.arange(256, dtype=np.uint8), 2**16 + 769)
        return {"codes": codes[make.permutation(p.seed, "fp8/codes", len(codes))]}

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """See `Case.run`."""
        return observed({"x": ops.uncast_fp8(tensors["codes"], self.format, p.dtype)})

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`."""
        wrong = structure(outputs, {"x": (inputs["codes"].shape, p.dtype)})
        if wrong is not None:
            return wrong
        return merge([uncast_finding("x", inputs["codes"], outputs["x"], self.format, p.dtype, contract)])


class Scale(FP8Case):
    """Blocks of 32 with a shared power of two."""

    BLOCKS = 133

    def dtypes(self) -> tuple[str, ...]:
        """See `Case.dtypes`."""
        return DTYPES

    def inputs(self, p: Params) -> Arrays:
        """See `Case.inputs`: blocks of every size that the dtype has, with its edges among them."""
        seed, n = p.seed, self.BLOCKS
        x = make.full_bits(seed, "fp8/blocks", n, BLOCK) * np.sqrt(BLOCK)
        low, high = (-14, 12) if p.dtype == "float16" else (-126, 124)
        power = make.integers(seed, "fp8/powers", low, high, n)
        power[n // 4 :] = make.integers(seed, "fp8/near", -6, 6, n - n // 4)
        x = np.ldexp(x, power.astype(np.int32)[:, None])
        x = wide(make.store(np.clip(x, -6e4, 6e4) if p.dtype == "float16" else x, p.dtype))
        place = make.integers(seed, "fp8/place", 0, BLOCK - 1, n)
        largest = np.nextafter(np.float32(1), np.float32(0)) if p.dtype == "float32" else 1 - 2.0**-8
        finite = float(np.finfo(np.float16).max) if p.dtype == "float16" else float(np.float32(2.0**127))
        x[0], x[1] = 0.0, -0.0
        x[1, 0] = 0.0
        for row, value in enumerate((np.nan, np.inf, -np.inf, finite, -finite), 2):
            x[row, place[row]] = value
        for row in range(8, 24):  # just below a power of two: beyond the largest element, which saturates
            top = 2.0 ** (row - 12)
            x[row] = x[row] / 2.0 ** (np.frexp(np.abs(x[row]).max())[1] + 1) * top
            x[row, place[row]] = top * largest * (1 if row % 2 else -1)
        for row in range(24, 32):  # exactly a power of two
            x[row] /= 2.0 ** (np.frexp(np.abs(x[row]).max())[1] + 1)
            x[row, place[row]] = -1.0 if row % 2 else 1.0
        order = make.permutation(seed, "fp8/rows", n)
        with np.errstate(over="ignore"):
            return {"x_NB": make.store(x[order], p.dtype)}

    def run(self, ops: Any, tensors: dict[str, torch.Tensor], p: Params) -> dict[str, torch.Tensor]:
        """See `Case.run`."""
        codes, scales = ops.scale_fp8(tensors["x_NB"], self.format)
        return observed({"codes_NB": codes, "scales_N": scales})

    def judge(self, inputs: Arrays, outputs: Arrays, p: Params, contract: Contract) -> Judgement:
        """See `Case.judge`: the codes of a block without a scale mean nothing."""
        x = wide(inputs["x_NB"])
        wrong = structure(outputs, {"codes_NB": (x.shape, "uint8"), "scales_N": (x.shape[:1], "uint8")})
        if wrong is not None:
            return wrong
        codes, scales = fp8.scale(x, self.format)
        found = []
        if (other := outputs["scales_N"] != scales).any():
            at = int(np.flatnonzero(other)[0])
            detail = (
                f"scales: {int(other.sum())} of {len(scales)} differ, first of a block whose largest is "
                f"{np.abs(x[at]).max():.9g}: {int(outputs['scales_N'][at])}, expected {int(scales[at])}"
            )
            found.append(Finding(Status.FAIL_NUMERIC, exact=float(other.mean()), detail=detail))
        kept = scales != 255
        may_vanish = subnormal(x[kept], p.dtype, contract)
        found.append(code_finding("codes", x[kept], outputs["codes_NB"][kept], codes[kept], self.format, may_vanish))
        return merge(found)


_CAST = (
    ": all 65,536 values of bfloat16 and of float16, and of float32 every midpoint between two codes, its "
    "neighbours, what a detour by float16 or bfloat16 would round onto it, NaN of every kind and random bits. Bit by "
    "bit, to nearest with ties to even. Overflow must follow one of the two rules of the OCP specification for all "
    "values (saturating, infinities too; or to infinity, or NaN where there is none), and the detail says which. "
    "Zero is admitted for subnormal inputs unless the contract preserves them; subnormal codes are never flushed."
)
_UNCAST = (
    ": every code to a wide dtype, bit by bit with the sign of zero, NaN for NaN. Bits of e4m3fnuz read as e4m3fn "
    "would be twice as large (vllm PR#7210)."
)
_SCALE = (
    ": blocks of 32 with a power-of-two scale 2^(floor(log2 max) - emax), clamped at 2^-127, elements saturating, as "
    "OCP MX 1.0 section 6.3 has it. Blocks of zeros have scale code 0, blocks with a NaN or an infinity 255 (vllm "
    "PR#43557). Largest elements on a power of two, just below one, and at the end of the dtype."
)
_VIEWS = (
    ": a matrix cast, its codes read back, and where it is a format of MX its blocks scaled, as views: by columns, "
    "parts of rows, every third row, one row, one element, with an axis or without, none at all, with three axes; 0 "
    "to 35 blocks, among them 33."
)
CAST = tuple(Cast(f"fp8.cast_{f}", "fp8", ("cast_fp8",), f"Casts to {f}{_CAST}", f) for f in fp8.FORMATS)
SCALE = tuple(
    Scale(f"fp8.scale_{f}", "fp8", ("scale_fp8",), f"Scales and elements of {f}{_SCALE}", f) for f in ("e4m3fn", "e5m2")
)
CASES: tuple[Case, ...] = (
    *CAST,
    *(Uncast(f"fp8.uncast_{f}", "fp8", ("uncast_fp8",), f"{f} read back{_UNCAST}", f) for f in fp8.FORMATS),
    Uncast(
        "fp8.uncast_e8m0", "fp8", ("uncast_fp8",),
        "Every code of the scale format e8m0: 2^(code - 127), 255 for NaN; 0 is 2^-127 and no zero.", "e8m0",
    ),
    *SCALE,
    KeptResults("fp8.cast_kept", CAST[0]),
    KeptResults("fp8.scale_kept", SCALE[0]),
    *(
        Views(f"fp8.views_{f}", "fp8", ("cast_fp8", "uncast_fp8", *(("scale_fp8",) if f in LARGEST_EXPONENT else ())),
              f"{f} in other layouts and sizes{_VIEWS}", f)
        for f in fp8.FORMATS
    ),
)  # fmt: skip
