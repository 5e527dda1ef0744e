"""An ONNX classifier as a differentiable torch module in which every value keeps its ONNX name.

The module runs nodes in order over an environment of named values. Any value can be read (a tap), any stretch between
named values can be run alone (a `Segment`: how a block is reconstructed), any initializer can be given another tensor
for one call, and any value can be passed through a function when it appears (how activations are quantized). Weights
are operands, in the file's own layout, so results go back to the file under the name they came with.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from converters import graphs, passes
from converters.classifier import Classifier
from converters.errors import ModelError, UnsupportedOperatorError
from converters.ops import registry
from converters.ops.layers import convolution_geometry, torch_pads

Transform = Callable[[Tensor], Tensor]
ROWS = (2, 3)
"""Images, by which values with a row for each are told."""


@dataclass(frozen=True)
class Step:
    """One node: `outputs` = `operator.body` of `operator.inputs`."""

    name: str
    op: str
    operator: registry.Operator
    attributes: Mapping[str, object]
    fixed: Mapping[int, object]
    """Constant static operands (sizes, bounds) as Python numbers, by position."""

    @property
    def inputs(self) -> tuple[str, ...]:
        return self.operator.inputs

    @property
    def outputs(self) -> tuple[str, ...]:
        return self.operator.outputs


@dataclass(frozen=True)
class Layer:
    """A node with a constant weight: Conv, Gemm or MatMul.

    `name` is what users know it by (`graphs.node_names`), in every file that it is in; `output` identifies the layer
    (ONNX values are unique); `weight` and `bias` name initializers; `operand` is the
    weight's position; `axis` is the output channel's axis in it (Conv [O, I/g, kh, kw]: 0; Gemm transB=1 [O, I]: 0;
    Gemm and MatMul [I, O]: 1; MatMul with the weight first, [O, I] times [..., I, T]: 0).
    """

    name: str
    op: str
    input: str
    output: str
    weight: str
    bias: str | None
    axis: int
    shape: tuple[int, ...]
    groups: int = 1
    operand: int = 1

    @property
    def parameters(self) -> int:
        return int(np.prod(self.shape))


@dataclass(frozen=True)
class BatchNorm:
    """A BatchNormalization: the value it reads and the statistics [C] it stored of that value in training."""

    input: str
    output: str
    mean: Tensor
    variance: Tensor


class TorchClassifier(nn.Module):
    """The differentiable module, made by `conversion.to_torch`.

    `forward` takes the model's input tensor and gives its logits [N, classes].
    """

    def __init__(self, classifier: Classifier, operators: Iterable[registry.Found]) -> None:
        super().__init__()
        self.classifier = classifier
        self.spec = classifier.spec
        self.input_name, self.logits_name = classifier.input_name, classifier.logits
        self._buffer_of: dict[str, str] = {}
        self._hold_constants(classifier)
        self.steps = self._steps(operators)
        self.whole = Segment(self, [self.input_name], [self.logits_name])

    def _hold_constants(self, classifier: Classifier) -> None:
        for index, (name, value) in enumerate(classifier.normal.graph.initializers.items()):
            array = graphs.to_numpy(value)
            if array.dtype.kind not in "biufc":
                raise UnsupportedOperatorError(
                    f"{classifier.path}: tensor {name} is {value.dtype}, which torch lacks: give the float model"
                )
            if not array.flags.writeable:  # the proto's own memory, which torch must not have
                array = array.copy()
            self._buffer_of[name] = f"constant_{index}"
            self.register_buffer(f"constant_{index}", torch.from_numpy(array))

    def _steps(self, operators: Iterable[registry.Found]) -> list[Step]:
        steps: list[Step] = []
        for node, operator in operators:
            if operator.module is not None:
                self.add_module(f"node_{len(steps)}", operator.module)
            fixed = {
                index: self.constant(operator.inputs[index]).tolist()
                for index in operator.static
                if index < len(operator.inputs) and self.is_constant(operator.inputs[index])
            }
            steps.append(Step(node.name, node.op_type, operator, registry.attributes_of(node), fixed))
        return steps

    def constant(self, name: str) -> Tensor:
        """The tensor of an initializer."""
        return self.get_buffer(self._buffer_of[name])

    def is_constant(self, name: str) -> bool:
        return name in self._buffer_of

    @property
    def values(self) -> list[str]:
        """Names of the input and of all that is computed from it on the way to the logits, in order."""
        return [self.input_name, *(name for step in self.whole.steps for name in step.outputs)]

    @property
    def device(self) -> torch.device:
        return next((b.device for b in self.buffers()), torch.device("cpu"))

    @cached_property
    def with_rows(self) -> frozenset[str]:
        """Values that hold a row of float numbers for each image [N, ...]: no sizes, nor windows of all images.

        Told from two numbers of black images, as a dimension of one may be that number by chance.
        """
        shapes: list[dict[str, tuple[int, ...]]] = []
        image = self.black_image()
        for count in ROWS:
            seen: dict[str, tuple[int, ...]] = {}
            shapes.append(seen)
            with torch.no_grad():
                notes = {name: partial(_note, name, seen) for name in self.values}
                self.whole({self.input_name: image.expand(count, *image.shape[1:])}, transforms=notes)
        return frozenset(
            name
            for name, shape in shapes[0].items()
            if shape[:1] == ROWS[:1] and shapes[1].get(name, ())[:1] == ROWS[1:]
        )

    def segment(self, inputs: Iterable[str], outputs: Iterable[str]) -> Segment:
        """The stretch of the graph that computes `outputs` from `inputs`."""
        return Segment(self, list(inputs), list(outputs))

    def black_image(self) -> Tensor:
        """One black image as the model takes it, to learn shapes from."""
        height, width = self.spec.size
        return self.spec.to_input(torch.zeros(1, self.spec.channel_count, height, width)).to(self.device)

    def forward(self, x: Tensor) -> Tensor:
        return self.whole({self.input_name: x})[self.logits_name]

    def layers(self) -> list[Layer]:
        """Weighted layers on the way from input to logits, in order."""
        found = []
        for step in self.whole.steps:
            constant = [self.is_constant(name) for name in step.inputs[:2]]
            if step.op not in passes.LAYERS or constant not in ([False, True], [True, False]):
                continue
            operand = constant.index(True)
            weight = self.constant(step.inputs[operand])
            if (operand == 0 and step.op != "MatMul") or (step.op == "MatMul" and weight.dim() != 2):
                continue
            bias = step.inputs[2] if len(step.inputs) > 2 and self.is_constant(step.inputs[2]) else None
            rows_first = step.op == "Conv" or operand == 0 or step.attributes.get("transB", 0) == 1
            groups = step.attributes.get("group", 1)
            found.append(
                Layer(
                    name=step.name,
                    op=step.op,
                    input=step.inputs[1 - operand],
                    output=step.outputs[0],
                    weight=step.inputs[operand],
                    bias=bias,
                    axis=0 if rows_first else 1,
                    shape=tuple(weight.shape),
                    groups=groups if isinstance(groups, int) else 1,
                    operand=operand,
                )
            )
        return found

    def operand_vectors(self, layer: Layer, x: Tensor, places: int) -> Tensor:
        """What each output of a layer is a product of: [groups, N * at most `places`, K], K weights an output channel.

        `x` [N, ...] holds the layer's input; of each image's output positions, `places` evenly spread ones are taken.
        The order of K is that of the weight without its output-channel axis.
        """
        if layer.op != "Conv":
            x = x.transpose(-1, -2) if layer.operand == 0 else x
            rows = x.reshape(len(x), -1, x.shape[-1])
            return rows[:, _spread(rows.shape[1], places)].reshape(1, -1, x.shape[-1])
        step = self._step(layer)
        kernel = layer.shape[2:]
        strides, dilations, pads = convolution_geometry(step.attributes, tuple(x.shape[2:]), kernel)
        padded = F.pad(x, torch_pads(pads)) if any(pads) else x
        sides = [
            (length - dilation * (size - 1) - 1) // stride + 1
            for length, size, stride, dilation in zip(padded.shape[2:], kernel, strides, dilations, strict=True)
        ]
        chosen = _spread(math.prod(sides), places)
        corner = [index * stride for index, stride in zip(torch.unravel_index(chosen, sides), strides, strict=True)]
        everything = slice(None)
        taps = []
        for offset in itertools.product(*map(range, kernel)):
            at = [c + o * dilation for c, o, dilation in zip(corner, offset, dilations, strict=True)]
            index: tuple[slice | Tensor, ...] = (everything, everything, *at)
            taps.append(padded[index])
        grouped = torch.stack(taps, 2).reshape(len(x), layer.groups, -1, len(chosen))
        return grouped.permute(1, 0, 3, 2).reshape(layer.groups, -1, grouped.shape[2])

    def _step(self, layer: Layer) -> Step:
        return next(step for step in self.whole.steps if step.outputs[0] == layer.output)

    def bias_unit(self, layer: Layer) -> float | None:
        """What a bias has to grow by where the layer's products lose 1: alpha / beta of Gemm; None where beta is 0."""
        step = self._step(layer)
        alpha, beta = (step.attributes.get(name, 1.0) for name in ("alpha", "beta"))
        assert isinstance(alpha, float)
        assert isinstance(beta, float)
        return alpha / beta if beta else None

    def batchnorms(self) -> list[BatchNorm]:
        """BatchNormalization nodes with stored statistics, in order."""
        return [
            BatchNorm(step.inputs[0], step.outputs[0], self.constant(step.inputs[3]), self.constant(step.inputs[4]))
            for step in self.whole.steps
            if step.op == "BatchNormalization" and all(self.is_constant(name) for name in step.inputs[3:5])
        ]


def _note(name: str, shapes: dict[str, tuple[int, ...]], x: Tensor) -> Tensor:
    if isinstance(x, Tensor) and x.is_floating_point():
        shapes[name] = tuple(x.shape)
    return x


def _spread(length: int, count: int) -> Tensor:
    """At most `count` of `length` positions, evenly spread."""
    return torch.linspace(0, length - 1, min(length, count)).round().long()


class Segment:
    """A stretch of a TorchClassifier's graph, compiled once: which nodes, in which order, and when a value is done."""

    def __init__(self, owner: TorchClassifier, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        self.owner, self.inputs, self.outputs = owner, tuple(inputs), tuple(outputs)
        needed, chosen = set(outputs) - set(inputs), []
        for step in reversed(owner.steps):
            if needed.intersection(step.outputs):
                chosen.append(step)
                needed.difference_update(step.outputs)
                needed.update(n for n in step.inputs if n and n not in self.inputs and not owner.is_constant(n))
        if needed - set(owner._buffer_of):
            missing = ", ".join(sorted(needed))
            raise ModelError(f"{owner.classifier.path}: {missing} cannot be computed from {', '.join(self.inputs)}")
        self.steps = chosen[::-1]
        read = {name for step in self.steps for name in step.inputs} | set(outputs)
        self.constants = sorted(name for name in read if owner.is_constant(name))
        last_use = {name: index for index, step in enumerate(self.steps) for name in step.inputs}
        self._done: list[list[str]] = [[] for _ in self.steps]
        for name, index in last_use.items():
            if name and name not in self.outputs and not owner.is_constant(name):  # constants stay with the owner
                self._done[index].append(name)

    def __call__(
        self,
        values: Mapping[str, Tensor],
        parameters: Mapping[str, Tensor] | None = None,
        transforms: Mapping[str, Transform] | None = None,
        bodies: Mapping[str, registry.Body] | None = None,
    ) -> dict[str, Tensor]:
        """Run on named `values`; returns the outputs by name.

        `parameters` replaces initializers by name; `transforms` maps a value's name to what is done to it when it
        appears, before anyone reads it; `bodies` computes the node that writes a value otherwise than the file says
        (BatchNormalization in training).
        """
        transforms, bodies = transforms or {}, bodies or {}
        env: dict[str, Tensor | None] = {"": None}
        env.update((name, self.owner.constant(name)) for name in self.constants)
        env.update(parameters or {})
        for name in self.inputs:
            env[name] = transforms[name](values[name]) if name in transforms else values[name]
        for step, done in zip(self.steps, self._done, strict=True):
            try:
                operands: list[object] = [env[name] for name in step.inputs]
            except KeyError as missing:
                raise UnsupportedOperatorError(
                    f"{self.owner.classifier.path}: node {step.name} ({step.op}) reads {missing}, a second output "
                    "(a mask, indices, a cache) that is not computed: export the model without it"
                ) from None
            for index, number in step.fixed.items():
                if parameters is None or step.inputs[index] not in parameters:
                    operands[index] = number
            result = bodies.get(step.outputs[0], step.operator.body)(*operands)
            results = result if isinstance(result, (tuple, list)) else (result,)
            for name, value in zip(step.outputs, results, strict=False):
                if name not in self.inputs:  # a value that was given stays as it was given
                    env[name] = transforms[name](value) if name in transforms else value
            for name in done:
                env.pop(name, None)
        return {name: env[name] for name in self.outputs}  # type: ignore[misc]  # "" alone is None
