# SPDX-License-Identifier: Apache-2.0
"""What torch refuses on a CPU or on a card is refused on a simulated device: it must not hide a mistake."""

import pytest
import torch
import torch.nn.functional as F

import hal
from hal.errors import HalError
from hal.matrix_unit import MATRIX_UNITS
from hal_sim import product


@pytest.fixture
def h200():
    with hal.open_device("sim:h200") as device:
        yield device


def draw(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


BF16, FP32, E4M3 = torch.bfloat16, torch.float32, torch.float8_e4m3fn

MIXED = {
    "addend": lambda: torch.addmm(draw(4, 4), draw(4, 4, dtype=BF16), draw(4, 4, dtype=BF16)),
    "bias": lambda: F.linear(draw(4, 4, dtype=BF16), draw(4, 4, dtype=BF16), draw(4)),
    "addends": lambda: torch.baddbmm(draw(2, 4, 4), draw(2, 4, 4, dtype=BF16), draw(2, 4, 4, dtype=BF16)),
    "vector": lambda: torch.addmv(draw(4), draw(4, 4, dtype=BF16), draw(4, dtype=BF16)),
    "product": lambda: draw(4, 4) @ draw(4, 4, dtype=BF16),
    "batches": lambda: torch.bmm(draw(2, 4, 4), draw(2, 4, 4, dtype=BF16)),
    "out": lambda: torch.mm(draw(4, 4, dtype=BF16), draw(4, 4, dtype=BF16), out=torch.empty(4, 4)),
    "integer out": lambda: torch.mm(draw(4, 4), draw(4, 4), out=torch.empty(4, 4, dtype=torch.int32)),
    "convolution": lambda: F.conv1d(draw(1, 3, 8), draw(4, 3, 3, dtype=BF16)),
    "bias of a convolution": lambda: F.conv1d(draw(1, 3, 8, dtype=BF16), draw(4, 3, 3, dtype=BF16), draw(4)),
}


@pytest.mark.parametrize("name", MIXED)
def test_dtypes_do_not_mix(name):
    with pytest.raises(RuntimeError):
        MIXED[name]()
    with hal.open_device("sim:h200"), pytest.raises(RuntimeError, match=r"dtype|type .* should be the same"):
        MIXED[name]()


FACTORS = {
    "addmm": lambda x, **factors: torch.addmm(x, x, x, **factors),
    "addmm in place": lambda x, **factors: x.clone().addmm_(x, x, **factors),
    "baddbmm": lambda x, **factors: torch.baddbmm(x[None], x[None], x[None], **factors),
    "addbmm": lambda x, **factors: torch.addbmm(x, x[None], x[None], **factors),
    "addmv": lambda x, **factors: torch.addmv(x[0], x, x[0], **factors),
    "activation": lambda x, **factors: torch._addmm_activation(x[0], x, x, **factors),
}


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float64])
@pytest.mark.parametrize("name", FACTORS)
def test_factors_are_numbers_of_the_accumulators_format(name, dtype):
    x = draw(4, 4, dtype=dtype)
    wrong = [{which: factor} for which in ("alpha", "beta") for factor in (1j, 2 + 1e-30j, complex(1, torch.nan))]
    if dtype != torch.float64:
        wrong += [{"alpha": 1e300}, {"beta": -1e39}]
    for device in ("cpu", "sim:h200"):
        with hal.open_device(device):
            for factors in wrong:
                with pytest.raises(RuntimeError, match=r"cannot be converted to type .* without overflow"):
                    FACTORS[name](x, **factors)
    with hal.open_device("sim:h200"):
        assert torch.equal(FACTORS[name](x, alpha=2 + 0j, beta=0j), FACTORS[name](x, alpha=2, beta=0))
        assert FACTORS[name](x, alpha=torch.inf).isinf().any()


SHAPES = {
    "too few channels": lambda: F.conv2d(draw(1, 3, 8, 8), draw(8, 64, 3, 3)),
    "too many channels": lambda: F.conv2d(draw(1, 64, 8, 8), draw(8, 3, 3, 3)),
    "many channels of a weight": lambda: F.conv1d(draw(1, 3, 8), draw(4, 100_003, 3)),
    "transposed": lambda: F.conv_transpose1d(draw(1, 4, 5), draw(80, 2, 3)),
    "groups": lambda: F.conv1d(draw(1, 9, 5), draw(9, 2, 3), groups=4),
    "padding": lambda: F.conv1d(draw(1, 3, 8), draw(4, 3, 3), padding=-1),
    "stride": lambda: F.conv1d(draw(1, 3, 8), draw(4, 3, 3), stride=0),
    "window": lambda: F.conv1d(draw(1, 3, 2), draw(4, 3, 3)),
    "bias": lambda: F.conv1d(draw(1, 3, 8), draw(4, 3, 3), draw(5)),
}


@pytest.mark.parametrize("core", ["native", "torch"])
@pytest.mark.parametrize("name", SHAPES)
def test_convolutions_that_do_not_fit(name, core, monkeypatch):
    with pytest.raises(RuntimeError) as own:
        SHAPES[name]()
    if core == "torch":
        monkeypatch.setattr(product.native, "library", lambda: None)
    with hal.open_device("sim:h200"), pytest.raises(RuntimeError) as ours:
        SHAPES[name]()
    assert str(ours.value) == str(own.value)


def test_the_core_is_never_given_operands_that_do_not_fit():
    unit = MATRIX_UNITS["sm_90"]["bfloat16"]
    for a, b in (((1, 4, 8), (1, 9, 4)), ((1, 4, 8), (1, 7, 4)), ((2, 4, 8), (1, 8, 4))):
        with pytest.raises(RuntimeError, match="cannot be multiplied"):
            product.multiply(draw(*a, dtype=BF16), draw(*b, dtype=BF16), unit, ("bfloat16", "bfloat16"))


def test_numbers_of_8_bits_are_multiplied_with_scales_alone(h200):
    a, b = draw(16, 16).to(E4M3), draw(16, 16).to(E4M3)
    for call in (lambda: a @ b, lambda: torch.bmm(a[None], b[None]), lambda: torch.mv(a, b[0]),
                 lambda: F.conv1d(a[None], b[:, :, None])):  # fmt: skip
        with pytest.raises(NotImplementedError):
            call()


def test_a_wider_result_is_the_units_sum(h200):
    a, b = draw(8, 300, dtype=BF16), draw(300, 8, dtype=BF16)
    wide = torch.mm(a, b, out_dtype=FP32)
    unit = MATRIX_UNITS["sm_90"]["bfloat16"]
    assert torch.equal(wide, product.multiply(a[None], b[None], unit, ("bfloat16", "bfloat16"))[0])
    assert torch.equal(wide.bfloat16(), a @ b)
    assert torch.equal(torch.bmm(a[None], b[None], out_dtype=FP32)[0], wide)
    c = draw(8, 8)
    for addend in (c, c.bfloat16()):
        assert torch.equal(torch.addmm(addend, a, b, out_dtype=FP32), wide + addend.float())
        assert torch.equal(torch.baddbmm(addend[None], a[None], b[None], out_dtype=FP32)[0], wide + addend.float())
    for dtype in (torch.float64, torch.float16):
        with pytest.raises((RuntimeError, HalError), match="out_dtype"):
            torch.mm(a, b, out_dtype=dtype)


@pytest.mark.parametrize("last", ["input", "weight", "both", "neither"])
def test_a_convolution_lies_in_memory_as_torchs_own_does(last):
    x, weight = draw(2, 3, 8, 8), draw(4, 3, 3, 3)
    if last in ("input", "both"):
        x = x.to(memory_format=torch.channels_last)
    if last in ("weight", "both"):
        weight = weight.to(memory_format=torch.channels_last)
    own = F.conv2d(x, weight)
    with hal.open_device("sim:h200"):
        assert F.conv2d(x, weight).stride() == own.stride()


ATTENTION = {
    "keys of another dtype": (dict.fromkeys("k", FP32), {}, "same dtype"),
    "queries of another dtype": (dict.fromkeys("q", FP32), {}, "same dtype"),
    "values of another dtype": (dict.fromkeys("v", FP32), {}, "same dtype"),
    "8 bits": (dict.fromkeys("qkv", E4M3), {}, "not implemented"),
    "an integer mask": ({}, {"attn_mask": torch.ones(3, 3, dtype=torch.int64)}, "attn_mask dtype"),
    "a mask in float64": ({}, {"attn_mask": torch.ones(3, 3, dtype=torch.float64)}, "attn_mask dtype"),
    "less than no dropout": ({}, {"dropout_p": -0.1}, "dropout"),
    "more than all of it": ({}, {"dropout_p": 1.5}, "dropout"),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_that_torch_refuses(h200, name):
    dtypes, options, says = ATTENTION[name]
    q, k, v = (draw(1, 4, 3, 8, dtype=dtypes.get(x, BF16)) for x in "qkv")
    with pytest.raises((RuntimeError, NotImplementedError), match=says):
        F.scaled_dot_product_attention(q, k, v, **options)


@pytest.mark.parametrize(("q", "k", "v"), [
    ((4, 3, 8), (2, 3, 8), (2, 3, 8)),  # without enable_gqa
    ((4, 3, 8), (4, 3, 4), (4, 3, 8)), ((4, 3, 8), (4, 5, 8), (4, 3, 8)),
])  # fmt: skip
def test_attention_of_shapes_that_torch_refuses(h200, q, k, v):
    with pytest.raises(RuntimeError):
        F.scaled_dot_product_attention(*(draw(1, *shape, dtype=BF16) for shape in (q, k, v)))


def test_torchs_own_kernel_of_attention_has_no_dropout(h200):
    q = draw(1, 2, 3, 8)
    with pytest.raises(RuntimeError, match="dropout"):
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, q, q, 0.5)


def test_scales_of_rows_that_do_not_lie_together(h200):
    a, b = draw(32, 16).to(E4M3), draw(16, 16).to(E4M3).T
    rows, columns = torch.ones(32, 2)[:, :1], torch.ones(1, 16)
    with pytest.raises(ValueError, match="contiguous"):
        torch._scaled_mm(a, b, rows, columns, out_dtype=BF16)
