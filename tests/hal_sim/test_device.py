# SPDX-License-Identifier: Apache-2.0
"""A simulated device multiplies for whatever torch code runs, on every way to a product, until it is closed."""

import importlib
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F

import hal
from hal.errors import Absent, ConfigError, DeviceConflict, UnsupportedOperation, UnsupportedPrecision
from hal_sim import interception, product
from hal_sim.chips import CHIPS
from hal_sim.schedule import Schedule


@pytest.fixture
def h200():
    with hal.open_device("sim:h200") as device:
        yield device


def numbers(*shape, dtype=torch.bfloat16, seed=0):
    # Products of these have sums that an accumulator of float32 cannot hold exactly.
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def of_the_unit(a, b, chip="h200", schedule=product.ONE_PIECE):
    """Return what the unit makes of matrices or batches of them, in float32."""
    formats = tuple(str(x.dtype).removeprefix("torch.") for x in (a, b))
    batched = a if a.ndim == 3 else a[None], b if b.ndim == 3 else b[None]
    found = product.multiply(*batched, CHIPS[chip].units[formats[0]], formats, schedule)
    return found if a.ndim == 3 else found[0]


# The exact product is zero, so that each result is rounding alone, and no other order or unit has the same in bfloat16.
PLACES = torch.randperm(300, generator=torch.Generator().manual_seed(3))
A = torch.cat([numbers(9, 150), -numbers(9, 150)], 1)[:, PLACES].contiguous()
B = torch.cat([numbers(150, 7, seed=1), numbers(150, 7, seed=1)])[PLACES].contiguous()
C = numbers(9, 7, seed=2) * 2.0**-20
WAYS = {
    "mm": lambda a, b, c: (torch.mm(a, b), of_the_unit(a, b).bfloat16()),
    "matmul": lambda a, b, c: (a @ b, of_the_unit(a, b).bfloat16()),
    "out": lambda a, b, c: (torch.mm(a, b, out=torch.empty(0, dtype=a.dtype)), of_the_unit(a, b).bfloat16()),
    "transposed": lambda a, b, c: (b.t() @ a.t(), of_the_unit(b.t(), a.t()).bfloat16()),
    "linear": lambda a, b, c: (F.linear(a, b.t(), c[0]), (of_the_unit(a, b) + c[0].float()).bfloat16()),
    "linear of many": lambda a, b, c: (
        F.linear(a.view(3, 3, 300), b.t()).view(9, 7), of_the_unit(a, b).bfloat16()),
    "addmm": lambda a, b, c: (
        torch.addmm(c, a, b, beta=0.5, alpha=2), (of_the_unit(a, b) * 2 + c.float() * 0.5).bfloat16()),
    "addmm without": lambda a, b, c: (
        torch.addmm(torch.full_like(c, torch.nan), a, b, beta=0), of_the_unit(a, b).bfloat16()),
    "in place": lambda a, b, c: (c.clone().addmm_(a, b), (of_the_unit(a, b) + c.float()).bfloat16()),
    "in place of batches": lambda a, b, c: (
        c.view(3, 3, 7).clone().baddbmm_(a.view(3, 3, 300), b[None].expand(3, -1, -1)).view(9, 7),
        (of_the_unit(a, b) + c.float()).bfloat16()),
    "in place of a batch's sum": lambda a, b, c: (
        c.clone().addbmm_(a.view(9, 3, 100).transpose(0, 1), b.view(3, 100, 7)),
        (of_the_unit(a, b) + c.float()).bfloat16()),
    "in place of a vector": lambda a, b, c: (
        c[:, 0].clone().addmv_(a, b[:, 0]), (of_the_unit(a, b[:, :1])[:, 0] + c[:, 0].float()).bfloat16()),
    "tensordot": lambda a, b, c: (torch.tensordot(a, b, 1), of_the_unit(a, b).bfloat16()),
    "grouped": lambda a, b, c: (
        torch._grouped_mm(F.pad(a, (0, 4)), F.pad(b, (0, 1, 0, 4))[None].contiguous(),
                          offs=torch.tensor([9], dtype=torch.int32))[:, :7], of_the_unit(a, b).bfloat16()),
    "mv": lambda a, b, c: (torch.mv(a, b[:, 0]), of_the_unit(a, b[:, :1])[:, 0].bfloat16()),
    "mv of a contiguous vector": lambda a, b, c: (
        torch.mv(a, b[:, 0].contiguous()), of_the_unit(a, b[:, :1])[:, 0].bfloat16()),
    "mv into": lambda a, b, c: (
        torch.mv(a, b[:, 0].contiguous(), out=torch.empty(9, dtype=a.dtype)), of_the_unit(a, b[:, :1])[:, 0].bfloat16()),
    "addmv": lambda a, b, c: (
        torch.addmv(c[:, 0], a, b[:, 0]), (of_the_unit(a, b[:, :1])[:, 0] + c[:, 0].float()).bfloat16()),
    "bmm": lambda a, b, c: (
        torch.bmm(a.view(3, 3, 300), b[None].expand(3, -1, -1)),
        of_the_unit(a.view(3, 3, 300), b[None].expand(3, -1, -1)).bfloat16()),
    "baddbmm": lambda a, b, c: (
        torch.baddbmm(c.view(3, 3, 7), a.view(3, 3, 300), b[None].expand(3, -1, -1)).view(9, 7),
        (of_the_unit(a, b) + c.float()).bfloat16()),
    "addbmm": lambda a, b, c: (
        torch.addbmm(c, a.view(9, 3, 100).transpose(0, 1), b.view(3, 100, 7)), (of_the_unit(a, b) + c.float()).bfloat16()),
    "einsum": lambda a, b, c: (torch.einsum("ik,kj->ij", a, b), of_the_unit(a, b).bfloat16()),
    "float32": lambda a, b, c: (a.float() @ b.float(), of_the_unit(a.float(), b.float())),
    "float64": lambda a, b, c: (a.double() @ b.double(), of_the_unit(a.double(), b.double())),
    "convolution": lambda a, b, c: (
        F.conv1d(a.t()[None], b.t()[:, :, None], c[0])[0].t(), (of_the_unit(b.t(), a.t()).t() + c[0].float()).bfloat16()),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_a_product_leads_through_the_unit(way, h200):
    found, expected = WAYS[way](A, B, C)
    assert torch.equal(found, expected)
    assert found.dtype == expected.dtype


def test_what_the_ways_multiply_shows_whether_it_was_the_unit():
    on_cpu = (A @ B, torch.mv(A, B[:, 0].contiguous())[:, None], (A.float() @ B.float()).bfloat16())
    assert all((of_the_unit(A, B)[:, : found.shape[1]].bfloat16() != found).double().mean() > 0.5 for found in on_cpu)


def test_the_unit_is_not_what_the_cpu_computes():
    a, b = A.float().bfloat16(), B
    with hal.open_device("sim:h200"):
        simulated = F.linear(a.float(), b.t().float())
        of_unit = of_the_unit(a, b)
    assert not torch.equal(of_unit, simulated)  # cut, against fused multiply-adds


def test_a_gradient_goes_through_the_unit_in_torchs_own_threads_too(h200):
    a, b = A.clone().requires_grad_(), B.clone().requires_grad_()
    dy = numbers(9, 7, seed=3)
    (a @ b).backward(dy)
    assert torch.equal(a.grad, of_the_unit(dy, B.t()).bfloat16())
    assert torch.equal(b.grad, of_the_unit(A.t(), dy).bfloat16())


def test_a_backward_pass_in_another_thread_and_another_forward_pass(h200):
    a = A.clone().requires_grad_()
    found = []

    def work():
        (a @ B).sum().backward()
        found.append(A @ B)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert torch.equal(found[0], of_the_unit(A, B).bfloat16())
    assert torch.equal(a.grad, of_the_unit(torch.ones(9, 7).bfloat16(), B.t()).bfloat16())


def watched(products):
    """Put down the operands of every product."""
    own = interception.active().product

    def product(a, b):
        products.append((a.dtype, tuple(a.shape), b.dtype, tuple(b.shape)))
        return own(a, b)

    interception.active().product = product


ATTENTION = {
    "causal": ((2, 12, 40), (2, 12, 40), (2, 12, 40), {"is_causal": True}),
    "a mask of what is seen": ((2, 5, 16), (2, 12, 16), (2, 12, 16), {"attn_mask": torch.rand(1, 2, 5, 12) > 0.3}),
    "a mask that is added": ((2, 5, 16), (2, 12, 16), (2, 12, 16), {"attn_mask": torch.randn(5, 12)}),
    "shared keys": ((4, 5, 16), (2, 7, 16), (2, 7, 16), {"enable_gqa": True}),
    "values of another width": ((2, 5, 24), (2, 7, 24), (2, 7, 16), {"scale": 0.3}),
}


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_attention_is_a_fused_kernels_forward_and_backward(name, dtype):
    *shapes, options = ATTENTION[name]
    if "attn_mask" in options and options["attn_mask"].dtype != torch.bool:
        options = options | {"attn_mask": options["attn_mask"].to(dtype)}
    given = [torch.randn(3, *shape, generator=torch.Generator().manual_seed(i)).to(dtype).requires_grad_()
             for i, shape in enumerate(shapes)]  # fmt: skip
    wide = [x.detach().double().requires_grad_() for x in given]
    mask = {key: x.double() for key, x in options.items() if isinstance(x, torch.Tensor) and x.is_floating_point()}
    want = F.scaled_dot_product_attention(*wide, **(options | mask))
    dy = torch.randn(want.shape, generator=torch.Generator().manual_seed(9)).to(dtype)
    want.backward(dy.double())
    products = []
    with hal.open_device("sim:h200/strict") as device:
        watched(products)
        y = F.scaled_dot_product_attention(*given, **options)
        assert len(products) == 2
        y.backward(dy)
        assert not device.not_simulated()
    assert len(products) == 7  # the scores once more, and two gradients of each of the two products
    if dtype == torch.bfloat16:
        assert {each for (*pair,) in products for each in pair[::2]} == {dtype}
    # Sums of up to 40 products of three roundings each: of P or dS, of the result, and of what is summed.
    for found, exact in zip([y, *(x.grad for x in given)], [want, *(x.grad for x in wide)], strict=True):
        assert (found.dtype, found.shape) == (dtype, exact.shape)
        assert (found.double() - exact).abs().max() <= 8 * torch.finfo(dtype).eps * exact.abs().max()


def test_a_query_that_sees_no_key_has_no_attention(h200):
    q, k, v = (numbers(1, 2, 4, 16, seed=s).requires_grad_() for s in range(3))
    seen = torch.tensor([True, False, True, True])[:, None].expand(4, 4)
    y = F.scaled_dot_product_attention(q, k, v, seen)
    y.sum().backward()
    assert not y[:, :, 1].any()
    assert not q.grad[:, :, 1].any()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


def test_attention_in_a_dtype_that_the_chip_has_not_is_refused():
    q = torch.ones(1, 1, 2, 16, dtype=torch.bfloat16)
    with hal.open_device("sim:v100"), pytest.raises(UnsupportedOperation, match="no matrix unit for bfloat16"):
        F.scaled_dot_product_attention(q, q, q)


def test_attention_with_dropout_is_counted_and_the_math_form_is_a_cards(h200):
    q = numbers(1, 1, 4, 16).requires_grad_()
    F.scaled_dot_product_attention(q, q, q, dropout_p=0.5)
    F.scaled_dot_product_attention(q, q, q, torch.zeros(4, 4, dtype=q.dtype, requires_grad=True))
    counts = {"scaled_dot_product_attention with dropout": 1, "scaled_dot_product_attention with a mask that learns": 1}
    assert h200.not_simulated() == counts
    products = []
    watched(products)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        F.scaled_dot_product_attention(q, q, q)
    assert {dtype for dtype, *_ in products} == {torch.float32}  # as torch's math form is on CUDA
    assert h200.not_simulated() == counts
    F.scaled_dot_product_attention(q[0], q[0], q[0])
    assert products[-1][0] == torch.bfloat16


def test_attention_without_batches_shares_heads(h200):
    q, k = numbers(6, 4, 16), numbers(3, 5, 16)
    y = F.scaled_dot_product_attention(q, k, k, enable_gqa=True)
    assert torch.equal(y, F.scaled_dot_product_attention(q[None], k[None], k[None], enable_gqa=True)[0])


KERNELS = torch.nn.attention.SDPBackend


@pytest.mark.parametrize("kernels", [[KERNELS.EFFICIENT_ATTENTION, KERNELS.MATH], [KERNELS.CUDNN_ATTENTION]])
def test_attention_is_fused_where_a_card_has_any_kernel_that_is_allowed(h200, kernels):
    q, products = numbers(1, 1, 4, 16), []
    watched(products)
    with torch.nn.attention.sdpa_kernel(kernels):
        F.scaled_dot_product_attention(q, q, q)
    assert {dtype for dtype, *_ in products} == {torch.bfloat16}


def test_attention_that_no_fused_kernel_takes_is_torchs_own(h200):
    q, k = numbers(2, 4, 3, 16), numbers(1, 1, 5, 16)
    for given in ((q, k, k), (k, q, q)):  # one for all, which a card's kernels do not take
        y, wide = (F.scaled_dot_product_attention(*x) for x in (given, [x.double() for x in given]))
        assert (y.double() - wide).abs().max() <= 2 * torch.finfo(torch.bfloat16).eps * wide.abs().max()
    assert F.scaled_dot_product_attention(q[0], k, k).shape == (1, 4, 3, 16)
    assert not h200.not_simulated()


@pytest.mark.filterwarnings("ignore:.*batching rule")
def test_attention_with_dropout_is_counted_under_vmap_too(h200):
    q, mask = numbers(2, 1, 1, 4, 16), torch.zeros(4, 4, dtype=torch.bfloat16, requires_grad=True)
    torch.vmap(lambda q: F.scaled_dot_product_attention(q, q, q, dropout_p=0.5), randomness="different")(q)
    torch.vmap(lambda q: F.scaled_dot_product_attention(q, q, q, mask))(q)
    counts = {"scaled_dot_product_attention with dropout": 1, "scaled_dot_product_attention with a mask that learns": 1}
    assert h200.not_simulated() == counts
    with torch.no_grad():  # then it does not learn
        F.scaled_dot_product_attention(q, q, q, mask)
    assert h200.not_simulated() == counts


def test_afterwards_hal_run_finds_what_a_cpu_lacks_to_be_missing():
    x = torch.ones(2, 16).bfloat16()
    with hal.open_device("sim:h200"):
        torch.mm(x, x.T, out_dtype=torch.float32)
    with pytest.raises(NotImplementedError, match="Could not run"):
        torch.mm(x, x.T, out_dtype=torch.float32)
    for device, fallbacks in (("cpu", 1), ("sim:h200", 0), ("cpu", 1)):
        with hal.adopt(device) as adoption:
            y = importlib.import_module("torch").mm(x.cuda(), x.T.cuda(), out_dtype=torch.float32)
            assert (y.dtype, y[0, 0].item()) == (torch.float32, 16.0)
            assert len([entry for entry in adoption.entries() if entry.kind == "fallback"]) == fallbacks


RACE = """
import threading, torch, hal

a, b = torch.randn(64, 64), torch.randn(4, 32, 32)
with hal.open_device("sim:h200"):
    theirs = {(a @ a).numpy().tobytes(), torch.bmm(b, b).numpy().tobytes()}
expected, done, wrong = theirs | {(a @ a).numpy().tobytes(), torch.bmm(b, b).numpy().tobytes()}, threading.Event(), []

def work():
    while not done.is_set():
        wrong.extend(x for x in (a @ a, torch.bmm(b, b)) if x.numpy().tobytes() not in expected)

others = [threading.Thread(target=work) for _ in range(2)]
for other in others:
    other.start()
for _ in range(500):
    with hal.open_device("sim:h200"):
        pass
done.set()
for other in others:
    other.join()
assert not wrong
"""


def test_other_threads_may_multiply_while_a_device_is_opened_and_closed():
    done = subprocess.run([sys.executable, "-c", RACE], capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr


INTERRUPTED = """
import torch, hal
from hal.errors import UnsupportedOperation
from hal_sim import interception

put = interception.replace_kernel
for kernels in (1, 20, 150):
    left = iter(range(kernels))

    def interrupted(*given):
        if next(left, None) is None:
            raise KeyboardInterrupt
        put(*given)

    interception.replace_kernel = interrupted
    try:
        hal.open_device("sim:h200")
    except KeyboardInterrupt:
        pass
    else:
        raise AssertionError("nothing was left to be done")
    torch.linalg.inv(torch.eye(2))
interception.replace_kernel = put
x = torch.linspace(0, 1, 600).view(1, 600).bfloat16()
with hal.open_device("sim:v100/strict"):
    for multiply in (lambda: x @ x.T, lambda: torch.linalg.inv(torch.eye(2))):
        try:
            multiply()
        except UnsupportedOperation:
            continue
        raise AssertionError("it was neither simulated nor refused")
"""


def test_a_first_opening_that_is_interrupted_leaves_no_kernels():
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr


def test_a_first_device_with_next_to_no_memory_is_opened():
    code = "import hal; hal.open_device('sim:h200/memory=1MiB').close(); hal.open_device('sim:h200/strict').close()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "module",
    [
        lambda: torch.nn.LSTM(12, 12), lambda: torch.nn.GRU(12, 12), lambda: torch.nn.MultiheadAttention(12, 2),
        lambda: torch.nn.TransformerEncoderLayer(12, 2, 24).eval(), lambda: torch.nn.Bilinear(12, 12, 3),
    ],
)  # fmt: skip
def test_modules_with_fused_kernels_are_decomposed(module, h200):
    torch.manual_seed(0)
    made, x = module(), torch.randn(3, 2, 12)
    given = {torch.nn.MultiheadAttention: (x, x, x), torch.nn.Bilinear: (x, x)}.get(type(made), (x,))
    calls = []
    active = interception.active()
    product_ = active.product
    active.product = lambda a, b: calls.append(a.shape) or product_(a, b)
    with torch.no_grad():
        made(*given)
    active.product = product_
    assert calls
    assert not active.not_simulated.calls()


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: torch.nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 17)),
        (
            lambda: torch.nn.Conv2d(4, 8, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2),
            (3, 4, 11, 9),
        ),
        (lambda: torch.nn.Conv3d(2, 4, 2, padding=1), (1, 2, 5, 5, 5)),
        (lambda: torch.nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), (2, 4, 5, 6)),
        (lambda: torch.nn.ConvTranspose1d(4, 6, 3, stride=3, dilation=2, bias=False), (2, 4, 5)),
        (lambda: torch.nn.Conv2d(3, 4, 3), (3, 8, 8)),
    ],
)
def test_convolutions_are_products_forward_and_backward(make, shape):
    """In float64 both sum at most 200 products: they differ by less than 200 roundings of the sum of magnitudes."""
    torch.manual_seed(1)
    module, x = make().double(), torch.randn(shape, dtype=torch.float64)

    def results():
        given = x.clone().requires_grad_()
        module.zero_grad()
        y = module(given)
        (y * torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y)).sum().backward()
        return [y.detach(), given.grad, *(p.grad for p in module.parameters())]

    expected = results()
    with hal.open_device("sim:h200/strict"):
        found = results()
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert (one - other).abs().max() <= 200 * 2.0**-53 * 200 * max(1.0, float(other.abs().max()))


def test_scaled_products_of_fp8(h200):
    e4m3 = torch.float8_e4m3fn
    a, b = numbers(16, 64).to(e4m3), numbers(32, 64, seed=1).to(e4m3)
    rows, columns = torch.rand(16, 1) + 0.5, torch.rand(1, 32) + 0.5
    bias = numbers(32)
    found = torch._scaled_mm(a, b.t(), rows, columns, bias=bias, out_dtype=torch.bfloat16)
    expected = of_the_unit(a, b.t()) * rows * columns + bias.float()
    assert torch.equal(found, expected.bfloat16())


def test_e5m2_is_multiplied_by_e4m3_alone_as_on_a_card(h200):
    one, e4m3, e5m2 = (
        torch.ones(()),
        numbers(32, 32).to(torch.float8_e4m3fn),
        numbers(32, 32, seed=1).to(torch.float8_e5m2),
    )
    for a, b in ((e5m2, e4m3), (e4m3, e5m2)):
        found = torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.float32)
        assert torch.equal(found, of_the_unit(a, b.t()))
    with pytest.raises(ValueError, match="two Float8_e5m2 matrices is not supported"):
        torch._scaled_mm(e5m2, e5m2.t(), one, one, out_dtype=torch.float32)
    offsets, scales = torch.tensor([16, 32], dtype=torch.int32), torch.ones(2, 32)
    with pytest.raises(ValueError, match="two e4m3 operands"):
        torch._scaled_grouped_mm(e5m2, torch.stack([e4m3, e4m3]).mT, scales[0], scales, offsets)


def test_grouped_products(h200):
    x, weights = numbers(24, 16), numbers(3, 16, 32, seed=1)
    offsets = torch.tensor([8, 8, 24], dtype=torch.int32)
    found = F.grouped_mm(x, weights, offs=offsets)
    expected = torch.cat([of_the_unit(x[:8], weights[0]), of_the_unit(x[8:], weights[2])]).bfloat16()
    assert torch.equal(found, expected)


def test_float32_goes_to_the_tf32_unit_when_asked(h200):
    report = h200.precision.fp32_mode("tf32")
    assert report.input_bits == (("matmul", 11), ("conv", 11))
    a, b = A.float() * 1.001, B.float()
    expected = product.multiply(a[None], b[None], CHIPS["h200"].units["tf32"], ("tf32", "tf32"))[0]
    assert torch.equal(a @ b, expected)
    assert h200.precision.fp32_mode("ieee").input_bits == (("matmul", 24), ("conv", 24))
    with pytest.raises(UnsupportedPrecision):
        h200.precision.fp32_mode("bf16x3")


def test_a_schedule_is_part_of_the_name():
    with hal.open_device("sim:h200/splitk=3") as device:
        assert torch.equal(A.float() @ B.float(), of_the_unit(A.float(), B.float(), schedule=Schedule(split_k=3)))
        assert torch.equal(A @ B, of_the_unit(A, B, schedule=Schedule(split_k=3)).bfloat16())
        assert device.info.id == "sim:h200/splitk=3"
        assert device.info.simulated
        assert "splitk=3" in device.contract.evidence


@pytest.mark.parametrize("name", ["sim:h999", "sim:h200x", "sim:", "sim:h200/", "sim:/splitk=2"])
def test_another_chip_is_absent(name):
    with pytest.raises(Absent, match="there is no such device"):
        hal.open_device(name)


def test_another_option_is_refused():
    with pytest.raises(ConfigError, match="no such option"):
        hal.open_device("sim:h200/order=2")


@pytest.mark.parametrize(
    ("chip", "dtype"),
    [("v100", torch.bfloat16), ("a100", torch.float8_e4m3fn), ("mi300x", torch.float8_e4m3fn), ("h200", torch.float8_e4m3fnuz),
     ("mi250", torch.float8_e5m2)],
)  # fmt: skip
def test_what_the_chip_has_no_unit_for_is_refused(chip, dtype):
    with hal.open_device(f"sim:{chip}") as device:
        operator = "scaled_mm" if dtype.itemsize == 1 else "matmul"
        assert device.support(operator, dtype).status == "unsupported"
        with pytest.raises(UnsupportedOperation, match="no matrix unit"):
            interception.active().product(numbers(1, 2, 3).to(dtype), numbers(1, 3, 2).to(dtype))


def test_each_family_of_fp8_is_multiplied_where_it_is_known():
    for chip, known in (("h200", {"e4m3fn", "e5m2"}), ("mi300x", {"e4m3fnuz", "e5m2fnuz"}), ("a100", set())):
        with hal.open_device(f"sim:{chip}") as device:
            assert {name for name, answer in device.precision.fp8_formats().items() if answer} == known


def test_what_nobody_has_published_is_called_unverified_wherever_it_is_named():
    info = next(info for info in hal.list_devices() if info.id == "sim:ascend910b")
    assert info.name == "Ascend 910B, simulated, unverified"
    assert "unverified" in info.evidence[0]
    with hal.open_device("sim:ascend910b") as device:
        assert "unverified" in device.contract.evidence


def test_the_accumulator_that_nobody_has_published_can_be_chosen():
    found = {}
    for option in ("", "/accumulator=nearest", "/accumulator=cut", "/splitk=2/accumulator=cut"):
        with hal.open_device(f"sim:ascend910b{option}") as device:
            found[option] = A @ B
            assert device.contract.matmul["bfloat16"].rounding == ("truncate" if "cut" in option else "nearest")
    assert torch.equal(found[""], found["/accumulator=nearest"])
    assert not torch.equal(found[""], found["/accumulator=cut"])
    assert not torch.equal(found["/accumulator=cut"], found["/splitk=2/accumulator=cut"])
    for wrong, says in (
        ("ascend910b/accumulator=odd", "expected: nearest, cut"),
        ("h200/accumulator=cut", "are published"),
    ):
        with pytest.raises(ConfigError, match=says):
            hal.open_device(f"sim:{wrong}")


def test_ascend_has_no_float64_and_rounds_float32_to_hf32_where_it_is_asked_to():
    with hal.open_device("sim:ascend910b") as device:
        with pytest.raises(UnsupportedOperation, match="no matrix unit for float64"):
            A.double() @ B.double()
        assert device.precision.fp32_mode("tf32").input_bits == (("matmul", 12), ("conv", 12))
        a, b = A.float() * 1.001, B.float()
        units = CHIPS["ascend910b"].units
        assert torch.equal(a @ b, product.multiply(a[None], b[None], units["hf32"], ("hf32", "hf32"))[0])
        assert not torch.equal(a @ b, product.multiply(a[None], b[None], units["float32"], ("float32", "float32"))[0])


def test_integers_and_complex_numbers_are_the_cpus(h200):
    assert (torch.full((3, 4), 2) @ torch.full((4, 2), 3)).tolist() == [[24, 24]] * 3
    z = torch.randn(3, 3, dtype=torch.complex64)
    assert torch.allclose(z @ torch.eye(3, dtype=torch.complex64), z)


def test_what_does_not_fit_is_an_error(h200):
    for call in (lambda: A @ A, lambda: torch.bmm(A[None], A[None]), lambda: torch.mv(A, A[0, :5]),
                 lambda: torch.mm(A, B.float()), lambda: torch.addmm(C[:4], A, B)):  # fmt: skip
        with pytest.raises(RuntimeError):
            call()


def test_what_multiplies_by_itself_is_counted_and_refused_when_strict():
    x = torch.eye(4)
    with hal.open_device("sim:h200") as device:
        assert device.not_simulated() == {}
        torch.linalg.inv(x)
        assert device.not_simulated() == {"linalg_inv_ex": 1}
    with hal.open_device("cpu") as device:
        assert device.not_simulated() == {}
    with (
        hal.open_device("sim:h200/strict"),
        pytest.raises(UnsupportedOperation, match="linalg_inv_ex multiplies inside a kernel"),
    ):
        torch.linalg.inv(x)


def test_everything_is_back_after_closing():
    before = A @ B, torch.backends.cuda.flash_sdp_enabled(), torch.backends.mha.get_fastpath_enabled()
    enabled = torch._C._get_mkldnn_enabled()
    with hal.open_device("sim:v100"):
        assert interception.active() is not None
        with pytest.raises(UnsupportedOperation):
            A @ B
    assert interception.active() is None
    after = A @ B, torch.backends.cuda.flash_sdp_enabled(), torch.backends.mha.get_fastpath_enabled()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    assert enabled == torch._C._get_mkldnn_enabled()


def test_two_at_once_conflict_and_one_after_the_other_do_not():
    with hal.open_device("sim:h200") as device:
        assert str(next(iter(device.changes))) == "products of matrices on the CPU: None -> sim:h200"
        with pytest.raises(DeviceConflict) as error:
            hal.open_device("sim:a100")
    assert "products of matrices on the CPU = sim:a100, which sim:h200 (handle" in str(error.value)
    assert "holds at sim:h200\n" in str(error.value)
    with hal.open_device("sim:a100"):
        assert torch.equal(A @ B, of_the_unit(A, B, "a100").bfloat16())


@pytest.mark.parametrize("chip", sorted(CHIPS))
def test_a_small_model_trains_on_each(chip):
    torch.manual_seed(0)
    with hal.open_device(f"sim:{chip}"):
        dtype = torch.float16 if chip == "v100" else torch.bfloat16
        model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        x = torch.randn(64, 8)
        losses = []
        for _ in range(30):
            with torch.autocast("cpu", dtype=dtype):
                loss = (model(x).float() - x.sum(1, keepdim=True)).pow(2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
