"""Quantized weights and activations as changes that the reconstruction loop can train."""

from __future__ import annotations

import torch
from torch import Tensor

from recipes.quantize import primitives as q
from recipes.quantize.settings import QuantizeSettings
from recipes.reconstruct import DropMasks, Group

INITIAL_MARGIN = 1e-3  # fractional parts are kept this far from 0 and 1, where h has no gradient


class QuantizedWeight:
    """A weight at `bits` bits per channel of `axis`: nearest rounding, until `learn` lets the rounding be trained.

    Real value: s * (clip(floor(W / s0) + h(v) + z, low, high) - z), where s0 is the searched scale and the trained s
    starts there (GENIE-M, Jeon et al. 2023); h is AdaRound's rectified sigmoid, at first the fractional part of W / s0.
    """

    def __init__(self, weight: Tensor, axis: int, bits: int, settings: QuantizeSettings) -> None:
        self.weight, self.axis, self.bits, self.settings = weight, axis, bits, settings
        self.low, self.high = q.signed_range(bits)
        rows = weight.movedim(axis, 0).flatten(1)
        scale, zero = q.search_range(rows, self.low, self.high, norm=settings.range_norm, steps=settings.range_steps)
        self.scale = q.broadcast(scale, weight.dim(), axis)
        self.zero = q.broadcast(zero, weight.dim(), axis)
        self.floor: Tensor | None = None
        self.v: Tensor | None = None
        self.log_growth = torch.zeros_like(self.scale)

    def learn(self) -> None:
        """Start training from nearest rounding."""
        steps = self.weight / self.scale
        self.floor = torch.floor(steps)
        self.v = q.inverse_rectified_sigmoid((steps - self.floor).clamp(INITIAL_MARGIN, 1 - INITIAL_MARGIN))

    def groups(self) -> list[Group]:
        if self.v is None:
            return []
        groups = [Group([self.v], self.settings.rounding_rate)]
        if self.settings.scale_rate:
            groups.append(Group([self.log_growth], self.settings.scale_rate, decay=True))
        return groups

    def penalty(self, progress: float) -> Tensor | None:
        """The rounding regulariser: nothing in the warm-up, then beta falls and the weight ramps up."""
        settings = self.settings
        if self.v is None or progress < settings.warmup:
            return None
        part = (progress - settings.warmup) / (1 - settings.warmup)
        beta = settings.beta_start + (settings.beta_end - settings.beta_start) * part
        return settings.regulariser * q.rounding_regulariser(q.rectified_sigmoid(self.v), beta)

    def tensor(self) -> Tensor:
        scale = self.current_scale()
        if self.v is None or self.floor is None:
            return q.dequantize(self.integers(), scale, self.zero)
        soft = torch.clamp(self.floor + q.rectified_sigmoid(self.v) + self.zero, self.low, self.high)
        return q.dequantize(soft, scale, self.zero)

    def current_scale(self) -> Tensor:
        return self.scale * torch.exp(self.log_growth)

    def integers(self) -> Tensor:
        """The integers that the file gets, in the weight's shape."""
        if self.v is None or self.floor is None:
            return q.quantize(self.weight, self.scale, self.zero, self.low, self.high)
        up = (q.rectified_sigmoid(self.v) >= 0.5).to(self.floor.dtype)
        return torch.clamp(self.floor + up + self.zero, self.low, self.high)

    def undecided(self) -> float:
        """Share of the weights whose rounding has not come to 0 or 1 (within 0.01)."""
        if self.v is None:
            return 0.0
        h = q.rectified_sigmoid(self.v)
        return float(((h > 0.01) & (h < 0.99)).float().mean())

    @torch.no_grad()
    def harden(self) -> None:
        """End of training: from here on `tensor` is what the file will say, to the last bit."""
        integers = self.integers()
        self.scale, self.log_growth = self.current_scale(), torch.zeros_like(self.scale)
        self.weight, self.v, self.floor = q.dequantize(integers, self.scale, self.zero), None, None


class LearnedTensor:
    """A float initializer (a bias) that is trained along."""

    def __init__(self, value: Tensor, rate: float) -> None:
        self.value, self.rate = value.clone(), rate

    def groups(self) -> list[Group]:
        return [Group([self.value], self.rate, decay=True)] if self.rate else []

    def penalty(self, progress: float) -> Tensor | None:
        return None

    def tensor(self) -> Tensor:
        return self.value


class QuantizedActivation:
    """A value at `bits` bits per tensor, unsigned: zero point fixed, step learned (LSQ, Esser et al. 2020).

    `drop` leaves a share of the elements unquantized while training (QDrop).
    """

    def __init__(self, sample: Tensor, bits: int, settings: QuantizeSettings) -> None:
        self.bits, self.rate = bits, settings.activation_rate
        self.low, self.high = q.unsigned_range(bits)
        scale, zero = q.search_range(sample.flatten()[None], self.low, self.high, norm=2.0, steps=settings.range_steps)
        self.scale, self.zero = scale[0], zero[0]
        self.log_growth = torch.zeros_like(self.scale)
        self.drop: DropMasks | None = None

    def groups(self) -> list[Group]:
        return [Group([self.log_growth], self.rate, decay=True)] if self.rate else []

    def penalty(self, progress: float) -> Tensor | None:
        return None

    def __call__(self, x: Tensor) -> Tensor:
        scale = self.scale * torch.exp(self.log_growth)
        steps = q.round_straight_through(x / scale) + self.zero
        rounded = (torch.clamp(steps, self.low, self.high) - self.zero) * scale
        return rounded if self.drop is None else torch.where(self.drop.like(x), x, rounded)

    @torch.no_grad()
    def harden(self) -> None:
        self.scale = self.scale * torch.exp(self.log_growth)
        self.log_growth, self.drop = torch.zeros_like(self.scale), None
