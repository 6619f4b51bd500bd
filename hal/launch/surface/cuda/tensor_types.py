# SPDX-License-Identifier: Apache-2.0
"""The typed tensors and storages of old: `torch.cuda.FloatTensor(3, 4)`, `isinstance(x, torch.cuda.LongTensor)`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hal.launch.api import active, count_made, door, value
from hal.launch.redirection import Redirection

if TYPE_CHECKING:
    import torch

_DTYPES = {
    "Float": "float32", "Double": "float64", "Half": "float16", "BFloat16": "bfloat16", "Byte": "uint8",
    "Char": "int8", "Short": "int16", "Int": "int32", "Long": "int64", "Bool": "bool",
}  # fmt: skip


class CudaTensorType(type):
    """The metaclass: calling a type makes a tensor on the device, and `isinstance` looks at device and dtype."""

    torch_dtype: torch.dtype

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        """Make a tensor on the current device."""
        count_made(f"torch.cuda.{cls.__name__}")
        r = active()
        if r is None:
            raise TypeError(f"type torch.cuda.{cls.__name__} not available. Torch not compiled with CUDA enabled.")
        import torch

        plain: Any = getattr(torch, cls.__name__)
        return plain(*args, **kwargs).to(r.targets[r.current])

    def __instancecheck__(cls, instance: object) -> bool:
        count_made(f"torch.cuda.{cls.__name__}", belief=True)
        r = active()
        import torch

        return (
            r is not None and isinstance(instance, torch.Tensor) and instance.dtype == cls.torch_dtype
            and instance.device.type == r.type and not (r.hosts is not None and instance in r.hosts)
        )  # fmt: skip

    @property
    def dtype(cls) -> torch.dtype:
        """The dtype of its tensors."""
        return cls.torch_dtype

    @property
    def is_cuda(cls) -> bool:
        """True."""
        return True


def _enter(name: str, dtype: str) -> None:
    @value(f"torch.cuda.{name}Tensor", verdict="emulated")
    def tensor_type(r: Redirection) -> type:
        """See `CudaTensorType`."""
        import torch

        made: Any = CudaTensorType(f"{name}Tensor", (), {"torch_dtype": getattr(torch, dtype)})
        made.__module__ = "torch.cuda"
        return made  # type: ignore[no-any-return]


for _name, _dtype in _DTYPES.items():
    _enter(_name, _dtype)
# torch's own classes, which ask for memory of "cuda".
door(*(f"torch.cuda.{_name}Storage" for _name in (*_DTYPES, "ComplexFloat", "ComplexDouble")), verdict="emulated")
