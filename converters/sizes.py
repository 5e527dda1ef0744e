"""What the values of a module measure, and which of it depends on how many images there are.

Exporters compute the targets of Reshape, the bounds of Slice and the scale of attention from the shapes of values. A
run on one image and one on two tell the sizes that come of it, and which of them the batch is in.
"""

from __future__ import annotations

import torch
from torch import Tensor

from converters.torch_module import TorchClassifier


class Sizes:
    """Shapes by name of a value or constant, on one image."""

    def __init__(self, module: TorchClassifier) -> None:
        self.module = module
        self.measured: set[str] = set()
        """Values that depend on the image's shape alone."""
        for step in module.whole.steps:
            operands = [name for name in step.inputs if name and not module.is_constant(name)]
            if step.op in ("Shape", "Size") or all(name in self.measured for name in operands):
                self.measured.update(step.outputs)
        (one, measured), (two, again) = self._run(1), self._run(2)
        self._shapes = {name: (shape, two[name]) for name, shape in one.items()}
        self._same = {name: value for name, value in measured.items() if torch.equal(value, again[name])}

    @torch.no_grad()
    def _run(self, images: int) -> tuple[dict[str, tuple[int, ...]], dict[str, Tensor]]:
        """The shape of every value on so many black images, and the measured values themselves."""
        module = self.module
        read = {name for step in module.whole.steps for name in step.inputs} | {module.logits_name}
        computed = [name for step in module.whole.steps for name in step.outputs if name in read - {""}]
        values = {module.input_name: torch.cat([module.black_image()] * images)}
        values |= module.segment([module.input_name], computed)(values)
        shapes = {name: tuple(value.shape) for name, value in values.items()}
        return shapes, {name: value for name, value in values.items() if name in self.measured}

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.module.constant(name).shape) if self.module.is_constant(name) else self._shapes[name][0]

    def any_batch(self, name: str) -> list[int] | None:
        """The shape with -1 where the number of images is in it; None where that is in several places."""
        one, two = self._shapes[name]
        sizes = [size if size == other else -1 for size, other in zip(one, two, strict=True)]
        return sizes if sizes.count(-1) <= 1 else None

    def constant(self, name: str) -> Tensor | None:
        """The tensor of a constant, or of a measured value that is the same for any number of images."""
        return self.module.constant(name) if self.module.is_constant(name) else self._same.get(name)
