# SPDX-License-Identifier: Apache-2.0
"""The precision of an opened device: what it says against what its products are."""

from __future__ import annotations

from typing import Any

from hal.check.checks.expect import expect
from hal.device import Device
from hal.errors import UnsupportedOperation, UnsupportedPrecision
from hal.precision import FP8_FORMATS
from hal.support import Support


def ieee(device: Device) -> str:
    """Float32 products keep all 24 bits; measured, not read back."""
    report = device.precision.fp32_mode("ieee")
    wrong = [f"{operation} keeps {bits} bits" for operation, bits in report.input_bits if bits != 24]
    expect(not wrong, ", ".join(wrong))
    return "measured: " + ", ".join(f"{operation} {bits} bits" for operation, bits in report.input_bits)


def reduced(device: Device) -> str:
    """A reduced mode is confirmed by measurement or refused with a reason."""
    confirmed = []
    reasons = []
    for mode in ("tf32", "bf16x3"):
        try:
            device.precision.fp32_mode(mode)
            confirmed.append(mode)
        except UnsupportedPrecision as error:
            reasons.append(f"{mode}: {error.reason}")
    if not confirmed:
        raise UnsupportedOperation("; ".join(reasons), device=device.info.id, what="precision.fp32_mode")
    return "; ".join([f"{', '.join(confirmed)} confirmed", *reasons])


def autocast(device: Device) -> str:
    """Products of float32 tensors are bfloat16 inside the context, and float32 outside and where it is disabled."""
    import torch

    ones = torch.ones(32, 32, device=device.torch_device)
    with device.precision.autocast(torch.bfloat16):
        inside = ones @ ones
    with device.precision.autocast(torch.bfloat16, enabled=False):
        disabled = ones @ ones
    outside = ones @ ones
    for product, dtype, where in (
        (inside, torch.bfloat16, "inside"), (disabled, torch.float32, "disabled"), (outside, torch.float32, "outside"),
    ):  # fmt: skip
        expect(product.dtype == dtype, f"a product is {product.dtype} where autocast to bfloat16 is {where}")
        expect(bool((product.float().cpu() == 32).all()), f"a product of ones is wrong where autocast is {where}")
    return "bfloat16 inside, float32 outside"


def fp8(device: Device) -> str:
    """Each FP8 format is multiplied exactly where small integers are exact, or refused with a reason."""
    import torch

    answers = device.precision.fp8_formats()
    expect(set(answers) == set(FP8_FORMATS), f"it tells of {', '.join(answers)}, not of {', '.join(FP8_FORMATS)}")
    for name, answer in answers.items():
        expect(isinstance(answer, Support) and answer.reason, f"{name}: {answer!r} is no answer with a reason")
    native = [name for name, answer in answers.items() if answer]
    for name in native:
        _multiply(device, name, getattr(torch, FP8_FORMATS[name]))
    refused: dict[str, list[str]] = {}
    for name, answer in answers.items():
        if not answer:
            refused.setdefault(answer.reason.partition(". ")[0], []).append(name)  # torch's refusals go on for pages
    lacking = [f"{', '.join(names)}: {reason}" for reason, names in refused.items()]
    if not native:
        raise UnsupportedOperation("; ".join(lacking), device=device.info.id, what="precision.fp8_formats")
    return "; ".join([f"{', '.join(native)} multiplied exactly", *lacking])


def _multiply(device: Device, name: str, dtype: Any) -> None:
    import torch

    # The same bits mean half the value in the other family, so that a mix-up shows in the product.
    left = torch.arange(32.0 * 32).remainder(3).reshape(32, 32)
    right = torch.arange(32.0 * 32).remainder(5).sub(2).reshape(32, 32)
    one = torch.ones((), device=device.torch_device)
    product = torch._scaled_mm(
        left.to(dtype).to(device.torch_device), right.to(dtype).to(device.torch_device).t(), one, one,
        out_dtype=torch.bfloat16,
    )  # fmt: skip
    expect(torch.equal(product.cpu().float(), left @ right.t()), f"a product of small integers in {name} is wrong")


def deterministic(device: Device) -> str:
    """Deterministic algorithms give the same bits twice."""
    import torch

    before = torch.are_deterministic_algorithms_enabled()
    device.precision.deterministic()
    try:
        expect(torch.are_deterministic_algorithms_enabled(), "torch's switch is off afterwards")
        source = device.random.stream(1, "check").uniform(4096)
        index = device.random.stream(2, "check").bits(4096) % 16
        runs = [torch.zeros(16, device=device.torch_device).index_add(0, index, source).cpu() for _ in range(2)]
        expect(torch.equal(runs[0], runs[1]), "two runs of index_add differ")
    finally:
        device.precision.deterministic(False)
    expect(torch.are_deterministic_algorithms_enabled() == before, "the switch stays on")
    return "index_add twice, the same bits"
