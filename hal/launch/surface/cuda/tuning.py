# SPDX-License-Identifier: Apache-2.0
"""torch.cuda.tunable: trying several forms of a matrix product and keeping the fastest.

No other device does. What a program sets it reads again, and every product runs in the device's one form.
"""

from __future__ import annotations

from typing import Any

from hal.launch.api import api, refused
from hal.launch.redirection import Redirection

_NOTE = "kept and given back; products run in the device's one form"
_WHY = "this device has one form of each product: there is nothing to tune"

# Setter, getter, and what CUDA's getter returns before anything is set.
_SETTINGS: tuple[tuple[str, str, Any], ...] = (
    ("enable", "is_enabled", False),
    ("tuning_enable", "tuning_is_enabled", True),
    ("record_untuned_enable", "record_untuned_is_enabled", False),
    ("set_max_tuning_duration", "get_max_tuning_duration", 30),
    ("set_max_tuning_iterations", "get_max_tuning_iterations", 100),
    ("set_rotating_buffer_size", "get_rotating_buffer_size", -1),
    ("set_filename", "get_filename", "tunableop_results.csv"),
)


def _enter(setter: str, getter: str, default: Any) -> None:
    # CUDA's setters name their argument in several ways, and some have a default.
    @api(f"torch.cuda.tunable.{setter}", verdict="emulated", note=_NOTE)
    def put(r: Redirection, *args: Any, **kwargs: Any) -> None:
        value = next(iter((*args, *kwargs.values())), True)
        r.kept[getter] = value
        if setter == "enable" and value:
            r.idle("torch.cuda.tunable.enable", _WHY)

    @api(f"torch.cuda.tunable.{getter}", verdict="emulated", note=_NOTE)
    def get(r: Redirection) -> Any:
        return r.kept.get(getter, default)


for _names in _SETTINGS:
    _enter(*_names)


@api("torch.cuda.tunable.get_results", "torch.cuda.tunable.get_validators", verdict="emulated", note=_NOTE)
def get_results(r: Redirection) -> tuple[Any, ...]:
    """Nothing was tuned."""
    return ()


@api("torch.cuda.tunable.read_file", verdict="emulated", note="reads nothing")
def read_file(r: Redirection, filename: str | None = None) -> bool:
    """False: no result in the file is of this device."""
    return False


@api("torch.cuda.tunable.set_numerical_check_tolerances", verdict="emulated", note="does nothing")
def set_numerical_check_tolerances(r: Redirection, enable: bool, atol: float = 1e-5, rtol: float = 1e-5) -> None:
    """There is no other form that could be checked."""


refused(
    "torch.cuda.tunable.tune_gemm_in_file", "torch.cuda.tunable.mgpu_tune_gemm_in_file",
    why=_WHY, hint="tune on the GPU that the file is for",
)  # fmt: skip
