# SPDX-License-Identifier: Apache-2.0
"""safetensors: what its files hold is put onto a device by compiled code, which asks torch itself for CUDA."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

from hal.launch import api as state
from hal.launch.api import api
from hal.launch.redirection import Redirection, is_number

if TYPE_CHECKING:
    import torch


@api("safetensors.safe_open", note="safetensors.torch.load_file opens its files so, too")
def safe_open(r: Redirection, filename: Any, framework: str, device: Any = "cpu", **kwargs: Any) -> Any:
    """Open a file whose tensors come to the device, or are on the host."""
    import safetensors

    true = r.translate(device)
    given = str(true) if true is not device else device
    opened = safetensors.safe_open(filename, framework, given, **kwargs)
    if r.hosts is None or framework not in ("pt", "torch", "pytorch"):
        return opened
    host = True if r.is_host(device) else False if is_number(device) or true is not device else None
    return opened if host is None else _File(opened, host)


@final
class _File:
    """An open file that says of its tensors on which side they are."""

    def __init__(self, opened: Any, host: bool) -> None:
        self._opened = opened
        self._host = host

    def __enter__(self) -> _File:
        self._opened = self._opened.__enter__()
        return self

    def __exit__(self, *error: Any) -> Any:
        return self._opened.__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._opened, name)

    def get_tensor(self, name: str) -> torch.Tensor:
        """Return one tensor."""
        return self._placed(self._opened.get_tensor(name))

    def get_tensors(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        """Return several by name."""
        return {name: self._placed(tensor) for name, tensor in self._opened.get_tensors(*args, **kwargs).items()}

    def get_slice(self, name: str) -> Any:
        """Return what is indexed to read a part of a tensor."""
        return _Slice(self._opened.get_slice(name), self)

    def _placed(self, tensor: torch.Tensor) -> torch.Tensor:
        r = state.active()
        if r is None or r.hosts is None:
            return tensor
        return r.hosts.add(tensor) if self._host else r.hosts.add_device(tensor)


@final
class _Slice:
    """A tensor of a file that is read in parts."""

    def __init__(self, opened: Any, file: _File) -> None:
        self._opened = opened
        self._file = file

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._file._placed(self._opened[index])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._opened, name)
