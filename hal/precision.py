# SPDX-License-Identifier: Apache-2.0
"""Precision of one device: dtypes, FP8 formats, float32 modes that are proved by measuring, determinism.

A switch that reads back as set proves nothing: on some devices it changes nothing, on others a second switch of
another library decides. So `fp32_mode` states an intent, sets every switch of the vendor, reads each back, and
then multiplies crafted numbers to count the significand bits that survive (hal/fp32_probe.py).
"""

from __future__ import annotations

import abc
import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, final, get_args

from hal.attempt import attempt
from hal.changes import Changes, Switch
from hal.errors import (
    Broken,
    ConfigError,
    HalError,
    UnsupportedDtype,
    UnsupportedOperation,
    UnsupportedPrecision,
)
from hal.facet import Facet
from hal.fp32_probe import Kept, kept
from hal.support import Support

if TYPE_CHECKING:
    import torch

    from hal.support_table import SupportTable

Fp32Mode = Literal["ieee", "tf32", "bf16x3"]

EXPECTED_INPUT_BITS: dict[Fp32Mode, tuple[int, int]] = {
    # Significand bits, hidden one included, that a float32 input keeps in a product: (least, most). hal/fp32_probe.py
    # derives them.
    "ieee": (24, 24),
    # One unit with an 8-bit exponent and 10 or 11 stored bits: TF32 and XF32 keep 11, HF32 12.
    "tf32": (11, 12),
    # A sum of two bfloat16 of 8 bits; the sign of the second gives one bit more where the first is rounded.
    "bf16x3": (16, 17),
}

Probed = Literal["matmul", "conv"]
"""What a float32 mode governs and the measurement covers."""

FP8_FORMATS = {
    # OCP: e4m3fn has no infinity and reaches 448. fnuz has no infinity, no -0, one NaN (0x80), an exponent bias
    # one larger, and reaches 240: the same bits mean half the value.
    "e4m3fn": "float8_e4m3fn",
    "e5m2": "float8_e5m2",
    "e4m3fnuz": "float8_e4m3fnuz",
    "e5m2fnuz": "float8_e5m2fnuz",
}


@dataclass(frozen=True)
class PrecisionReport:
    """What was asked for, what was set and what was measured.

    Attributes:
        mode: the intent.
        switches: each switch with the value that it reads back.
        input_bits: for each measured operation ("matmul", "conv"), the significand bits of an input that survive.
        product_bits: likewise, the bits up to which the product of two numbers comes back whole; 12 is all there is.
        absent: operations that this device does not have in float32, each with its refusal: nothing to measure.
    """

    mode: Fp32Mode
    switches: tuple[tuple[str, object], ...]
    input_bits: tuple[tuple[str, int], ...]
    product_bits: tuple[tuple[str, int], ...]
    absent: tuple[tuple[str, str], ...] = ()


class Precision(Facet, abc.ABC):
    """Precision of one opened device. A backend implements the hooks that start with an underscore.

    Args:
        device_id: for messages.
        torch_device: where the probes run.
        changes: ledger of the device.
        support: the device's table of operators.
    """

    def __init__(self, device_id: str, torch_device: torch.device, changes: Changes, support: SupportTable) -> None:
        super().__init__(device_id, changes)
        self.torch_device = torch_device
        self._for_determinism: set[str] = set()  # names of switches that `deterministic()` alone holds
        self._support = support

    # dtypes ----------------------------------------------------------------------------------------------------

    @final
    def supports(self, dtype: torch.dtype, operation: str = "matmul") -> Support:
        """Tell whether the device computes `operation` in `dtype`, by trying it once."""
        self.check_open()
        return self._support.query(operation, dtype)

    @final
    def fp8_formats(self) -> dict[str, Support]:
        """Return for each FP8 format of both families whether the device multiplies it natively."""
        import torch

        self.check_open()
        return {
            name: self._support.query("scaled_mm", getattr(torch, attribute))
            if hasattr(torch, attribute)
            else Support("unsupported", f"torch {torch.__version__} has no {attribute}")
            for name, attribute in FP8_FORMATS.items()
        }

    @final
    def autocast(self, dtype: torch.dtype, *, enabled: bool = True) -> contextlib.AbstractContextManager[Any]:
        """Return torch's autocast context of this device.

        Raises:
            UnsupportedDtype: the device does not multiply in `dtype`, or autocast refuses it.
            ConfigError: `dtype` is no `torch.dtype`.
        """
        import warnings

        import torch

        self.check_open()
        if not isinstance(dtype, torch.dtype):
            raise ConfigError(f"{self.device_id}: autocast to {dtype!r}", expected="a torch.dtype, as torch.bfloat16")
        if enabled:
            answer = self.supports(dtype)
            if not answer:
                raise UnsupportedDtype(
                    f"cannot multiply in {dtype}: {answer.reason}", device=self.device_id, what=str(dtype)
                )
        with warnings.catch_warnings():
            # torch disables itself with a warning where it refuses a dtype; a run in another precision than the
            # one asked for must not start.
            warnings.simplefilter("error")
            try:
                return torch.autocast(self.torch_device.type, dtype=dtype, enabled=enabled)
            except (RuntimeError, UserWarning, AssertionError) as error:  # the last: a plug-in without autocast
                raise UnsupportedDtype(f"autocast refuses {dtype}", device=self.device_id, what=str(dtype)) from error

    # float32 mode ----------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def _fp32_switches(self, mode: Fp32Mode) -> Sequence[tuple[Switch, object]]:
        """Return every switch that decides how this vendor multiplies float32, with the value for `mode`.

        Raises:
            UnsupportedPrecision: the vendor has no such mode.
        """

    @final
    def fp32_mode(self, mode: Fp32Mode) -> PrecisionReport:
        """Multiply float32 in this mode from now on, until another call or `close()`.

        Args:
            mode: "ieee": all 24 bits; "tf32": one pass of the vendor's reduced unit; "bf16x3": three passes of
                bfloat16.

        Returns:
            What was set and what was measured.

        Raises:
            ConfigError: there is no such mode.
            UnsupportedPrecision: the vendor lacks it, or the measurement contradicts the switches. The former
                setting is back in force, as after every other error.
            DeviceConflict: another open device holds one of the switches at another value.
            OutOfMemoryError, Broken: the device could not be measured.
        """
        self.check_open()
        if mode not in get_args(Fp32Mode):
            raise ConfigError(f"no float32 mode {mode!r}", expected=", ".join(get_args(Fp32Mode)))
        switches = list(self._fp32_switches(mode))
        with self._changes.together():
            try:
                for switch, value in switches:
                    self._changes.set(switch, value)
            except (ConfigError, RuntimeError) as error:  # a switch that the vendor refuses
                raise UnsupportedPrecision(
                    f"float32 mode {mode!r} cannot be set: {error}", device=self.device_id, what=mode
                ) from error
            present, absent = self._probed(mode)
            report = PrecisionReport(
                mode,
                tuple((switch.name, switch.read()) for switch, _ in switches),
                tuple((operation, self.measure_input_bits(operation)) for operation in present),
                tuple((operation, self.measure(operation).product_bits) for operation in present),
                absent,
            )
            self._check(report)
        return report

    def _probed(self, mode: Fp32Mode) -> tuple[list[Probed], tuple[tuple[str, str], ...]]:
        """Return which operations can be measured, and which this device refuses: a plug-in may lack convolutions."""
        import torch

        operations: dict[Probed, str] = {"matmul": "matmul", "conv": "conv2d"}
        answers = {operation: self._support.query(name, torch.float32) for operation, name in operations.items()}
        if not answers["matmul"]:
            raise UnsupportedPrecision(
                f"multiplies no float32: {answers['matmul'].reason}", device=self.device_id, what=mode
            )
        present = [operation for operation, answer in answers.items() if answer]
        return present, tuple((operation, answer.reason) for operation, answer in answers.items() if not answer)

    def _check(self, report: PrecisionReport) -> None:
        low, high = EXPECTED_INPUT_BITS[report.mode]
        wrong = [f"{operation} keeps {bits}" for operation, bits in report.input_bits if not low <= bits <= high]
        if wrong:
            fitting = [
                mode
                for mode, (least, most) in EXPECTED_INPUT_BITS.items()
                if all(least <= bits <= most for _, bits in report.input_bits)
            ]
            raise UnsupportedPrecision(
                f"float32 mode {report.mode!r} is not what the device computes: {', '.join(wrong)} significand bits",
                device=self.device_id,
                what=report.mode,
                expected=f"{low} bits" if low == high else f"{low} to {high} bits",
                hint=f"the mode {fitting[0]!r}, which this is" if fitting else "a device whose unit has this mode",
            )
        short = [f"{operation} above {bits} bits" for operation, bits in report.product_bits if bits < 12]
        if report.mode == "ieee" and short:
            raise UnsupportedPrecision(
                "float32 mode 'ieee' is not what the device computes: it keeps every input, and drops a part of the "
                f"product of two numbers ({', '.join(short)})",
                device=self.device_id,
                what=report.mode,
                expected="12 bits",
            )

    @final
    def measure_input_bits(self, operation: Probed) -> int:
        """Measure how many significand bits of a float32 input survive in a product on this device, as it is set now.

        Raises: as `measure` does.
        """
        return self.measure(operation).input_bits

    @final
    def measure(self, operation: Probed) -> Kept:
        """Measure what survives of float32 numbers in a product on this device, as it is set now.

        Raises:
            OutOfMemoryError: there is no memory for it.
            Broken: the operation failed.
        """
        self.check_open()
        multiply = self._matmul if operation == "matmul" else self._convolution
        try:
            with attempt(self.device_id, self.torch_device):
                return kept(multiply)
        except HalError:
            raise
        except Exception as error:
            raise Broken(f"the float32 {operation} cannot be measured: {error}", device=self.device_id) from error

    def _matmul(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return (left.to(self.torch_device) @ right.to(self.torch_device)).to("cpu")

    def _convolution(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """Multiply two matrices by a convolution: of kernels with one weight, and of single pixels.

        The kernels are 3x3, as 1x1 is computed as a matrix product. The stride of 2 rules out the algorithms that
        transform their inputs (Winograd, FFT), whose own roundings would be taken for lost bits.
        """
        import torch

        rows, inner = left.shape
        columns = right.shape[1]
        side = math.isqrt(columns - 1) + 1
        kernels = torch.zeros(rows, inner, 3, 3, dtype=torch.float32, device="cpu")
        kernels[:, :, 1, 1] = left
        pixels = torch.zeros(inner, side * side, dtype=torch.float32, device="cpu")
        pixels[:, :columns] = right
        image = torch.zeros(1, inner, 2 * side, 2 * side, dtype=torch.float32, device="cpu")
        image[0, :, ::2, ::2] = pixels.reshape(inner, side, side)
        result = torch.nn.functional.conv2d(
            image.to(self.torch_device), kernels.to(self.torch_device), stride=2, padding=1
        )
        return result.to("cpu").reshape(rows, side * side)[:, :columns]

    # determinism -----------------------------------------------------------------------------------------------

    def _deterministic_switches(self) -> Sequence[tuple[Switch, object]]:
        """Return further switches of this vendor, beside torch's own."""
        return ()

    @final
    def deterministic(self, enabled: bool = True) -> None:
        """Make torch use deterministic algorithms, or raise where an operator has none, until `close()`.

        Two runs on one device and one version then give the same bits; it promises nothing across devices. False takes
        back what this device asked for, and leaves what the user set.

        Raises:
            UnsupportedOperation: products would raise from now on; the former setting is back.
            DeviceConflict: another open device holds one of the switches at another value.
        """
        import torch

        self.check_open()
        if not enabled:
            self._changes.release(self._for_determinism)
            self._for_determinism.clear()
            return
        switches = [(_DETERMINISTIC, (True, False)), *self._deterministic_switches()]
        new = {switch.name for switch, _ in switches if self._changes.value(switch.name) is None}
        with self._changes.together():
            for switch, value in switches:
                self._changes.set(switch, value)
            # Not before they are set: some libraries read their settings at the first product, once.
            answers = [self._support.query("matmul", t) for t in (torch.float32, torch.bfloat16, torch.float16)]
            if not any(answers):
                raise UnsupportedOperation(
                    f"has no deterministic products: {answers[0].reason}", device=self.device_id, what="deterministic",
                    hint="open the device before the process's first product",
                )  # fmt: skip
        self._for_determinism |= new


def _write_deterministic(pair: tuple[bool, bool]) -> None:
    import torch

    torch.use_deterministic_algorithms(pair[0], warn_only=pair[1])


def _read_deterministic() -> tuple[bool, bool]:
    import torch

    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


# Two settings, (enabled, warn_only), that torch writes by one call; kept together, or the second would be lost.
_DETERMINISTIC = Switch("torch.use_deterministic_algorithms", _read_deterministic, _write_deterministic)


def attribute_switch(owner: Any, attribute: str, name: str) -> Switch:
    """Return the switch that is one attribute of one object, shown to users as `name`."""

    def write(value: object) -> None:
        setattr(owner, attribute, value)

    return Switch(name, lambda: getattr(owner, attribute), write)
