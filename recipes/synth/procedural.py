"""Images that need no model: dead leaves, whose statistics are close to those of photographs.

Shapes with radii r drawn from p(r) ~ r^-3 cover one another, each of one colour with a slope of brightness (Lee,
Mumford and Huang 2001; as training images: Baradad et al. 2021). Edges, flat regions and occlusion at all sizes are
what white noise lacks and what inversion is slow to find, so it starts here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LEAVES = 400
SMALLEST, LARGEST = 0.013, 0.36  # radii as shares of the shorter side
CAST = 0.15  # deviation of an image's own colour from grey
SHADE, TINT, SLOPE = 0.3, 0.12, 0.1  # deviations of a leaf's brightness, colour and brightness along it
STRETCH = 0.5  # deviation of the logarithm of the aspect ratio's root
ROUND = 0.7  # share of ellipses; the others are rectangles


def dead_leaves(count: int, channels: int, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """`count` images [N, C, H, W] in [0, 1], drawn on the CPU from `generator` alone."""
    brightness = torch.rand(count, 1, 1, 1, generator=generator)
    tint = CAST * torch.randn(count, channels, 1, 1, generator=generator)
    images = (brightness + tint).clamp(0, 1).repeat(1, 1, *size)
    for image in images:
        _cover(image, generator)
    return images


def _cover(image: Tensor, generator: torch.Generator) -> None:
    """Paint leaves over `image` [C, H, W], which is of one colour."""
    channels, height, width = image.shape
    base = image[:, 0, 0].clone()
    shorter = min(height, width)
    least, most = max(1.0, SMALLEST * shorter), max(1.0, LARGEST * shorter)
    draws = torch.rand(LEAVES, 5, generator=generator)
    normals = torch.randn(LEAVES, 3 + channels, generator=generator)
    radii = (draws[:, 0] / most**2 + (1 - draws[:, 0]) / least**2).rsqrt()  # inverse of p(r) ~ r^-3's distribution
    stretches = torch.exp(STRETCH * normals[:, 0])
    colours = (base + SHADE * normals[:, 1:2] + TINT * normals[:, 3:]).clamp(0, 1)
    numbers = torch.stack([radii, stretches, draws[:, 1] * height, draws[:, 2] * width, draws[:, 3] * math.pi], 1)
    for (radius, stretch, y, x, angle), draw, colour, slope in zip(
        numbers.tolist(), draws[:, 4].tolist(), colours, (SLOPE * normals[:, 2]).tolist(), strict=True
    ):
        reach = radius * max(stretch, 1 / stretch) * math.sqrt(2)
        top, bottom = max(0, math.floor(y - reach)), min(height, math.ceil(y + reach) + 1)
        left, right = max(0, math.floor(x - reach)), min(width, math.ceil(x + reach) + 1)
        dy = torch.arange(top, bottom)[:, None] - y
        dx = torch.arange(left, right)[None] - x
        along = dx * math.cos(angle) + dy * math.sin(angle)
        across = dy * math.cos(angle) - dx * math.sin(angle)
        a, b = along / stretch, across * stretch
        inside = a.square() + b.square() < radius**2 if draw < ROUND else (a.abs() < radius) & (b.abs() < radius)
        painted = (colour[:, None, None] + slope * along / radius).clamp(0, 1)
        area = image[:, top:bottom, left:right]
        area.copy_(torch.where(inside, painted, area))
