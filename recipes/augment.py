"""Augmentation of pixels in [0, 1], drawn for each sample; gradients pass through.

Synthesis sees its images augmented (seed, B.3: flip and colour jitter), and so does the training of whole networks
(B.3: these, random grayscale and Gaussian blur). kornia, whose import takes half a second, is imported where it is
needed: most recipes do without.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from recipes.devices import send
from recipes.settings import Jitter

KERNEL = 3.0
"""Half the width of a blur's kernel, in standard deviations."""


@dataclass(frozen=True)
class Augmentation:
    """What is done, in this order; nothing by default. What is of colour touches three channels only."""

    flip: bool = False
    """Half of the images from left to right."""
    roll: float = 0.0
    """Largest cyclic shift, as a share of height and width; one for the whole batch."""
    shift: float = 0.0
    """Largest shift of each image by itself, edges repeated, as a share of height and width."""
    jitter: Jitter = (0.0, 0.0, 0.0, 0.0)
    """Of brightness, contrast, saturation and hue; what becomes brighter than white or darker than black stays so."""
    grayscale: float = 0.0
    """Share of the images that lose their colour."""
    blur: float = 0.0
    """Share of the images that are blurred by a Gaussian."""
    sigma: tuple[float, float] = (1.0, 2.0)
    """Range of the Gaussian's standard deviation, in pixels."""

    def __call__(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """Pixels [N, C, H, W] augmented."""
        if self.flip:
            pixels = _each(_chosen(pixels, 0.5, generator), pixels.flip(3), pixels)
        if self.roll:
            limits = [int(self.roll * length) for length in pixels.shape[2:]]
            amounts = [int(torch.randint(-limit, limit + 1, (1,), generator=generator)) for limit in limits]
            pixels = pixels.roll(amounts, (2, 3))
        pixels = _shift(pixels, self.shift, generator)
        pixels = _jitter(pixels, self.jitter, generator)
        if self.grayscale and pixels.shape[1] == 3:
            from kornia import color

            gray = color.rgb_to_grayscale(pixels).expand_as(pixels)
            pixels = _each(_chosen(pixels, self.grayscale, generator), gray, pixels)
        if self.blur:
            pixels = _blur(pixels, self.blur, self.sigma, generator)
        return pixels


def _chosen(pixels: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Which of the images, about `share` of them: booleans [N, 1, 1, 1] where the pixels are."""
    return send(_drawn(len(pixels), share, generator), pixels.device)


def _drawn(count: int, share: float, generator: torch.Generator) -> Tensor:
    """Which of `count` images, about `share` of them: booleans [N, 1, 1, 1]."""
    return torch.rand(count, 1, 1, 1, generator=generator) < share


def _each(chosen: Tensor, changed: Tensor, pixels: Tensor) -> Tensor:
    return torch.where(chosen, changed, pixels)


def _shift(pixels: Tensor, share: float, generator: torch.Generator) -> Tensor:
    height, width = pixels.shape[2:]
    limits = [int(share * side) for side in (height, width)]
    if not any(limits):
        return pixels
    padded = F.pad(pixels, (limits[1], limits[1], limits[0], limits[0]), mode="replicate")
    device = pixels.device
    rows, columns = (
        send(torch.randint(0, 2 * limit + 1, (len(pixels), 1), generator=generator) + torch.arange(side), device)
        for limit, side in zip(limits, (height, width), strict=True)
    )
    index = torch.arange(len(pixels), device=device)[:, None, None, None]
    channel = torch.arange(pixels.shape[1], device=device)[None, :, None, None]
    return padded[index, channel, rows[:, None, :, None], columns[:, None, None, :]]


def _blur(pixels: Tensor, share: float, sigma: tuple[float, float], generator: torch.Generator) -> Tensor:
    """Of the chosen images alone: it is the most expensive of all this."""
    low, high = sigma
    deviation = (low + (high - low) * torch.rand(len(pixels), 1, generator=generator)).to(pixels.dtype).expand(-1, 2)
    drawn = _drawn(len(pixels), share, generator).flatten().nonzero().flatten()
    if not len(drawn):
        return pixels
    from kornia import filters

    side, chosen = 2 * math.ceil(KERNEL * high) + 1, send(drawn, pixels.device)
    deviation = send(deviation[drawn], pixels.device)
    blurred = filters.gaussian_blur2d(pixels[chosen], side, deviation, border_type="replicate")
    return pixels.index_put((chosen,), blurred)


def _jitter(pixels: Tensor, amounts: Jitter, generator: torch.Generator) -> Tensor:
    def factor(amount: float) -> Tensor:
        drawn = 1 + amount * (2 * torch.rand(len(pixels), generator=generator) - 1)
        return send(drawn.to(pixels.dtype), pixels.device)

    if not any(amounts):
        return pixels
    from kornia import enhance

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
