"""What a block is trained towards: its own float output, and through that the logits.

For an error d of the block's output, and the rows g_k of the logits' Jacobian in K directions (`slopes`),

    (1 - s) mean d^2 / e0  +  s mean_k (g_k . d)^2 / l0,

where e0 and l0 are what the two are with the block changed the plain way, so that neither depends on the block's
scale. The first term alone is the usual one (Nagel et al. 2020, eq. 21). Li et al. (2021, eq. 10) weight elements by
squared gradients, which is the diagonal of what the second term has whole. The second alone would fit the images that
it is taken from, of which there are few.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

LEAST_POWER = 1e-12  # of a block's output, that errors are relative to
LEAST_ERROR = 1e-6  # relative, below which it makes no difference any more
LEAST_MOVE = 1e-20  # of the logits, mean square
FEW = 4
"""Images whose slopes are brought to float32 at once where errors are measured."""
POWER_BATCH = 32


@dataclass(frozen=True)
class BlockError:
    """Mean squared error of a block's output, relative to the output's mean square, and of the logits by the slopes."""

    output: float
    logits: float = 0.0


@dataclass(frozen=True)
class Objective:
    """`target` [N, ...] is the block's float output; `slopes` [N, K, ...] counts for the share `share` of the loss."""

    target: Tensor
    slopes: Tensor | None = None
    share: float = 0.0

    @cached_property
    def power(self) -> float:
        """The target's mean square, never zero."""
        return max(mean_square(self.target, POWER_BATCH), LEAST_POWER)

    @property
    def of_output(self) -> Objective:
        """The same without the logits."""
        return replace(self, slopes=None)

    def loss(self, y: Tensor, rows: Tensor, plain: BlockError) -> Tensor:
        """Of the output `y` [n, ...] for the images `rows` [n], relative to what `plain` changes leave.

        The output alone counts where the logits do not feel it, or where a slope is infinite.
        """
        d = y - self.target[rows].to(y.device)
        loss = d.square().mean() / (self.power * max(plain.output, LEAST_ERROR))
        if self.slopes is None or not LEAST_MOVE <= plain.logits < math.inf:
            return loss
        of_logits = moved(d, self.slopes[rows]).square().mean() / plain.logits
        return torch.lerp(loss, of_logits * min(1.0, plain.output / LEAST_ERROR), self.share)

    def error(self, outputs: Iterable[Tensor], batch: int) -> BlockError:
        """Of all outputs, `batch` images at a time."""
        noise = moves = 0.0
        start = 0
        for y, target in zip(outputs, self.target.split(batch), strict=True):
            d = y - target.to(y.device)
            noise += float(d.square().sum(dtype=torch.float64))
            if self.slopes is not None:
                slopes = self.slopes[start : start + len(y)]
                for few, along in zip(d.split(FEW), slopes.split(FEW), strict=True):
                    moves += float(moved(few, along).square().mean(1).sum(dtype=torch.float64))
            start += len(y)
        return BlockError(noise / self.target.numel() / self.power, moves / len(self.target))


def moved(d: Tensor, slopes: Tensor) -> Tensor:
    """[n, K]: how far an error `d` [n, ...] takes the logits of each image along its directions, to first order."""
    return torch.einsum("nke,ne->nk", slopes.to(d).flatten(2), d.flatten(1))


def mean_square(x: Tensor, batch: int) -> float:
    """mean x^2, read batch by batch."""
    return sum(float(part.square().sum(dtype=torch.float64)) for part in x.split(batch)) / max(1, x.numel())
