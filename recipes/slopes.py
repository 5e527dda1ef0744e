"""How the largest logits of each image move with a block's output: gradients of the float model.

One pass through the network serves as many blocks as their slopes fit into memory: from the first of them to the
logits, and back once for each direction. What a block gets depends neither on where a pass began nor on whether the run
was interrupted: images always go through in the same small batches.
"""

from __future__ import annotations

import itertools
from functools import cached_property

import torch
from torch import Tensor

from converters.torch_module import Segment, TorchClassifier
from recipes.blocks import find_blocks
from recipes.memory import GIGABYTE, rows_like
from recipes.objective import Objective
from recipes.progress import Progress, Silent
from recipes.reconstruct import Stretch, Values, rows_of
from recipes.settings import LoopSettings

PRECISION = torch.bfloat16  # a sum over thousands of elements does not feel three digits each
MOST = 10
"""Directions an image: they are multiplied with the block's error in every step."""


class Slopes:
    """Of the blocks of one network, in the order in which they are reconstructed."""

    def __init__(self, module: TorchClassifier, settings: LoopSettings, progress: Progress | None = None) -> None:
        self.module, self.settings, self.progress = module, settings, progress or Silent()
        self._kept: dict[str, Tensor] = {}

    @cached_property
    def _outputs(self) -> list[str]:
        """Those of the blocks with layers, in order."""
        return [block.output for block in find_blocks(self.module, self.settings.max_chain) if block.layers]

    def objective(self, stretch: Stretch, steps: int) -> Objective:
        """What the block is held to in so many steps; its output alone for none, without layers, or without a share."""
        slopes = self.of(stretch) if steps and stretch.block.layers else None
        return Objective(stretch.target, slopes, self.settings.logit_share)

    def of(self, stretch: Stretch) -> Tensor | None:
        """[N, K, ...] of the block's float output [N, ...]; None where nobody asks for them, or it is the logits."""
        name = stretch.block.output
        if not self.settings.logit_share or name == self.module.logits_name:
            return None
        if name not in self._kept:
            self._kept = self._pass_back(name, {name: stretch.target, **stretch.beside})
        return self._kept.pop(name)

    def _pass_back(self, first: str, values: Values) -> dict[str, Tensor]:
        """The slopes of `first`, and of as many of the blocks after it as fit.

        `values` [N, ...] are those of the float model that the logits are computed from once `first` is there, it too.
        """
        names, count = self._fitting(first, values)
        segment = self.module.segment(values, [*names, self.module.logits_name])
        found: dict[str, Tensor] = {}
        images = rows_of(values)
        with self.progress.task("measuring what blocks do to logits", images) as task:
            for rows in torch.arange(images).split(self.settings.small_batch):
                given = {name: x[rows].to(self.module.device) for name, x in values.items()}
                for name, slopes in self._of_batch(segment, given, names, count).items():
                    if name not in found:
                        found[name] = rows_like(slopes, images, self.settings.cache_limit)
                    found[name][rows] = slopes.to(found[name].device)
                task.advance(len(rows))
        return found

    def _of_batch(self, segment: Segment, given: Values, names: list[str], count: int) -> dict[str, Tensor]:
        """[n, K, ...] for each name; where no gradient comes back from the logits, zeros for the first alone."""
        values = segment({name: x.detach().requires_grad_() for name, x in given.items()})
        logits = values[self.module.logits_name]
        if not logits.requires_grad:  # a comparison or a cast lies between
            x = given[names[0]]
            return {names[0]: torch.zeros(len(x), 1, *x.shape[1:], dtype=PRECISION, device=x.device)}
        names = [name for name in names if values[name].requires_grad]  # the others are asked for again, alone
        largest = logits.detach().topk(count, dim=1).indices
        wanted, found = [values[name] for name in names], []
        for k in range(count):
            direction = torch.zeros_like(logits).scatter_(1, largest[:, k : k + 1], 1.0)
            slopes = torch.autograd.grad(logits, wanted, direction, retain_graph=k + 1 < count, materialize_grads=True)
            found.append([slope.to(PRECISION) for slope in slopes])
        return {name: torch.stack(each, 1) for name, each in zip(names, zip(*found, strict=True), strict=True)}

    def _fitting(self, first: str, given: Values) -> tuple[list[str], int]:
        """`first` and the outputs after it whose slopes stay within the limit of memory, and directions an image."""
        after = [name for name in self._outputs[self._outputs.index(first) :] if name != self.module.logits_name]
        with torch.no_grad():
            values = self.module.segment(given, [*after, self.module.logits_name])(
                {name: x[:1].to(self.module.device) for name, x in given.items()}
            )
        images = rows_of(given)
        each = max(1, round(self.settings.logit_directions / images))
        count = min(values[self.module.logits_name].shape[1], MOST, each)
        total = itertools.accumulate(values[name].numel() * count * images * PRECISION.itemsize for name in after)
        limit = self.settings.cache_limit * GIGABYTE
        fitting = [name for name, size in zip(after, total, strict=True) if size <= limit]
        return fitting or [first], count
