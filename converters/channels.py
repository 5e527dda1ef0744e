"""Which channels of a graph can be removed, and what has to be cut with them: dependency groups, read from the graph.

Every weighted layer makes new channels, each with a number; what follows carries the numbers in the grid of its value
(`numbering`). Where values are added or multiplied, the channels that meet become one. The groups of a convolution are
one channel each, on both sides of it. A movement of elements (Reshape, Transpose, Concat, Split, Slice, Gather) is
followed by moving the numbers themselves. Where it spreads channels over several axes, what is left has to be
rectangular: what an operator mixes along an axis becomes one there, and of the axes that are left at the end, those at
one place of the last.

A product of two activations mixes along its last two axes. So the heads of attention come out as one channel each:
scores leave what lies side by side before those axes apart, the heads of queries and keys, and the heads of values with
them. Number 0 stands for what must stay: the image, the logits, and whatever meets an operator that is not known to
leave channels apart (LayerNormalization or Softmax along them, a sum over them).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from converters.channel_cuts import (
    Channels,
    Expand,
    Lane,
    LayerChannels,
    Pin,
    Regroup,
    Reshape,
    Resize,
    Slice,
    Slot,
    Split,
)
from converters.numbering import FIXED, Numbering, Numbers, along
from converters.sizes import Sizes
from converters.torch_module import Layer, Step, TorchClassifier

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
LENGTHS = {"ReduceL1", "ReduceL2", "ReduceSumSquare"}
"""Reductions too; those of heads that are normalised by their length."""
WITHIN = {"LayerNormalization", "LogSoftmax", "LpNormalization", "Softmax"}
"""Operators that normalise along an axis."""
MOVEMENTS = {"Concat", "Flatten", "Gather", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"}


def find_channels(module: TorchClassifier) -> Channels:
    """The channels of a module, on the shapes of one image."""
    return _Trace(module).run()


@dataclass(frozen=True)
class _OpenSlot:
    """A constant operand that lies along one axis of a grid, whose numbers are not settled yet."""

    step: Step
    index: int
    axis: int
    """In the constant."""
    grid: Numbers
    along: int
    """In the grid."""


class _Trace:
    def __init__(self, module: TorchClassifier) -> None:
        self.module = module
        self.sizes = Sizes(module)
        self.numbering = Numbering()
        self.grids: dict[str, Numbers] = {}
        self.measured: dict[str, set[str]] = {}
        """Values with channels that a measured value was computed from."""
        self.slots: list[_OpenSlot] = []
        self.resizes: list[Resize] = []
        self.found: list[LayerChannels] = []
        self.layers = {layer.output: layer for layer in module.layers()}

    def run(self) -> Channels:
        for step in self.module.whole.steps:
            layer = self.layers.get(step.outputs[0])
            if step.outputs[0] in self.sizes.measured:
                self._measure(step)
                continue
            self._pin(step)
            if layer is not None:
                self._layer(step, layer)
            elif any(name in self.grids for name in step.inputs):
                self._follow(step)
        self._settle()
        roots = self.numbering.roots
        layers = [
            LayerChannels(e.layer, roots(e.outputs), None if e.inputs is None else roots(e.inputs), e.places)
            for e in self.found
        ]
        lanes = {name: lane for name, grid in self.grids.items() if (lane := self._lane(grid)) is not None}
        return Channels(self._closed_slots(), layers, lanes, self.resizes)

    def _settle(self) -> None:
        """Every grid varies along one axis at most, and not all of a value can be removed."""
        numbering = self.numbering
        self._freeze(self.module.logits_name)
        self._freeze_beside()
        for grid in self.grids.values():
            numbering.level(grid, numbering.varying(grid)[:-1])
        for grid in self.grids.values():
            if not numbering.varying(grid):
                numbering.fix(grid)

    def _freeze_beside(self) -> None:
        """Values that are other outputs of the file, or that those are computed from beside the way, keep all channels.

        An embedding keeps its width, and an auxiliary head finds what its weights were made for; its numbers change.
        """
        waiting, seen = list(self.module.classifier.original.graph.outputs), set[ir.Value]()
        while waiting:
            value = waiting.pop()
            if str(value.name) in self.grids:
                self._freeze(str(value.name))
                continue
            maker = value.producer()
            if maker is not None and value not in seen:  # beside the way to the logits, or put away by the passes
                seen.add(value)
                waiting += [operand for operand in maker.inputs if operand is not None]

    def _lane(self, grid: Numbers) -> Lane | None:
        axes = self.numbering.varying(grid)
        line = self.numbering.line(grid, axes[0]) if axes else None
        return None if line is None else Lane(axes[0], line)

    def _closed_slots(self) -> list[Slot]:
        slots = []
        for slot in self.slots:
            numbers = self.numbering.line(slot.grid, slot.along)
            if numbers is not None and (numbers != FIXED).any():
                step = slot.step
                slots.append(Slot(step.outputs[0], slot.index, step.inputs[slot.index], slot.axis, numbers))
        return slots

    # grids

    def _freeze(self, *values: str) -> None:
        for value in values:
            if value in self.grids:
                self.numbering.fix(self.grids[value])

    def _mix(self, value: str, axes: Iterable[int]) -> None:
        """What lies along these axes is mixed: it is one channel at each place of the others, or stays."""
        grid = self.grids[value]
        varying, axes = self.numbering.varying(grid), set(axes)
        if set(varying) - axes:
            self.numbering.level(grid, axes.intersection(varying))
        elif varying:
            self.numbering.fix(grid)

    def _line(self, value: str, axis: int) -> Numbers | None:
        """The numbers along the only axis where channels may lie, or None where they cannot be told apart there."""
        grid = self.grids.get(value)
        if grid is None:
            return None
        varying = self.numbering.varying(grid)
        if axis not in varying:
            self.numbering.fix(grid)
            return None
        self.numbering.level(grid, [other for other in varying if other != axis])
        return self.numbering.line(grid, axis)

    def _slot(self, step: Step, index: int, axis: int, grid: Numbers, at: int = 0) -> None:
        self.slots.append(_OpenSlot(step, index, axis, grid, at))

    # what is measured

    def _measure(self, step: Step) -> None:
        """A size, or what is computed from sizes: note which values with channels it depends on."""
        sources = {name for name in step.inputs if name in self.grids}
        sources |= set().union(*(self.measured.get(name, set()) for name in step.inputs))
        self.measured.update(dict.fromkeys(step.outputs, sources))

    def _pin(self, step: Step) -> None:
        """What is computed from the sizes of values with channels must stay as it was, or they must.

        Sizes that follow from the step's own channels are noted after this, and so written over it.
        """
        for index, name in enumerate(step.inputs):
            sources = sorted(self.measured.get(name, ()))
            if not sources:
                continue
            constant, target = self.sizes.constant(name), self.sizes.any_batch(step.outputs[0])
            if constant is not None:
                self.resizes.append(Pin(step.outputs[0], index, sources, constant))
            elif step.op == "Reshape" and target is not None:
                self.resizes.append(Reshape(step.outputs[0], sources, target))
            elif step.op == "Expand" and step.inputs[0] in self.grids:
                continue  # written anew, whatever it was computed from
            else:
                self._freeze(*sources)

    # operators

    def _layer(self, step: Step, layer: Layer) -> None:
        shape, count = self.sizes.shape(layer.output), layer.shape[layer.axis]
        axis = 1 if layer.op in ("Conv", "Gemm") else len(shape) - (1 if layer.operand == 1 else 2)
        straight = layer.operand == 1 and not step.attributes.get("transA")
        if not straight:
            self._freeze(layer.input)
        line = self._line(layer.input, axis) if straight else None
        inputs: Numbers | None = np.zeros(layer.shape[1 - layer.axis], np.int64) if line is None else line
        outputs = np.zeros(count, np.int64)
        if layer.groups > 1:
            inputs = None
            outputs = outputs if line is None else self._groups(layer, line)
        elif straight and count > 1:
            outputs = self.numbering.fresh(count)
        if inputs is not None:
            self._slot(step, layer.operand, 1 - layer.axis, inputs)
        self._slot(step, layer.operand, layer.axis, outputs)
        self.found.append(LayerChannels(layer, outputs, inputs, math.prod(shape) // count))
        self.grids[layer.output] = along(outputs, axis, len(shape))
        if layer.bias is not None and self.module.constant(layer.bias).shape[-1:] == (count,):
            self._slot(step, 2, self.module.constant(layer.bias).dim() - 1, outputs)
        elif len(step.inputs) > 2 and step.inputs[2]:
            self._freeze(layer.output, step.inputs[2])

    def _groups(self, layer: Layer, inputs: Numbers) -> Numbers:
        """The numbers of a grouped convolution's outputs: a group goes whole, and what it reads with it."""
        groups = inputs.reshape(layer.groups, -1)
        self.numbering.level(groups, [1])
        self.resizes.append(Regroup(layer.output, layer.groups))
        return np.repeat(groups[:, 0], layer.shape[0] // layer.groups)

    def _follow(self, step: Step) -> None:
        data, output = step.inputs[0], step.outputs[0]
        alone = data in self.grids and sum(name in self.grids for name in step.inputs) == 1
        if step.op in UNARY and alone:
            self.grids[output] = self.grids[data]
        elif step.op in BINARY:
            self._combine(step)
        elif (step.op == "MatMul" and all(len(self.sizes.shape(name)) > 2 for name in step.inputs)) or (
            step.op == "Attention" and self._has_separate_heads(step)
        ):
            self._multiply(step)
        elif step.op in SPATIAL and alone:
            self._line(data, 1)
            self.grids[output] = self.grids[data]
        elif step.op in NORMS and alone and all(self.module.is_constant(name) for name in step.inputs[1:]):
            self._line(data, 1)
            for index in range(1, len(step.inputs)):
                self._slot(step, index, 0, self.grids[data], 1)
            self.grids[output] = self.grids[data]
        elif step.op in REDUCTIONS | LENGTHS and alone:
            self._reduce(step)
        elif step.op == "Expand" and alone:
            self._expand(step)
        elif step.op in WITHIN and alone:
            rank = len(self.sizes.shape(data))
            axis = self._axis(step, -1, rank)
            self._mix(data, range(axis, rank if step.op == "LayerNormalization" else axis + 1))
            self.grids[output] = self.grids[data]
        elif step.op in MOVEMENTS and (alone or step.op == "Concat"):
            self._move(step)
        else:
            self._freeze(*step.inputs)

    def _axis(self, step: Step, default: int, rank: int) -> int:
        axis = step.attributes.get("axis", default)
        assert isinstance(axis, int)
        return axis % rank

    def _reduce(self, step: Step) -> None:
        data, given = step.inputs[0], step.attributes.get("axes")
        rank = len(self.sizes.shape(data))
        if len(step.inputs) > 1 and step.inputs[1]:
            given = self._numbers(step, 1)
        axes = {int(axis) % rank for axis in np.array(given).ravel()} if given is not None else set()
        axes = axes or set(range(rank))
        self._mix(data, axes)
        grid = self.numbering.narrow(self.grids[data])
        if step.attributes.get("keepdims", 1) == 0:
            grid = grid.squeeze(tuple(axes))
        self.grids[step.outputs[0]] = grid

    def _expand(self, step: Step) -> None:
        """What is repeated along axes of size 1 keeps its channels; how often has to be the same for any batch."""
        data, output = step.inputs[0], step.outputs[0]
        before, after = self.sizes.any_batch(data), self.sizes.any_batch(output)
        if before is None or after is None:
            self._freeze(*step.inputs)
            return
        added = len(after) - len(before)
        sizes = [1 if size == old else size for size, old in zip(after, [0] * added + before, strict=True)]
        if -1 in sizes:
            self._freeze(*step.inputs)
            return
        self.resizes.append(Expand(output, [data], sizes))
        grid = self.numbering.narrow(self.grids[data])
        self.grids[output] = grid.reshape([1] * added + list(grid.shape))

    def _has_separate_heads(self, step: Step) -> bool:
        """Whether Attention reads queries, keys and values [N, heads, T, D], as many heads of each, and no cache."""
        shapes = [self.sizes.shape(name) for name in step.inputs[:3]]
        alike = all(len(shape) == 4 and shape[1] == shapes[0][1] for shape in shapes)
        return alike and not any((*step.inputs[4:], *step.outputs[1:], step.attributes.get("q_num_heads")))

    def _multiply(self, step: Step) -> None:
        """A product of activations [..., M, K] and [..., K, N]: what lies before those axes is kept apart."""
        for name in step.inputs:
            if name in self.grids:
                rank = len(self.sizes.shape(name))
                self._mix(name, (rank - 2, rank - 1))
        self._combine(step)

    def _combine(self, step: Step) -> None:
        """Operands of an elementwise operator, aligned from the last axis as they are broadcast."""
        rank, grids = len(self.sizes.shape(step.outputs[0])), {}
        operands = [name for name in step.inputs if name]
        for name in operands:
            if name in self.grids:
                grid = self.numbering.narrow(self.grids[name])
                grids[name] = grid.reshape([1] * (rank - grid.ndim) + list(grid.shape))
        varying = sorted({axis for grid in grids.values() for axis in self.numbering.varying(grid)})
        spans = {name: self._span(name, varying, rank) for name in operands}
        constants = [name for name in operands if self.module.is_constant(name)]
        apart = [name for name in operands if name not in grids or spans[name] != varying]
        if any(spans[name] for name in apart if name not in constants):  # what cannot be cut with the others
            self._freeze(*grids)
            varying, spans = [], {name: [] for name in spans}
        meeting = [grid for name, grid in grids.items() if spans[name] == varying]
        joined = np.broadcast_arrays(*meeting)[0]
        for grid in meeting:
            self.numbering.join(joined, grid)
        for index, name in enumerate(step.inputs):
            for axis in spans[name] if name in constants else ():
                self._slot(step, index, axis - rank + len(self.sizes.shape(name)), joined, axis)
        self.grids[step.outputs[0]] = joined

    def _span(self, name: str, axes: Sequence[int], rank: int) -> list[int]:
        """Those of a result's axes along which an operand that is broadcast to its rank has places of its own."""
        shape = self.sizes.shape(name)
        shift = rank - len(shape)
        return [axis for axis in axes if axis >= shift and shape[axis - shift] > 1]

    def _move(self, step: Step) -> None:
        if not self._can_move(step):
            self._freeze(*step.inputs)
            return
        operands: list[object] = [self._spread(step.inputs[0])]
        for index, name in enumerate(step.inputs[1:], 1):
            if step.op == "Concat":
                operands.append(self._spread(name))
            elif step.op == "Reshape":
                operands.append(list(self.sizes.shape(step.outputs[0])))
            elif step.op == "Gather":
                operands.append(self.module.constant(name).cpu())
            else:
                operands.append(self._numbers(step, index) if name else None)
        moved = step.operator.body(*operands)
        for name, value in zip(step.outputs, moved if isinstance(moved, (tuple, list)) else (moved,), strict=False):
            self.grids[name] = self.numbering.narrow(value.numpy())

    def _can_move(self, step: Step) -> bool:
        """Whether the numbers can be moved and the file says so afterwards; notes which sizes follow from them."""
        data = step.inputs[0]
        match step.op:
            case "Reshape":
                target = self.sizes.any_batch(step.outputs[0])
                if target is not None:
                    self.resizes.append(Reshape(step.outputs[0], [data], target))
                return target is not None
            case "Squeeze" if len(step.inputs) < 2 and "axes" not in step.attributes:
                return False  # takes an axis away that is cut to one channel
            case "Gather":
                if not self.module.is_constant(step.inputs[1]):
                    return False
                self._mix(data, [self._axis(step, 0, len(self.sizes.shape(data)))])
                return True
            case "Slice" | "Split":
                return self._can_pick(step)
            case "Concat" | "Flatten" | "Transpose":
                return True
            case _:
                return all(self._numbers(step, index) is not None for index in range(1, len(step.inputs)))

    def _can_pick(self, step: Step) -> bool:
        """A Slice or Split: its sizes are written anew where channels lie along it, or nothing is told apart there."""
        data = step.inputs[0]
        shape = self.sizes.shape(data)
        given = {index: self._numbers(step, index) for index, name in enumerate(step.inputs) if index and name}
        numbers = {index: found for index, found in given.items() if found is not None}
        if len(numbers) < len(given):
            return False
        axes = [self._axis(step, 0, len(shape))]
        if step.op == "Slice":
            axes = [axis % len(shape) for axis in numbers.get(3, range(len(numbers[1])))]
        if step.op == "Split" and 1 in numbers:
            self.resizes.append(Split(step.outputs[0], data, axes[0], numbers[1]))
        elif step.op == "Slice" and len(axes) == 1 and numbers.get(4, [1]) == [1]:
            self.resizes.append(Slice(step.outputs[0], data, axes[0], (numbers[1][0], numbers[2][0])))
        else:
            self._mix(data, axes)
        return True

    def _numbers(self, step: Step, index: int) -> list[int] | None:
        """A constant operand of sizes, axes or bounds."""
        constant = self.sizes.constant(step.inputs[index])
        return None if constant is None else [int(number) for number in constant.flatten().tolist()]

    def _spread(self, name: str) -> Tensor:
        """The numbers of a value, one for each of its elements."""
        shape: Sequence[int] = self.sizes.shape(name)
        grid = self.grids.get(name, np.zeros([1] * len(shape), np.int64))
        return torch.from_numpy(np.broadcast_to(self.numbering.roots(grid), shape).copy())
