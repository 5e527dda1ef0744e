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
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from recipes.devices import pick

LEAST_POWER = 1e-12  # of a block's output, that errors are relative to
LEAST_ERROR = 1e-6  # relative, below which it makes no difference any more
LEAST_MOVE = 1e-20  # of the logits, mean square
AT_ONCE = 1 << 18
"""Slopes that are brought to float32 at once, or those of one image."""
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
        d = y - pick(self.target, rows, y.device)
        loss = d.square().mean() / (self.power * max(plain.output, LEAST_ERROR))
        if self.slopes is None or not LEAST_MOVE <= plain.logits < math.inf:
            return loss
        of_logits = moved(d, self.slopes, rows).square().mean() / plain.logits
        return torch.lerp(loss, of_logits * min(1.0, plain.output / LEAST_ERROR), self.share)

    def error(self, outputs: Iterable[Tensor], batch: int) -> BlockError:
        """Of all outputs, `batch` images at a time."""
        noise = moves = 0.0
        start = 0
        for y, target in zip(outputs, self.target.split(batch), strict=True):
            d = y - target.to(y.device)
            noise += float(d.square().sum(dtype=torch.float64))
            if self.slopes is not None:
                rows = torch.arange(start, start + len(y))
                moves += float(moved(d, self.slopes, rows).square().mean(1).sum(dtype=torch.float64))
            start += len(y)
        return BlockError(noise / self.target.numel() / self.power, moves / len(self.target))


def moved(d: Tensor, slopes: Tensor, rows: Tensor) -> Tensor:
    """[n, K]: how far an error `d` [n, ...] takes the logits of each image along its directions, to first order.

    `slopes` [N, K, ...] are those of all images, `rows` [n] says of which `d` is.
    """
    return _Moved.apply(d, slopes, rows)


class _Moved(torch.autograd.Function):
    """Slopes are brought to d's type a few at a time, forward and again back: what fits into the cache takes a sixth of
    the time of what goes through memory (32 images of 200,000 elements, ten directions, one core)."""

    @staticmethod
    def forward(ctx: Any, d: Tensor, slopes: Tensor, rows: Tensor) -> Tensor:
        ctx.slopes, ctx.rows, ctx.shape = slopes, rows, d.shape
        flat = d.flatten(1)
        return torch.cat([torch.einsum("nke,ne->nk", part, flat[at]) for at, part in _few(slopes, rows, d)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_moves: Tensor) -> tuple[Tensor, None, None]:
        parts = _few(ctx.slopes, ctx.rows, of_moves)
        of_d = torch.cat([torch.einsum("nke,nk->ne", part, of_moves[at]) for at, part in parts])
        return of_d.view(ctx.shape), None, None


def _few(slopes: Tensor, rows: Tensor, like: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The slopes [m, K, e] of a few of `rows` at a time, as type and device of `like` are, and which they are."""
    step = max(1, AT_ONCE // slopes[0].numel())
    for start in range(0, len(rows), step):
        at = slice(start, min(start + step, len(rows)))
        yield at, pick(slopes, rows[at], like.device).to(like.dtype).flatten(2)


def mean_square(x: Tensor, batch: int) -> float:
    """mean x^2, read batch by batch."""
    return sum(float(part.square().sum(dtype=torch.float64)) for part in x.split(batch)) / max(1, x.numel())
