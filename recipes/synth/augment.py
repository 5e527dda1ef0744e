"""Differentiable augmentation, drawn for each sample: flip, cyclic shift and colour jitter of pixels in [0, 1]."""

from __future__ import annotations

import math

import kornia.enhance as enhance
import torch
from torch import Tensor

from recipes.synth.settings import SynthSettings


def augment(pixels: Tensor, settings: SynthSettings, generator: torch.Generator) -> Tensor:
    """Pixels [N, C, H, W] augmented; gradients pass through. The shift is one for the batch."""
    count = len(pixels)
    if settings.flip:
        flipped = (torch.rand(count, 1, 1, 1, generator=generator) < 0.5).to(pixels.device)
        pixels = torch.where(flipped, pixels.flip(3), pixels)
    if settings.shift:
        limits = [int(settings.shift * length) for length in pixels.shape[2:]]
        amounts = [int(torch.randint(-limit, limit + 1, (1,), generator=generator)) for limit in limits]
        pixels = pixels.roll(amounts, (2, 3))
    return _jitter(pixels, settings.jitter, generator)


def _jitter(pixels: Tensor, amounts: tuple[float, float, float, float], generator: torch.Generator) -> Tensor:
    def factor(amount: float) -> Tensor:
        return (1 + amount * (2 * torch.rand(len(pixels), generator=generator) - 1)).to(pixels)

    brightness, contrast, saturation, hue = amounts
    if brightness:
        pixels = enhance.adjust_brightness_accumulative(pixels, factor(brightness), clip_output=False)
    if contrast:
        pixels = pixels + (factor(contrast).view(-1, 1, 1, 1) - 1) * (pixels - pixels.mean((1, 2, 3), keepdim=True))
    if pixels.shape[1] == 3:
        if saturation:
            pixels = enhance.adjust_saturation_with_gray_subtraction(pixels, factor(saturation))
        if hue:
            pixels = enhance.adjust_hue(pixels.clamp(1e-4, 1 - 1e-4), (factor(hue) - 1) * 2 * math.pi)
    return pixels
