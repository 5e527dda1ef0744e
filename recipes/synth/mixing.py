"""Data mixing: a partner image, whole and shrunk, in a box of each image, so that a label belongs to what is there.

Xm = (1 - M) X + M place(resize(Xp)),    L = (1 - b) CE(f(Xm), y) + b CE(f(Xm), yp),    b = box area / (H W)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from recipes.devices import pick, send


@dataclass(frozen=True)
class Mix:
    """How one batch is mixed: `partner` [N] indexes the batch; boxes are whole pixels, each [N]."""

    partner: Tensor
    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor
    size: tuple[int, int]

    @property
    def share(self) -> Tensor:
        """b [N]: the box's share of the image."""
        return (self.height * self.width).float() / (self.size[0] * self.size[1])

    def apply(self, images: Tensor) -> Tensor:
        """The mixed images [N, C, H, W]; gradients reach both partners."""
        rows = send(_relative(self.size[0], self.top, self.height), images.device)
        columns = send(_relative(self.size[1], self.left, self.width), images.device)
        inside = ((rows.abs() < 1)[:, :, None] & (columns.abs() < 1)[:, None, :])[:, None]
        grid = torch.stack(torch.broadcast_tensors(columns[:, None, :], rows[:, :, None]), -1).to(images.dtype)
        partner = pick(images, self.partner, images.device)
        placed = F.grid_sample(partner, grid, mode="bilinear", padding_mode="border", align_corners=False)
        return torch.where(inside, placed, images)


def _relative(length: int, start: Tensor, extent: Tensor) -> Tensor:
    """[N, length]: each pixel centre's place in the box, -1 to 1 from edge to edge."""
    centres = torch.arange(length) + 0.5
    return 2 * (centres[None] - start[:, None]) / extent[:, None] - 1


def draw_mix(count: int, size: tuple[int, int], box: tuple[float, float], generator: torch.Generator) -> Mix:
    """A random permutation and one box a sample: edge ratio r ~ U(box), rounded to pixels, placed uniformly."""
    ratio = box[0] + (box[1] - box[0]) * torch.rand(count, generator=generator)
    edges = [(ratio * length).round().clamp(1, length).long() for length in size]
    top, left = (
        (torch.rand(count, generator=generator) * (length - edge + 1)).long()
        for length, edge in zip(size, edges, strict=True)
    )
    return Mix(torch.randperm(count, generator=generator), top, left, edges[0], edges[1], size)


def mixed_cross_entropy(logits: Tensor, labels: Tensor, mix: Mix) -> Tensor:
    """(1 - b) CE(logits, y) + b CE(logits, yp), averaged over the batch."""
    share = send(mix.share.to(logits.dtype), logits.device)
    own = F.cross_entropy(logits, labels, reduction="none")
    partners = F.cross_entropy(logits, pick(labels, mix.partner, logits.device), reduction="none")
    return ((1 - share) * own + share * partners).mean()
