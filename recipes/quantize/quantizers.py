"""Quantized weights and activations as changes that the reconstruction loop can train."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from converters.torch_module import Layer
from recipes.least_squares import Moments, from_rows, to_rows
from recipes.quantize import primitives as q
from recipes.quantize.gptq import gptq
from recipes.quantize.settings import QuantizeSettings
from recipes.reconstruct import DropMasks, Group

INITIAL_MARGIN = 1e-3  # fractional parts are kept this far from 0 and 1, where h has no gradient


class Rounding(Protocol):
    """How the integers of a weight are learned: from W / s to integers, soft in training and hard at the end."""

    trained: Tensor

    def soft(self) -> Tensor:
        """W / s rounded, or on the way there, with a gradient."""
        ...

    def hard(self) -> Tensor:
        """Whole numbers."""
        ...

    def latent(self) -> Tensor:
        """What is rounded."""
        ...

    def penalty(self, progress: float) -> Tensor | None:
        """What pulls the soft values to whole numbers at `progress` in [0, 1]."""
        ...

    def undecided(self) -> float:
        """Share of the weights that are not within 0.01 of a whole number."""
        ...


class SigmoidRounding:
    """AdaRound: floor(W / s) + h(v), h a rectified sigmoid, at first the fractional part; a regulariser decides it."""

    def __init__(self, steps: Tensor, settings: QuantizeSettings) -> None:
        self.settings = settings
        self.floor = torch.floor(steps)
        self.trained = q.inverse_rectified_sigmoid((steps - self.floor).clamp(INITIAL_MARGIN, 1 - INITIAL_MARGIN))

    def soft(self) -> Tensor:
        return self.floor + q.rectified_sigmoid(self.trained)

    def latent(self) -> Tensor:
        return self.floor + q.rectified_sigmoid(self.trained)

    def hard(self) -> Tensor:
        return self.floor + (q.rectified_sigmoid(self.trained) >= 0.5).to(self.floor.dtype)

    def penalty(self, progress: float) -> Tensor | None:
        """Nothing in the warm-up; then beta falls from start to end."""
        settings = self.settings
        if progress < settings.warmup:
            return None
        part = (progress - settings.warmup) / (1 - settings.warmup)
        beta = settings.beta_start + (settings.beta_end - settings.beta_start) * part
        return settings.regulariser * q.rounding_regulariser(q.rectified_sigmoid(self.trained), beta)

    def undecided(self) -> float:
        h = q.rectified_sigmoid(self.trained)
        return float(((h > 0.01) & (h < 0.99)).float().mean())


class OffsetRounding:
    """round(W / s + V) with V in [-1/2, 1/2] trained straight through the rounding (SignRound, Cheng et al. 2024).

    Training sees the rounded weight from the first step, so a few hundred steps are enough and nothing is undecided.
    """

    def __init__(self, steps: Tensor) -> None:
        self.steps, self.trained = steps, torch.zeros_like(steps)

    def soft(self) -> Tensor:
        return q.round_straight_through(self.steps + self.trained.clamp(-0.5, 0.5))

    def latent(self) -> Tensor:
        return self.steps + self.trained.clamp(-0.5, 0.5)

    def hard(self) -> Tensor:
        return torch.round(self.steps + self.trained.clamp(-0.5, 0.5))

    def penalty(self, progress: float) -> Tensor | None:
        return None

    def undecided(self) -> float:
        return 0.0


class FreeRounding:
    """round(V), V of any size, trained straight through the rounding: quantization-aware training."""

    def __init__(self, steps: Tensor) -> None:
        self.trained = steps.clone()

    def soft(self) -> Tensor:
        return q.round_straight_through(self.trained)

    def latent(self) -> Tensor:
        return self.trained

    def hard(self) -> Tensor:
        return torch.round(self.trained)

    def penalty(self, progress: float) -> Tensor | None:
        return None

    def undecided(self) -> float:
        return 0.0


class QuantizedWeight:
    """A weight at `bits` bits per channel of `axis`: nearest rounding, until `learn` lets the rounding be trained.

    `symmetric` fixes the zero points at 0. With a `group_size`, each so many inputs of a channel have a scale and a
    zero point of their own.
    Real value: s * (clip(rounded(W / s0) + z, low, high) - z), where s0 is the searched scale and the trained s starts
    there (GENIE-M, Jeon et al. 2023). What is exactly zero stays so: a pruned model keeps its sparsity.
    """

    def __init__(
        self,
        weight: Tensor,
        axis: int,
        bits: int,
        settings: QuantizeSettings,
        symmetric: bool = False,
        group_size: int = 0,
    ) -> None:
        self.weight, self.bits, self.settings = weight, bits, settings
        self.granularity = q.Granularity(tuple(weight.shape), axis, group_size)
        self.low, self.high = q.signed_range(bits)
        rows = self.granularity.rows(weight)
        scale, zero = q.search_range(
            rows, self.low, self.high, norm=settings.range_norm, steps=settings.range_steps, symmetric=symmetric
        )
        live = rows.any(1)  # a row of zeros has any scale: one like the others', as its bias may be counted in it
        if not live.all() and live.any():
            scale = torch.where(live, scale, scale[live].median())
        self.scale, self.zero = self.granularity.arrange(scale), self.granularity.arrange(zero)
        self.zeros = weight == 0 if bool((weight == 0).any()) else None
        self.rounding: Rounding | None = None
        self.rounding_rate = settings.rounding_rate
        self.latent = self._steps()
        """W in units of the scale before it was rounded: where free training goes on from."""
        self.left_undecided = 0.0
        """Share of the roundings that training had not settled when it ended."""
        self.log_growth = torch.zeros_like(self.scale)

    def learn(self) -> None:
        """Start training from nearest rounding."""
        steps = self._steps()
        sigmoid = self.settings.rounding == "sigmoid"
        self.rounding = SigmoidRounding(steps, self.settings) if sigmoid else OffsetRounding(steps)

    def learn_freely(self) -> None:
        """Start training without a bound on how far a weight moves."""
        self.rounding, self.rounding_rate = FreeRounding(self.latent), self.settings.rounding_rate

    def compensate(self, layer: Layer, found: Moments) -> Tensor:
        """Replace the weight by one whose nearest rounding makes up for its own error; what to add to the bias [C]."""
        scale, zero = (
            to_rows(self.granularity.expand(value).expand_as(self.weight), layer) for value in (self.scale, self.zero)
        )
        zeros = None if self.zeros is None else to_rows(self.zeros, layer)
        chosen, shift = gptq(to_rows(self.weight, layer), found, scale, zero, self.low, self.high, zeros)
        self.weight = from_rows(chosen, layer)
        return shift.flatten()

    def groups(self) -> list[Group]:
        if self.rounding is None:
            return []
        groups = [Group([self.rounding.trained], self.rounding_rate, self.settings.rounding == "offset")]
        if self.settings.scale_rate:
            groups.append(Group([self.log_growth], self.settings.scale_rate, decay=True))
        return groups

    def penalty(self, progress: float) -> Tensor | None:
        return None if self.rounding is None else self.rounding.penalty(progress)

    def tensor(self) -> Tensor:
        """The real weight: soft while it is trained."""
        integers = self.integers() if self.rounding is None else self._clip(self.rounding.soft())
        return self._real(integers, self.current_scale())

    def _steps(self) -> Tensor:
        """The weight in units of its scales."""
        return self.weight / self.granularity.expand(self.scale)

    def _real(self, integers: Tensor, scale: Tensor) -> Tensor:
        """What integers stand for with scales in the shape that they are kept in."""
        return q.dequantize(integers, self.granularity.expand(scale), self.granularity.expand(self.zero))

    def current_scale(self) -> Tensor:
        return self.scale * torch.exp(self.log_growth)

    def integers(self) -> Tensor:
        """The integers that the file gets, in the weight's shape."""
        return self._clip(torch.round(self._steps()) if self.rounding is None else self.rounding.hard())

    def _clip(self, rounded: Tensor) -> Tensor:
        zero = self.granularity.expand(self.zero)
        integers = torch.clamp(rounded + zero, self.low, self.high)
        return integers if self.zeros is None else torch.where(self.zeros, zero, integers)

    def undecided(self) -> float:
        """Share of the weights whose rounding training has not settled."""
        return 0.0 if self.rounding is None else self.rounding.undecided()

    @torch.no_grad()
    def harden(self) -> None:
        """End of training: from here on `tensor` is what the file will say, to the last bit."""
        integers, self.left_undecided = self.integers(), self.undecided()
        self.latent = self._steps() if self.rounding is None else self.rounding.latent()
        self.scale, self.log_growth = self.current_scale(), torch.zeros_like(self.scale)
        self.weight, self.rounding = self._real(integers, self.scale), None

    @torch.no_grad()
    def coarsen(self, least: Tensor) -> None:
        """Round a hard weight of one scale a channel again where that is smaller than in `least`, with that.

        `least` has the shape of a bias: that of one for each of the C channels, or of one for all.
        """
        channels = math.prod(self.granularity.scales)
        each = least.reshape(-1, channels) if least.numel() % channels == 0 else least.reshape(-1, 1)
        least = each.amax(0).expand(channels).view(self.granularity.scales)
        coarser = self.scale < least
        if not coarser.any():
            return
        self.scale = torch.maximum(self.scale, least)
        steps = self._steps()
        self.latent = torch.where(coarser, steps, self.latent)
        rounded = self._real(self._clip(torch.round(steps)), self.scale)
        self.weight = torch.where(coarser, rounded, self.weight)

    def state(self) -> dict[str, Tensor]:
        """What a hard weight is restored from."""
        undecided = torch.tensor(self.left_undecided, dtype=torch.float64)
        hard = {"weight": self.weight, "scale": self.scale, "zero": self.zero, "latent": self.latent}
        return hard | {"undecided": undecided}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.weight, self.scale, self.zero, self.latent = (
            state[name].to(self.weight.device) for name in ("weight", "scale", "zero", "latent")
        )
        self.left_undecided = float(state["undecided"])


LEAST_CUT = 1.01
"""Steps between a bound and what is represented: -128 to 127 steps of 1/128 do for -1 to 1."""


class QuantizedActivation:
    """A value at `bits` bits per tensor: zero point fixed, step learned (LSQ, Esser et al. 2020).

    Integers are unsigned, or signed around zero point 0 (`symmetric`). `drop` leaves a share of the elements
    unquantized while training (QDrop). What is represented stays `within` two bounds of different signs or 0, so that a
    Clip before it is absorbed; where one step cannot end near both of them, nothing between them is cut off.
    """

    def __init__(
        self,
        sample: Tensor,
        bits: int,
        settings: QuantizeSettings,
        symmetric: bool = False,
        within: tuple[float, float] = (-math.inf, math.inf),
    ) -> None:
        self.bits, self.rate = bits, settings.activation_rate
        self.low, self.high = q.signed_range(bits) if symmetric else q.unsigned_range(bits)
        scale, zero = q.search_range(
            sample.flatten()[None],
            self.low,
            self.high,
            norm=2.0,
            steps=settings.range_steps,
            symmetric=symmetric,
        )
        self.zero, self.within = zero[0], within
        self.largest = self._largest()
        self.scale = scale[0].clamp(max=self.largest)
        self.log_growth = torch.zeros_like(self.scale)
        self.drop: DropMasks | None = None

    def _largest(self) -> float:
        """The largest scale with which nothing beyond `within` is represented, or all between, where both cannot be."""
        pairs = ((float(self.low - self.zero), self.within[0]), (float(self.high - self.zero), self.within[1]))
        ends = [(end, bound) for end, bound in pairs if end * bound > 0]
        scales = [bound / end for end, bound in ends]
        inner = min(scales, default=math.inf)
        missed = max((abs(bound) / inner - abs(end) for end, bound in ends), default=0.0)  # steps
        return inner if missed <= LEAST_CUT or math.isinf(inner) else max(scales)

    def groups(self) -> list[Group]:
        return [Group([self.log_growth], self.rate, decay=True)] if self.rate else []

    def penalty(self, progress: float) -> Tensor | None:
        return None

    def current_scale(self) -> Tensor:
        return (self.scale * torch.exp(self.log_growth)).clamp(max=self.largest)

    def __call__(self, x: Tensor) -> Tensor:
        floating = None if self.drop is None else self.drop.like(x)
        return q.fake_quantize_learned(x, self.current_scale(), self.zero, self.low, self.high, floating)

    @torch.no_grad()
    def harden(self) -> None:
        self.scale = self.current_scale()
        self.log_growth, self.drop = torch.zeros_like(self.scale), None

    def state(self) -> dict[str, Tensor]:
        """What a hard quantizer is restored from."""
        return {"scale": self.scale, "zero": self.zero}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.scale, self.zero = (state[name].to(self.scale.device) for name in ("scale", "zero"))
        self.largest = self._largest()
