"""Which channels can be counted in another unit, the function unchanged: cross-layer equalisation, read from the graph.

What makes a channel is divided by a positive factor, and every weight that reads it multiplied (Nagel et al. 2019,
"Data-free quantization through weight equalization and bias correction"). Between the two stand operators alone that
keep channels apart and give f(c x) = c f(x) for c > 0; Clip (ReLU6), GELU and HardSwish do not.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from converters.channel_cuts import Slot
from converters.channels import NORMS, REDUCTIONS, SPATIAL
from converters.numbering import Numbers
from converters.sizes import Sizes
from converters.torch_module import Layer, Step, TorchClassifier

PASSING = {"Dropout", "Identity", "LeakyRelu", "PRelu", "Relu"} | SPATIAL
"""Positively homogeneous operators that treat every channel (axis 1) alone."""

FLATTENING = {"Flatten", "Reshape", "Squeeze"}


@dataclass(frozen=True)
class Scaling:
    """Channels of one layer or normalisation, numbered from 0 to `count` - 1 in the slots."""

    count: int
    makers: Sequence[Slot]
    """Weight and bias, or scale and bias of a normalisation: divided."""
    readers: Sequence[Slot]
    """Weights: multiplied."""
    values: Sequence[str]
    """What has these channels, [N, channels * n, ...], from what is made to what is read: each channel is `n` entries
    in a row of axis 1."""
    read: Sequence[str]
    """Those of `values` that `readers` read."""


def find_scalings(module: TorchClassifier) -> list[Scaling]:
    """All of a module, in order; none where the file has other outputs, which would change with the channels."""
    if len(module.classifier.original.graph.outputs) > 1:
        return []
    trace = _Trace(module)
    found = [trace.scaling(step) for step in module.whole.steps]
    return [scaling for scaling in found if scaling is not None]


class _Trace:
    def __init__(self, module: TorchClassifier) -> None:
        self.module, self.sizes = module, Sizes(module)
        self.layers = {layer.output: layer for layer in module.layers()}
        self.uses: dict[str, list[tuple[Step, int]]] = defaultdict(list)
        for step in module.whole.steps:
            for index, name in enumerate(step.inputs):
                self.uses[name].append((step, index))

    def scaling(self, step: Step) -> Scaling | None:
        """The channels that `step` makes, where everything that reads them can be scaled."""
        makers = self._makers(step)
        if not makers:
            return None
        numbers, values = makers[0].numbers, [step.outputs[0]]
        readers = self._readers(step.outputs[0], numbers, values)
        if not readers:
            return None
        read = list(dict.fromkeys(self.layers[slot.output].input for slot in readers))
        return Scaling(len(numbers), makers, readers, values, read)

    def _makers(self, step: Step) -> list[Slot]:
        """The constants that give the channels along axis 1 of the step's output their size; none where others do."""
        layer = self.layers.get(step.outputs[0])
        if not (step.op in NORMS if layer is None else self._along_axis_1(step, layer)):
            return []
        count, slots = self.sizes.shape(step.outputs[0])[1], []
        for index, name in enumerate(step.inputs[1:3], 1):  # weight or scale, and bias
            if not name:
                continue
            shape = self.sizes.shape(name)
            axis = layer.axis if layer is not None and index == layer.operand else len(shape) - 1
            if not self.module.is_constant(name) or not shape or shape[axis] != count:
                return []
            slots.append(Slot(step.outputs[0], index, name, axis, np.arange(count)))
        return slots

    def _readers(self, value: str, numbers: Numbers, values: list[str]) -> list[Slot] | None:
        """The weights that read `value`, with these channels along axis 1; None where anything else reads it.

        What passes the channels on writes goes into `values`.
        """
        if value == self.module.logits_name:
            return None
        found: list[Slot] = []
        for step, index in self.uses[value]:
            output = step.outputs[0]
            if output in self.sizes.measured:  # its shape alone is read
                continue
            slots = None
            if index == 0 and output in self.layers:
                slots = self._reader(step, self.layers[output], numbers)
            elif index == 0 and self._passes(step):
                places = self.sizes.shape(output)[1] // len(numbers)  # more than 1 where a map is flattened
                values.append(output)
                slots = self._readers(output, np.repeat(numbers, places), values)
            if slots is None:
                return None
            found += slots
        return found

    def _reader(self, step: Step, layer: Layer, numbers: Numbers) -> list[Slot] | None:
        if not self._along_axis_1(step, layer) or (layer.groups > 1 and layer.shape[1] > 1):
            return None
        axis = 1 - layer.axis
        if layer.groups > 1:  # depthwise: each row of the weight reads one channel
            axis, numbers = layer.axis, np.repeat(numbers, layer.shape[0] // layer.groups)
        return [Slot(layer.output, layer.operand, layer.weight, axis, numbers)]

    def _along_axis_1(self, step: Step, layer: Layer) -> bool:
        """Whether the layer takes channels from axis 1 of its first operand to axis 1 of its output."""
        straight = layer.operand == 1 and not step.attributes.get("transA")
        return straight and (layer.op == "Conv" or len(self.sizes.shape(layer.input)) == 2)

    def _passes(self, step: Step) -> bool:
        """Whether what the step writes has the channels of what it reads, in the same unit and order."""
        if step.op in PASSING:
            return True
        if step.op not in {*REDUCTIONS, "Pad", *FLATTENING}:
            return False
        before, after = self.sizes.shape(step.inputs[0]), self.sizes.shape(step.outputs[0])
        if step.op in REDUCTIONS:
            axes = step.attributes.get("axes", step.fixed.get(1))
            return isinstance(axes, Sequence) and bool(axes) and not {axis % len(before) for axis in axes} & {0, 1}
        if step.op == "Pad":
            return after[:2] == before[:2] and self._pads_with_zero(step)
        return after == (before[0], math.prod(before[1:]))

    def _pads_with_zero(self, step: Step) -> bool:
        if len(step.inputs) < 3 or not step.inputs[2]:
            return True
        return self.module.is_constant(step.inputs[2]) and not self.module.constant(step.inputs[2]).any()
