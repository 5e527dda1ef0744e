"""What a student is asked for, whatever its family: the teacher's class distribution, and its likenesses of images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)) of logits [N, classes], mean over N (Hinton et al. 2015)."""
    log_p = F.log_softmax(student / temperature, 1)
    log_q = F.log_softmax(teacher / temperature, 1)
    return temperature**2 * F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)


def likeness(features: Tensor) -> Tensor:
    """Cosine of every two images' features [N, ...], a matrix [N, N]: comparable between networks of any width."""
    rows = F.normalize(features.flatten(1), dim=1)
    return rows @ rows.mT


def likeness_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of the two likenesses (similarity-preserving distillation, Tung and Mori 2019)."""
    return (likeness(student) - likeness(teacher)).square().mean()


def mix_images(pixels: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Pixels [N, C, H, W], about `share` of them blended with another of the batch: p x + (1 - p) x', p ~ U(0, 1)."""
    count = len(pixels)
    weight = torch.rand(count, generator=generator)
    weight = torch.where(torch.rand(count, generator=generator) < share, weight, 1.0)
    weight = weight.to(pixels).view(-1, 1, 1, 1)
    partner = torch.randperm(count, generator=generator).to(pixels.device)
    return weight * pixels + (1 - weight) * pixels[partner]


def move_images(pixels: Tensor, shift: float, flip: bool, generator: torch.Generator) -> Tensor:
    """Pixels [N, C, H, W], half of them flipped, all shifted by up to `shift` of a side; edges are repeated."""
    if flip:
        flipped = (torch.rand(len(pixels), 1, 1, 1, generator=generator) < 0.5).to(pixels.device)
        pixels = torch.where(flipped, pixels.flip(3), pixels)
    height, width = pixels.shape[2:]
    limits = [int(shift * side) for side in (height, width)]
    if not any(limits):
        return pixels
    padded = F.pad(pixels, (limits[1], limits[1], limits[0], limits[0]), mode="replicate")
    rows, columns = (
        torch.randint(0, 2 * limit + 1, (len(pixels), 1), generator=generator) + torch.arange(side)
        for limit, side in zip(limits, (height, width), strict=True)
    )
    index = torch.arange(len(pixels))[:, None, None, None]
    channel = torch.arange(pixels.shape[1])[None, :, None, None]
    return padded[index, channel, rows[:, None, :, None], columns[:, None, None, :]]
