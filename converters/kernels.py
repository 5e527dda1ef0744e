"""Which layers run in integers: what has to be quantized for it, what that promises, and what onnxruntime makes of it.

onnxruntime's CPU provider turns DequantizeLinear -> operator -> QuantizeLinear into one integer kernel. A convolution
needs its input and its output quantized, where the output may lie behind a Relu, or behind a Clip to what the quantizer
can hold, but not to less, as fewer than 8 bits have. Gemm and MatMul need their input alone: their kernels write float
too. Add, Mul and Concat of what convolutions write join in when all their inputs are quantized. Pooling, Reshape and
Transpose are passed through.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from converters.runtime import optimised_operators
from converters.torch_module import Layer, Step, TorchClassifier

JOINING = ("Add", "Mul", "Concat")
ABSORBED = ("Relu", "Clip")
"""What a quantizer does anyway, so that it disappears between an integer kernel and a QuantizeLinear."""
WRITES_FLOAT = ("Gemm", "MatMul")
"""Layers whose integer kernel needs no quantized output."""

INTEGER_KERNELS = ("QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat")


class _Readers:
    """Who reads each value on the way to the logits."""

    def __init__(self, module: TorchClassifier) -> None:
        self.of: dict[str, list[Step]] = {}
        for step in module.whole.steps:
            for name in step.inputs:
                self.of.setdefault(name, []).append(step)

    def settled(self, name: str) -> str:
        """The value to quantize in place of `name`: behind the Relu or Clip that alone reads it."""
        readers = self.of.get(name, [])
        if len(readers) == 1 and readers[0].op in ABSORBED:
            return self.settled(readers[0].outputs[0])
        return name


def values_between(module: TorchClassifier) -> list[str]:
    """Values to quantize, besides the inputs of the layers, so that integer kernels follow one another; in order."""
    readers = _Readers(module)
    convolutions = {layer.output for layer in module.layers() if layer.op == "Conv"}
    integer: dict[str, None] = {}
    wanted: dict[str, None] = {}
    for step in module.whole.steps:
        joins = step.op in JOINING and not any(module.is_constant(name) for name in step.inputs)
        if step.outputs[0] in convolutions or (joins and integer.keys() & set(step.inputs)):
            wanted.update(dict.fromkeys(step.inputs if joins else ()))
            settled = readers.settled(step.outputs[0])
            integer[settled] = wanted[settled] = None
    return [name for name in module.values if name in wanted and name != module.logits_name]


def clipped_to(module: TorchClassifier) -> dict[str, tuple[float, float]]:
    """Constant bounds of every value that a Clip writes: a quantizer that holds more does not absorb it."""
    found = {}
    for step in module.whole.steps:
        low, high = step.fixed.get(1), step.fixed.get(2)
        if step.op == "Clip" and isinstance(low, float) and isinstance(high, float):
            found[step.outputs[0]] = (low, high)
    return found


@dataclass(frozen=True)
class Forecast:
    """How many of `layers` layers integer kernels will take, and how many they will not, by reason."""

    layers: int
    kept_out: Mapping[str, int]

    @property
    def count(self) -> int:
        return self.layers - sum(self.kept_out.values())

    def __str__(self) -> str:
        text = f"forecast: {self.count} of {self.layers} layers will run in integers in onnxruntime on this machine"
        reasons = ", ".join(f"{reason} ({count})" for reason, count in self.kept_out.items())
        return f"{text}; {self.layers - self.count} will not: {reasons}" if reasons else text


def forecast(
    module: TorchClassifier, quantized: Mapping[str, int], stored: Mapping[str, int], *, biases: bool
) -> Forecast:
    """What onnxruntime's CPU provider will make of a file.

    `quantized` are the bits of each quantized value by name, `stored` those of the type that each layer's weight is
    stored in, by layer output, and `biases` is whether biases are integers.
    """
    readers, layers = _Readers(module), module.layers()
    reasons = [_kept_out(layer, readers, quantized, stored[layer.output], biases) for layer in layers]
    return Forecast(len(layers), dict(Counter(reason for reason in reasons if reason is not None).most_common()))


def _kept_out(layer: Layer, readers: _Readers, quantized: Mapping[str, int], stored: int, biases: bool) -> str | None:
    """Why no integer kernel takes a layer; None where one does."""
    if stored != 8:
        return f"weights are stored in {stored} bits"
    if layer.operand != 1:
        return "the weight is the first operand"
    bits = quantized.get(layer.input)
    if bits is None or bits > 8:  # fewer lie in 8, behind a Clip
        return "inputs are in float" if bits is None else f"inputs have {bits} bits"
    if quantized.get(readers.settled(layer.output)) == 8:
        return None
    if layer.op not in WRITES_FLOAT:
        return "outputs are not quantized to 8 bits"
    return "biases are in float" if layer.op == "Gemm" and layer.bias is not None and not biases else None


@dataclass(frozen=True)
class Fusion:
    """What runs in integers: `forecast` and `counted` of `layers` layers, and the operators that onnxruntime runs."""

    layers: int
    forecast: int
    counted: int
    operators: Mapping[str, int]


def count_fusion(path: Path, expected: Forecast) -> Fusion:
    """Counted in the graph that onnxruntime runs after all its optimisations. Raises ModelError if it cannot load."""
    operators = Counter(optimised_operators(path))
    counted = sum(operators[name] for name in INTEGER_KERNELS)
    return Fusion(expected.layers, expected.count, counted, dict(operators.most_common()))
