# SPDX-License-Identifier: Apache-2.0
"""Random numbers on one device: the device's own generator, and portable streams.

The device's own generator is fast, and differs between vendors. A portable stream gives the same bits on every
device (hal/philox.py): use it where two devices must start from the same weights or make the same noisy choice,
as the Ling report's stochastic routing warm-up does.
"""

from __future__ import annotations

import abc
import math
from typing import TYPE_CHECKING, final

from hal import philox
from hal.arguments import integer
from hal.errors import ConfigError
from hal.facet import Facet

if TYPE_CHECKING:
    import torch


class Random(Facet, abc.ABC):
    """Random numbers of one opened device. A backend implements the hooks that start with an underscore.

    Every method raises `DeviceClosed` once the device is closed.
    """

    def __init__(self, device_id: str, torch_device: torch.device) -> None:
        super().__init__(device_id)
        self.torch_device = torch_device

    @abc.abstractmethod
    def _seed(self, seed: int) -> None: ...

    @abc.abstractmethod
    def _get_state(self) -> torch.Tensor: ...

    @abc.abstractmethod
    def _set_state(self, state: torch.Tensor) -> None: ...

    @final
    def seed(self, seed: int) -> None:
        """Seed this device's own generator, and no other device's.

        Raises:
            ConfigError: the seed is no integer in [0, 2**64).
        """
        self.check_open()
        self._seed(integer(f"{self.device_id}: the seed", seed, 0, philox.MOST))

    @final
    def get_state(self) -> torch.Tensor:
        """Return the generator's state, uint8 on the CPU; only this vendor's devices can take it back."""
        self.check_open()
        return self._get_state()

    @final
    def set_state(self, state: torch.Tensor) -> None:
        """Put a state from `get_state()` back.

        Raises:
            ConfigError: the state is of another generator, or none.
        """
        import torch

        self.check_open()
        try:
            if not isinstance(state, torch.Tensor):
                raise TypeError(f"a {type(state).__name__} is no tensor")
            self._set_state(state)
        except (RuntimeError, TypeError) as error:
            raise ConfigError(
                f"{self.device_id}: this is no state of this device's generator",
                expected="what get_state() returned on such a device",
            ) from error

    @final
    def stream(self, seed: int, name: str | int) -> RandomStream:
        """Return the portable stream `name` of `seed`, at its beginning, with its tensors on this device.

        Raises:
            ConfigError: the seed, or a name that is a number, is no integer in [0, 2**64).
        """
        self.check_open()
        return RandomStream(seed, name, self.torch_device)


@final
class RandomStream:
    """A portable stream of random numbers: the same bits on every device and host, whatever was drawn elsewhere.

    `bits` and `uniform` are computed on the device in integer arithmetic; `normal` on the host, since devices
    disagree in the last bit of a logarithm, and copied.

    Args:
        seed: an integer in [0, 2**64).
        name: a text, or a number of that range; different streams are independent.
        device: where the tensors are made.
        position: where to begin.

    Raises:
        ConfigError: the seed, the name or the position is none.
    """

    def __init__(self, seed: int, name: str | int, device: torch.device, position: int = 0) -> None:
        self._seed = seed
        self._name = name
        self._keys = philox.round_keys(seed)
        self._number = philox.stream_number(name)
        self.device = device
        self.position = position

    @property
    def position(self) -> int:
        """How many 32-bit words lie before the next one; set it to jump."""
        return self._position

    @position.setter
    def position(self, words: int) -> None:
        self._position = integer("the position in a stream", words, 0, philox.MOST)

    # The position moves last: a draw that failed, for want of memory say, can be tried again.

    def bits(self, *shape: int) -> torch.Tensor:
        """Return random 32-bit words of this shape, as int64 in [0, 2**32).

        Raises:
            ConfigError: a size is no integer, is negative, or leads beyond word 2**64; nothing was drawn.
        """
        words = self._bits(shape)
        self.position += words.numel()
        return words

    def uniform(self, *shape: int) -> torch.Tensor:
        """Return float32 in [0, 1), multiples of 2**-24. Raises as `bits`."""
        import torch

        values = (self._bits(shape) >> 8).to(torch.float32) * 2.0**-24
        self.position += values.numel()
        return values

    def normal(self, *shape: int) -> torch.Tensor:
        """Return float32 from N(0, 1). Raises as `bits`."""
        import torch

        n = self._words(shape)
        host = torch.from_numpy(philox.normal(self._seed, self._name, n, offset=self.position))
        values = host.reshape(shape).to(self.device)
        self.position += n
        return values

    def _words(self, shape: tuple[int, ...]) -> int:
        """Return how many words a tensor takes."""
        n = math.prod(integer("a size in the shape", size, 0) for size in shape)
        integer("the position after the draw", self.position + n, 0, philox.MOST)
        return n

    def _bits(self, shape: tuple[int, ...]) -> torch.Tensor:
        import torch

        start, n = self.position, self._words(shape)
        first = start // 4
        count = -(-(start + n) // 4) - first
        index = torch.arange(first, first + count, dtype=torch.int64, device=self.device)
        c0, c1 = index & philox.MASK, index >> 32
        c2 = torch.full_like(index, self._number & philox.MASK)
        c3 = torch.full_like(index, self._number >> 32)
        m0, m1 = philox.MULTIPLIERS
        for k0, k1 in self._keys:
            # The product needs 64 unsigned bits; two's complement keeps them all, and the mask takes the sign
            # extension off the upper half.
            p0, p1 = c0 * m0, c2 * m1
            c0, c1, c2, c3 = (
                ((p1 >> 32) & philox.MASK) ^ c1 ^ k0,
                p1 & philox.MASK,
                ((p0 >> 32) & philox.MASK) ^ c3 ^ k1,
                p0 & philox.MASK,
            )
        words = torch.stack([c0, c1, c2, c3], dim=1).reshape(-1)
        return words[start - 4 * first :][:n].reshape(shape)
