# SPDX-License-Identifier: Apache-2.0
"""Precision of one device: dtypes, FP8 formats, float32 modes that are proved by measuring, determinism.

A switch that reads back as set proves nothing: on some devices it changes nothing, on others a second switch of
another library decides. So `fp32_mode` states an intent, sets every switch of the vendor, reads each back, and
then multiplies crafted numbers to count the significand bits that survive.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, final, get_args

from hal.changes import Changes, Switch
from hal.errors import ConfigError, UnsupportedDtype, UnsupportedPrecision
from hal.facet import Facet
from hal.support import Support

if TYPE_CHECKING:
    import torch

    from hal.support_table import SupportTable

Fp32Mode = Literal["ieee", "tf32", "bf16x3"]

EXPECTED_INPUT_BITS: dict[str, tuple[int, int]] = {
    # Significand bits, hidden one included, that a float32 input keeps in a product: (least, most).
    "ieee": (24, 24),
    # One unit with an 8-bit exponent and 10 or 11 stored bits: TF32 and XF32 keep 11, HF32 12.
    "tf32": (11, 12),
    # A sum of two bfloat16 of 8 bits; the sign of the second gives up to one bit more.
    "bf16x3": (16, 17),
}

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
        input_bits: for each probed operation ("matmul", and "conv" where the device has convolutions), the
            measured significand bits that survive.
    """

    mode: Fp32Mode
    switches: tuple[tuple[str, object], ...]
    input_bits: tuple[tuple[str, int], ...]


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
        """
        import warnings

        import torch

        self.check_open()
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
            except (RuntimeError, UserWarning) as error:
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
                setting is back in force.
            DeviceConflict: another open device holds one of the switches at another value.
        """
        self.check_open()
        if mode not in get_args(Fp32Mode):
            raise ConfigError(f"no float32 mode {mode!r}", expected=", ".join(get_args(Fp32Mode)))
        switches = list(self._fp32_switches(mode))
        try:
            with self._changes.together():
                for switch, value in switches:
                    self._changes.set(switch, value)
                report = PrecisionReport(
                    mode,
                    tuple((switch.name, switch.read()) for switch, _ in switches),
                    tuple((operation, self.measure_input_bits(operation)) for operation in self._probed()),
                )
                self._check(report)
        except UnsupportedPrecision:
            raise
        except (ConfigError, RuntimeError) as error:  # a switch that the vendor refuses
            raise UnsupportedPrecision(
                f"float32 mode {mode!r} cannot be set: {error}", device=self.device_id, what=mode
            ) from error
        return report

    def _probed(self) -> tuple[Literal["matmul", "conv"], ...]:
        """Return what a float32 mode governs here: a plug-in device may lack convolutions."""
        import torch

        return ("matmul", "conv") if self._support.query("conv2d", torch.float32) else ("matmul",)

    def _check(self, report: PrecisionReport) -> None:
        low, high = EXPECTED_INPUT_BITS[report.mode]
        wrong = [f"{operation} keeps {bits}" for operation, bits in report.input_bits if not low <= bits <= high]
        if wrong:
            raise UnsupportedPrecision(
                f"float32 mode {report.mode!r} is not what the device computes: {', '.join(wrong)} significand bits",
                device=self.device_id,
                what=report.mode,
                expected=f"{low} bits" if low == high else f"{low} to {high} bits",
                hint="the mode 'ieee', or a device whose unit has this mode",
            )

    @final
    def measure_input_bits(self, operation: Literal["matmul", "conv"]) -> int:
        """Measure how many significand bits of a float32 input survive in a product on this device.

        Row i of the left operand holds one number, 1 + 2**-i, times one; every other product is an exact zero.
        The result is exact in any accumulator of 24 bits, so a bit that is missing was cut from the input:
        the answer is the largest i, plus the hidden bit, up to which every number comes back whole.
        """
        import torch

        n = 128  # large enough for the matrix units; small shapes may take a kernel without them
        steps = torch.arange(1, 24, dtype=torch.float64)
        numbers = (1.0 + 2.0**-steps).to(torch.float32)  # exact: at most 24 bits
        with torch.no_grad():
            if operation == "matmul":
                left = torch.zeros(n, n)
                left[torch.arange(23), torch.arange(23)] = numbers
                result = (left.to(self.torch_device) @ torch.ones(n, n).to(self.torch_device)).cpu()[:23]
                whole = (result == numbers[:, None]).all(dim=1)
            else:
                # A 3x3 kernel, as 1x1 is computed as a matrix product: channel i of the image holds number i.
                image = torch.zeros(1, n, 8, 8)
                image[0, :23] = numbers[:, None, None]
                kernel = torch.zeros(n, n, 3, 3)
                kernel[torch.arange(n), torch.arange(n), 1, 1] = 1.0
                result = torch.nn.functional.conv2d(
                    image.to(self.torch_device), kernel.to(self.torch_device), padding=1
                ).cpu()[0, :23]
                whole = (result == numbers[:, None, None]).flatten(1).all(dim=1)
        lost = (~whole).nonzero()
        return 24 if len(lost) == 0 else 1 + int(lost[0])

    # determinism -----------------------------------------------------------------------------------------------

    def _deterministic_switches(self) -> Sequence[tuple[Switch, object]]:
        """Return further switches of this vendor, beside torch's own."""
        return ()

    @final
    def deterministic(self, enabled: bool = True) -> None:
        """Make torch use deterministic algorithms, or raise where an operator has none, until `close()`.

        Two runs on one device and one version then give the same bits; it promises nothing across devices.
        """
        import torch

        self.check_open()
        switches = [
            (
                Switch(
                    "torch.use_deterministic_algorithms",
                    torch.are_deterministic_algorithms_enabled,
                    torch.use_deterministic_algorithms,
                ),
                True,
            ),
            *self._deterministic_switches(),
        ]
        if not enabled:
            self._changes.release([switch.name for switch, _ in switches])
            return
        with self._changes.together():
            for switch, value in switches:
                self._changes.set(switch, value)


def attribute_switch(owner: Any, attribute: str, name: str) -> Switch:
    """Return the switch that is one attribute of one object, shown to users as `name`."""

    def write(value: object) -> None:
        setattr(owner, attribute, value)

    return Switch(name, lambda: getattr(owner, attribute), write)
