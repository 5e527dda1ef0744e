"""Which channels of a graph can be removed, and what has to be cut with them: dependency groups, read from the graph.

Every weighted layer makes new channels, each with a number; what follows carries the numbers along one axis of its
value (a `Lane`). Where values are added or multiplied, the channels that meet become one. A movement of elements
(Reshape, Transpose, Concat, Split, Slice) is followed by moving the numbers themselves; where it spreads channels over
several axes, as a channel shuffle does, those at one place of the last axis become one, so that what is left is still
rectangular. Number 0 stands for what must stay: the image, the logits, and whatever meets an operator that is not known
to leave channels apart (LayerNormalization, Softmax along them, grouped convolutions, a product of two activations).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from converters import writeback
from converters.torch_module import Layer, Step, TorchClassifier

Numbers = NDArray[np.int64]
FIXED = 0

UNARY = {
    "Abs", "Cast", "Ceil", "Celu", "Clip", "Dropout", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish",
    "Identity", "LeakyRelu", "Log", "Mish", "Neg", "Relu", "Selu", "Sigmoid", "Softplus", "Softsign", "Sqrt", "Tanh",
    "ThresholdedRelu",
}  # fmt: skip
"""Elementwise operators of one value; constants beside it are scalars."""
BINARY = {"Add", "Sub", "Mul", "Div", "Pow", "PRelu", "Max", "Min"}
SPATIAL = {"AveragePool", "GlobalAveragePool", "GlobalMaxPool", "LpPool", "MaxPool"}
"""Operators that treat every channel (axis 1) alike and alone."""
NORMS = {"BatchNormalization", "InstanceNormalization"}
REDUCTIONS = {"ReduceMean", "ReduceMax", "ReduceSum", "ReduceMin"}
MOVEMENTS = {"Concat", "Flatten", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"}


@dataclass(frozen=True)
class Lane:
    """The axis of a value that channels lie along, and their numbers."""

    axis: int
    numbers: Numbers


@dataclass(frozen=True)
class Slot:
    """A constant operand that is cut along an axis: operand `index` of the node that writes `output`."""

    output: str
    index: int
    name: str
    axis: int
    numbers: Numbers


@dataclass(frozen=True)
class LayerChannels:
    """A layer's channels: numbers along the output axis of its weight, and along its input axis (None: depthwise)."""

    layer: Layer
    outputs: Numbers
    inputs: Numbers | None
    places: int
    """Positions of one image that each output channel is computed at."""


@dataclass(frozen=True)
class Channels:
    """All that removing channels touches. Channels of one number go together; FIXED ones stay."""

    slots: list[Slot]
    layers: list[LayerChannels]
    lanes: dict[str, Lane]
    steps: dict[str, Step]
    """Nodes whose sizes, bounds or group counts follow from the channels, by the value they write."""

    def numbers(self) -> Numbers:
        """Those that can be removed."""
        found = np.unique(np.concatenate([np.zeros(1, np.int64), *(entry.outputs for entry in self.layers)]))
        return found[found != FIXED]

    def edits(
        self, removed: Numbers, tensors: Mapping[str, Tensor], original: Callable[[str], Tensor]
    ) -> Sequence[writeback.Edit]:
        """The cuts, with `tensors` by initializer name where they have changed, and `original` ones elsewhere."""
        cuts: dict[tuple[str, int], Tensor] = {}
        for slot in self.slots:
            key = (slot.output, slot.index)
            value = cuts.get(key)
            if value is None:
                value = tensors[slot.name] if slot.name in tensors else original(slot.name)
            kept = np.flatnonzero(~np.isin(slot.numbers, removed))
            cuts[key] = value.index_select(slot.axis, torch.from_numpy(kept).to(value.device))
        found: list[writeback.Edit] = [
            writeback.TensorEdit(output, index, value.cpu().numpy()) for (output, index), value in cuts.items()
        ]
        for name, step in self.steps.items():
            found += self._sizes(name, step, removed)
        return found

    def _count(self, value: str, removed: Numbers) -> int:
        return int((~np.isin(self.lanes[value].numbers, removed)).sum())

    def _sizes(self, name: str, step: Step, removed: Numbers) -> list[writeback.Edit]:
        if step.op == "Conv":
            return [writeback.AttributeEdit(name, "group", self._count(name, removed))]
        if step.op == "Split":
            sizes = [self._count(output, removed) for output in step.outputs]
            return [writeback.TensorEdit(name, 1, np.array(sizes, np.int64))]
        lane = self.lanes[name]
        if step.op == "Reshape":
            shape = np.array(step.fixed[1], np.int64)
            if shape[lane.axis] > 0:
                shape[lane.axis] = self._count(name, removed)
            return [writeback.TensorEdit(name, 1, shape)]
        kept = np.cumsum(np.append(0, ~np.isin(self.lanes[step.inputs[0]].numbers, removed)))  # Slice
        length = len(kept) - 1
        bounds = [int(np.array(step.fixed[index]).ravel()[0]) for index in (1, 2)]
        places = [min(max(bound + length if bound < 0 else bound, 0), length) for bound in bounds]
        return [
            writeback.TensorEdit(name, index, np.array([kept[place]], np.int64))
            for index, place in zip((1, 2), places, strict=True)
        ]


def find_channels(module: TorchClassifier) -> Channels:
    """The channels of a module, on the shapes of one image."""
    return _Trace(module).run()


class _Trace:
    def __init__(self, module: TorchClassifier) -> None:
        self.module = module
        self.parent = np.zeros(1, np.int64)
        self.lanes: dict[str, Lane] = {}
        self.slots: list[Slot] = []
        self.steps: dict[str, Step] = {}
        self.found: list[LayerChannels] = []
        self.layers = {layer.output: layer for layer in module.layers()}
        values = [name for step in module.whole.steps for name in step.outputs if name]
        x = module.black_image()
        with torch.no_grad():
            read = {name for step in module.whole.steps for name in step.inputs} | {module.logits_name}
            everything = module.segment([module.input_name], [name for name in values if name in read])
            self.shapes = {name: tuple(value.shape) for name, value in everything({module.input_name: x}).items()}
        self.shapes[module.input_name] = tuple(x.shape)

    def run(self) -> Channels:
        for step in self.module.whole.steps:
            layer = self.layers.get(step.outputs[0])
            if layer is not None:
                self._layer(step, layer)
            elif any(name in self.lanes for name in step.inputs):
                self._follow(step)
        self._freeze(self.module.logits_name)
        lanes = {name: replace(lane, numbers=self._roots(lane.numbers)) for name, lane in self.lanes.items()}
        slots = [replace(slot, numbers=self._roots(slot.numbers)) for slot in self.slots]
        layers = [
            LayerChannels(
                e.layer, self._roots(e.outputs), None if e.inputs is None else self._roots(e.inputs), e.places
            )
            for e in self.found
        ]
        return Channels(slots, layers, lanes, self.steps)

    # numbers

    def _fresh(self, count: int) -> Numbers:
        start = len(self.parent)
        self.parent = np.concatenate([self.parent, np.arange(start, start + count)])
        return np.arange(start, start + count)

    def _roots(self, numbers: Numbers) -> Numbers:
        roots = self.parent[numbers]
        while not np.array_equal(roots, self.parent[roots]):
            roots = self.parent[roots]
        return roots

    def _join(self, a: Numbers, b: Numbers) -> None:
        """Make channels one, pair by pair; the smaller number stands for both, so that FIXED wins."""
        for one, other in np.unique(np.stack([a.ravel(), b.ravel()], 1), axis=0):
            low, high = sorted((int(self._roots(one)), int(self._roots(other))))
            self.parent[high] = low

    def _freeze(self, *values: str) -> None:
        for value in values:
            lane = self.lanes.get(value)
            if lane is not None:
                self._join(lane.numbers, np.zeros_like(lane.numbers))

    # operators

    def _layer(self, step: Step, layer: Layer) -> None:
        lane, count = self.lanes.get(layer.input), layer.shape[layer.axis]
        rank = len(self.shapes[layer.input])
        depthwise = layer.groups > 1 and layer.shape[1] == 1 and count == layer.groups
        straight = layer.groups == 1 and layer.operand == 1
        channel_axis = 1 if layer.op in ("Conv", "Gemm") else rank - 1
        if lane is not None and (
            lane.axis != channel_axis or not (straight or depthwise) or step.attributes.get("transA")
        ):
            self._freeze(layer.input)
            lane = None
        if depthwise and lane is not None:
            outputs, inputs = lane.numbers, None
            self.steps[layer.output] = step
        else:
            width = layer.shape[1 - layer.axis]
            inputs = lane.numbers if lane is not None else np.zeros(width, np.int64)
            outputs = self._fresh(count) if straight else np.zeros(count, np.int64)
        places = math.prod(self.shapes[layer.output]) // count
        self.found.append(LayerChannels(layer, outputs, inputs, places))
        if straight or (depthwise and lane is not None):
            self.lanes[layer.output] = Lane(channel_axis, outputs)
            self._slot(step, layer.operand, layer.axis, outputs)
            if layer.bias is not None and self.module.constant(layer.bias).shape[-1:] == (count,):
                self._slot(step, 2, self.module.constant(layer.bias).dim() - 1, outputs)
            elif len(step.inputs) > 2 and step.inputs[2]:
                self._freeze(layer.output)
        if straight and lane is not None:
            self._slot(step, layer.operand, 1 - layer.axis, lane.numbers)

    def _slot(self, step: Step, index: int, axis: int, numbers: Numbers) -> None:
        self.slots.append(Slot(step.outputs[0], index, step.inputs[index], axis, numbers))

    def _follow(self, step: Step) -> None:
        data = step.inputs[0]
        lane, shape = self.lanes.get(data), self.shapes.get(data, ())
        alone = sum(name in self.lanes for name in step.inputs) == 1 and lane is not None
        if step.op in UNARY and alone and lane is not None:
            self._pass(step, lane)
        elif step.op in BINARY:
            self._combine(step)
        elif step.op in SPATIAL and alone and lane is not None and lane.axis == 1:
            self._pass(step, lane)
        elif step.op in NORMS and alone and lane is not None and lane.axis == 1:
            for index in range(1, len(step.inputs)):
                self._slot(step, index, 0, lane.numbers)
            self._pass(step, lane)
        elif step.op in REDUCTIONS and alone and lane is not None:
            self._reduce(step, lane, len(shape))
        elif step.op in ("Softmax", "LogSoftmax") and alone and lane is not None:
            axis = step.attributes.get("axis", -1)
            if isinstance(axis, int) and axis % len(shape) != lane.axis:
                self._pass(step, lane)
            else:
                self._freeze(data)
        elif step.op in MOVEMENTS and all(index in step.fixed for index in self._sizes_of(step)):
            self._move(step)
        else:
            self._freeze(*step.inputs)

    def _sizes_of(self, step: Step) -> list[int]:
        """Operands that say how elements are moved."""
        if step.op == "Concat":
            return []
        return [index for index, name in enumerate(step.inputs) if index and name]

    def _pass(self, step: Step, lane: Lane) -> None:
        self.lanes[step.outputs[0]] = lane

    def _reduce(self, step: Step, lane: Lane, rank: int) -> None:
        given = step.attributes.get("axes")
        if len(step.inputs) > 1 and self.module.is_constant(step.inputs[1]):
            given = self.module.constant(step.inputs[1]).tolist()
        axes = sorted(int(axis) % rank for axis in np.array(given).ravel()) if given is not None else list(range(rank))
        if lane.axis in axes:
            self._freeze(step.inputs[0])
            return
        gone = sum(axis < lane.axis for axis in axes) if step.attributes.get("keepdims", 1) == 0 else 0
        self.lanes[step.outputs[0]] = Lane(lane.axis - gone, lane.numbers)

    def _combine(self, step: Step) -> None:
        """Operands of an elementwise operator, aligned from the last axis as they are broadcast."""
        rank = len(self.shapes[step.outputs[0]])
        lanes = {
            name: (self.lanes[name].axis + rank - len(self.shapes[name]), self.lanes[name].numbers)
            for name in step.inputs
            if name in self.lanes
        }
        axis, numbers = next(iter(lanes.values()))
        width = self.shapes[step.outputs[0]][axis]
        alike = len(numbers) == width and all(other == axis for other, _ in lanes.values())
        if not alike:
            self._freeze(*step.inputs)
            return
        for index, name in enumerate(step.inputs):
            if name in lanes:
                if len(lanes[name][1]) == width:
                    self._join(numbers, lanes[name][1])
                continue
            constant = self.module.is_constant(name)
            shape = tuple(self.module.constant(name).shape) if constant else self.shapes[name]
            at = axis - (rank - len(shape))
            if at < 0 or shape[at] == 1:
                continue
            if constant:
                self._slot(step, index, at, numbers)
            else:  # what it meets cannot be cut
                self._join(numbers, np.zeros_like(numbers))
        self.lanes[step.outputs[0]] = Lane(axis, numbers)

    def _move(self, step: Step) -> None:
        operands: list[object] = []
        for index, name in enumerate(step.inputs):
            if index in step.fixed:
                operands.append(step.fixed[index])
            elif not name:
                operands.append(None)
            else:
                operands.append(torch.from_numpy(self._spread(name)))
        moved = step.operator.body(*operands)
        for name, value in zip(step.outputs, moved if isinstance(moved, (tuple, list)) else (moved,), strict=False):
            self._settle(name, value.numpy())
        if step.op in ("Reshape", "Slice", "Split") and any(name in self.lanes for name in step.outputs):
            self._resize(step)

    def _spread(self, name: str) -> Numbers:
        """The numbers of a value, one for each of its elements."""
        shape = tuple(self.module.constant(name).shape) if self.module.is_constant(name) else self.shapes[name]
        if name not in self.lanes:
            return np.zeros(shape, np.int64)
        lane = self.lanes[name]
        view = self._roots(lane.numbers).reshape([-1 if axis == lane.axis else 1 for axis in range(len(shape))])
        return np.array(np.broadcast_to(view, shape))

    def _settle(self, name: str, numbers: Numbers) -> None:
        """The lane of a value whose elements have these numbers."""
        varying = [axis for axis in range(numbers.ndim) if not np.array_equal(numbers, np.roll(numbers, 1, axis))]
        if not varying:
            self._join(numbers.ravel()[:1], np.zeros(1, np.int64))
            return
        rows = np.moveaxis(numbers, varying[-1], -1).reshape(-1, numbers.shape[varying[-1]])
        if len(varying) > 1:
            for row in np.unique(rows, axis=0):
                self._join(rows[0], row)
        self.lanes[name] = Lane(varying[-1], rows[0])

    def _resize(self, step: Step) -> None:
        """Note that the node's sizes follow from its channels, or freeze them where they cannot be written."""
        source = self.lanes.get(step.inputs[0])
        along = True
        if step.op == "Slice":
            rank = len(self.shapes[step.inputs[0]])
            axes = [int(axis) % rank for axis in np.array(step.fixed.get(3, [0])).ravel()]
            steps = np.array(step.fixed.get(4, [1])).ravel()
            if source is not None and source.axis not in axes:
                return
            along = len(axes) == 1 and 3 in step.fixed and bool((steps == 1).all())
        if step.op == "Split":
            along = 1 in step.fixed and all(name in self.lanes for name in step.outputs)
            axis = step.attributes.get("axis", 0)
            rank = len(self.shapes[step.inputs[0]])
            if source is not None and isinstance(axis, int) and axis % rank != source.axis:
                return
        if along and (source is not None):
            self.steps[step.outputs[0]] = step
        else:
            self._freeze(*step.inputs, *step.outputs)
