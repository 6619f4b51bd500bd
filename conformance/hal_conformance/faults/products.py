# SPDX-License-Identifier: Apache-2.0
"""Faults of arithmetic: accumulators, inputs, stores, and the activation."""

from __future__ import annotations

import torch
from torch import Tensor

from hal_conformance.faults.by_hand import by_hand
from hal_conformance.faults.catalogue import fault
from hal_conformance.faults.parts import OwnProduct, gradient_of


@fault("pytorch#106395")
class AccumulatesInBfloat16(OwnProduct):
    """Products are added up in bfloat16, in blocks of 16."""

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """See `OwnProduct.product`."""
        parts = [(left @ right).bfloat16() for left, right in zip(a.split(16, -1), b.split(16, -2), strict=True)]
        total: Tensor = parts[0]
        for part in parts[1:]:
            total = total + part
        return total.float()


@fault("pytorch#67384")
class ReducedInputs(OwnProduct):
    """float32 inputs keep 11 bits, without saying so (TF32)."""

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """See `OwnProduct.product`."""
        return self.cut(a) @ self.cut(b)

    def cut(self, x: Tensor) -> Tensor:
        """Return x rounded to 11 bits, with the gradient of x."""
        return gradient_of(((x.detach().view(torch.int32) + 0x1000) & -0x2000).view(torch.float32), x)


@fault("triton#11217")
class TruncatesStores(OwnProduct):
    """Products are rounded to 16 bits by cutting off."""

    def stored(self, x: Tensor, w: Tensor) -> Tensor:
        """See `OwnProduct.stored`."""
        exact = self.product(x.float(), w.float().mT)
        if x.dtype == torch.bfloat16:
            exact = gradient_of((exact.detach().view(torch.int32) & -65536).view(torch.float32), exact)
        return exact.to(x.dtype)


@fault()
class TruncatesTheGate(TruncatesStores):
    """Only the gate projection's products are cut off."""

    def expert(self, x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
        """See `OwnProduct.expert`."""
        return (self.activate(self.stored(x, w1)) * (x @ w3.mT)) @ w2.mT


@fault()
class RoundsHidden(OwnProduct):
    """The hidden values pass through bfloat16 where the dtype is float16."""

    def expert(self, x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
        """See `OwnProduct.expert`."""
        hidden = self.activate(self.stored(x, w1)) * self.stored(x, w3)
        return self.stored(hidden.bfloat16().to(x.dtype), w2)


@fault("FlagGems#6277")
class SiluTails(OwnProduct):
    """silu goes through a tanh of 11 bits where the gate is beyond 4."""

    def activate(self, g: Tensor) -> Tensor:
        """See `OwnProduct.activate`."""
        wide = g.float()
        low = ((wide / 2).tanh() * 2048).round() / 2048
        return (wide * torch.where(wide.abs() > 4, 0.5 + 0.5 * low, wide.sigmoid())).to(g.dtype)


@fault()
class SiluOfZeroTail(OwnProduct):
    """silu is zero where the gate is below -4.5."""

    def activate(self, g: Tensor) -> Tensor:
        """See `OwnProduct.activate`."""
        return torch.where(g < -4.5, g * 0, super().activate(g))


@fault()
class ClampsTheGate(OwnProduct):
    """The gate is clamped at 7, as another model does."""

    def activate(self, g: Tensor) -> Tensor:
        """See `OwnProduct.activate`."""
        return super().activate(g.clamp(max=7.0))


@fault()
class GeluForSilu(OwnProduct):
    """The activation is GELU in one of its forms."""

    def activate(self, g: Tensor) -> Tensor:
        """See `OwnProduct.activate`."""
        return g * (1.702 * g).sigmoid()


@fault()
class FloatSumOfSmall(OwnProduct):
    """Sums that end below 1 are kept in float16."""

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """See `OwnProduct.product`."""
        y = a @ b
        return torch.where(y.abs() < 1, gradient_of(y.half().float(), y), y)


class CutsGradients(OwnProduct):
    """The gradient of one stage is cut off where it is stored, in a dtype of 16 bits."""

    stage = ""

    def at(self, stage: str, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return x, which is in float32; its gradient is cut off if it is of the stage that is wrong."""
        lost = {torch.bfloat16: -(2**16), torch.float16: -(2**13)}.get(dtype)
        if stage != self.stage or lost is None:
            return x
        return by_hand(torch.clone, lambda d, _: (d.view(torch.int32) & lost).view(torch.float32), x)

    def expert(self, x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
        """See `OwnProduct.expert`."""
        s = self.at("activation", self.activate(self.stored(x, w1)).float(), x.dtype)
        u = self.at("up", self.stored(x, w3).float(), x.dtype)
        h = self.at("hidden", (s * u).to(x.dtype).float(), x.dtype)
        return self.product(h, w2.float().mT).to(x.dtype)


@fault()
class CutsGradientsOfHidden(CutsGradients):
    """The gradients of hidden units are rounded to 16 bits by cutting off."""

    stage = "hidden"


@fault()
class CutsGradientsOfUp(CutsGradients):
    """The gradients of the up projection's results are rounded to 16 bits by cutting off."""

    stage = "up"


@fault()
class CutsGradientsOfActivation(CutsGradients):
    """The gradients of silu's results are rounded to 16 bits by cutting off."""

    stage = "activation"
