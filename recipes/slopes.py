"""How the logits of each image move with a block's output: gradients of the float model, in a few directions an image.

One pass through the network serves as many blocks as their slopes fit into memory: from the first of them to the
logits, and back once for each direction. Directions are the same for every block, so that what a block gets does not
depend on where a pass began, nor on whether the run was interrupted.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from converters.torch_module import TorchClassifier
from recipes.blocks import find_blocks
from recipes.memory import GIGABYTE, rows_like
from recipes.reconstruct import LoopSettings, Stretch

PRECISION = torch.bfloat16  # a sum over thousands of elements does not feel three digits each


class Slopes:
    """Of the blocks of one network, in the order in which they are reconstructed."""

    def __init__(self, module: TorchClassifier, settings: LoopSettings, images: int) -> None:
        self.module, self.settings, self.images = module, settings, images
        self._outputs = [block.output for block in find_blocks(module, settings.max_chain)]
        self._kept: dict[str, Tensor] = {}

    def of(self, stretch: Stretch) -> Tensor | None:
        """[N, K, ...] of the block's float output [N, ...]; None where nobody asks for them, or it is the logits."""
        name = stretch.block.output
        if not self.settings.logit_share or name == self.module.logits_name:
            return None
        if name not in self._kept:
            self._kept = self._pass_back(name, stretch.target)
        return self._kept.pop(name)

    def _pass_back(self, first: str, x: Tensor) -> dict[str, Tensor]:
        """The slopes of `first`, whose float values are `x` [N, ...], and of as many of the blocks after it as fit."""
        device = self.module.device
        count = self._count()
        names = self._fitting(first, x[:1].to(device), count)
        segment = self.module.segment([first], [*names, self.module.logits_name])
        found: dict[str, Tensor] = {}
        for rows in torch.arange(len(x)).split(self.settings.batch):
            start = x[rows].to(device).requires_grad_()
            with torch.enable_grad():
                values = segment({first: start})
                values[first] = start
            logits = values[self.module.logits_name]
            wanted = [values[name] for name in names]
            largest = logits.detach().topk(count, dim=1).indices
            for k in range(count):
                direction = torch.zeros_like(logits).scatter_(1, largest[:, k : k + 1], 1.0)
                slopes = torch.autograd.grad(logits, wanted, direction, retain_graph=True)
                for name, slope in zip(names, slopes, strict=True):
                    if name not in found:
                        shape = (1, count, *slope.shape[1:])
                        found[name] = rows_like(torch.empty(shape, dtype=PRECISION), len(x), self.settings.cache_limit)
                    found[name][rows, k] = slope.to(found[name])
        return found

    def _count(self) -> int:
        """How many logits of an image: as many as there are, or as are due to it."""
        with torch.no_grad():
            classes = self.module(self.module.black_image()).shape[1]
        return min(classes, max(1, round(self.settings.logit_directions / self.images)))

    def _fitting(self, first: str, x: Tensor, count: int) -> list[str]:
        """`first`, and the outputs after it whose slopes, all together, stay within the limit of memory."""
        after = [name for name in self._outputs[self._outputs.index(first) :] if name != self.module.logits_name]
        with torch.no_grad():
            values = {**self.module.segment([first], after[1:])({first: x}), first: x}
        sizes = [values[name].numel() * count * self.images * PRECISION.itemsize for name in after]
        total = itertools.accumulate(sizes)
        limit = self.settings.cache_limit * GIGABYTE
        return [name for index, (name, size) in enumerate(zip(after, total, strict=True)) if not index or size <= limit]
