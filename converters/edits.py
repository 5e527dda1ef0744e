"""Changes of a graph as data, and the graph with them made: quantized weights, activation Q/DQ pairs, float tensors.

A weight is replaced at the node that reads it, not at the initializer: DequantizeLinear of a new integer initializer
is wired to that operand. Shared, Identity-hidden and Constant-node weights need no care of their own that way: others
go on reading the old tensor, and what nobody reads any more is removed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from converters import graphs
from converters.targets import Container

BIAS = 2  # operand position


@dataclass(frozen=True)
class WeightEdit:
    """Integers for the weight of the node that writes `output`.

    `values` has the weight's own shape; `scale` (float32, > 0) and `zero_point` have one entry a channel of `axis` or,
    with a `group_size`, the weight's rank and one entry for each so many neighbours along `axis` (ONNX's blocks).
    The file holds `values`, which have `bits` bits, in `container`; real = (value - zero_point) * scale.
    """

    output: str
    values: NDArray[np.int32]
    scale: NDArray[np.float32]
    zero_point: NDArray[np.int32]
    axis: int
    bits: int
    container: Container
    index: int = 1
    """The weight's operand position."""
    group_size: int = 0


@dataclass(frozen=True)
class TensorEdit:
    """A new constant for operand `index` of the node that writes `output`; a bias that was absent is added."""

    output: str
    index: int
    values: NDArray[np.float32] | NDArray[np.int64]


@dataclass(frozen=True)
class BiasEdit:
    """A bias as integers: `values` (int32) times `scale` (float32), both [C], for the node that writes `output`."""

    output: str
    values: NDArray[np.int32]
    scale: NDArray[np.float32]


@dataclass(frozen=True)
class AttributeEdit:
    """Another number for an attribute of the node that writes `output`."""

    output: str
    name: str
    value: int


@dataclass(frozen=True)
class ActivationEdit:
    """QuantizeLinear and DequantizeLinear on the named value, per tensor, for everything that reads it."""

    value: str
    scale: float
    zero_point: int
    bits: int
    container: Container


Edit = WeightEdit | TensorEdit | BiasEdit | AttributeEdit | ActivationEdit


def apply_edits(model: ir.Model, edits: Iterable[Edit]) -> ir.Model:
    """A copy of `model` with the edits made. Raises KeyError for a value that the graph does not have."""
    edited = model.clone()
    editor = _Editor(edited.graph)
    for edit in edits:
        match edit:
            case WeightEdit():
                editor.quantize_weight(edit)
            case TensorEdit():
                editor.replace_tensor(edit)
            case BiasEdit():
                editor.quantize_bias(edit)
            case AttributeEdit():
                editor.producer(edit.output).attributes[edit.name] = ir.AttrInt64(edit.name, edit.value)
            case ActivationEdit():
                editor.quantize_activation(edit)
    common.RemoveUnusedNodesPass()(edited)
    return edited


def dequantized_names(graph: ir.Graph, names: Iterable[str]) -> dict[str, str]:
    """What the values of ActivationEdits are read as, once quantized."""
    values, found = graphs.values_by_name(graph), {}
    for name in names:
        ((node, _),) = values[name].uses()  # what the edit has put between it and its readers, one after the other
        while node.op_type != "DequantizeLinear":
            ((node, _),) = node.outputs[0].uses()
        found[name] = str(node.outputs[0].name)
    return found


class _Editor:
    """A graph that is changed; its names are read once."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._names = graphs.Names.of_values(graph)
        self._labels = graphs.Names.of_nodes(graph)
        self._values = graphs.values_by_name(graph)

    def producer(self, name: str) -> ir.Node:
        node = self._values[name].producer()
        if node is None:
            raise KeyError(f"{name} is an input, not a node's output")
        return node

    def replace_tensor(self, edit: TensorEdit) -> None:
        """A tensor that only this operand reads keeps its name; others get a new one."""
        node = self.producer(edit.output)
        old = node.inputs[edit.index] if edit.index < len(node.inputs) else None
        if old is not None and graphs.is_constant(old) and len(old.uses()) == 1 and not old.is_graph_output():
            old.const_value = ir.tensor(edit.values, name=old.name)
            old.shape = ir.Shape(edit.values.shape)
            return
        name = str(old.name) if old is not None else f"{edit.output}.bias"
        _wire(node, edit.index, self._initializer(name, edit.values))

    def quantize_weight(self, edit: WeightEdit) -> None:
        node = self.producer(edit.output)
        name = _operand_name(node, edit.index) or f"{edit.output}.weight"
        operands = [
            self._integers(f"{name}.q", edit.values, edit.container, edit.bits),
            self._initializer(f"{name}.scale", edit.scale),
            self._integers(f"{name}.zero", edit.zero_point, edit.container, edit.bits),
        ]
        label = f"{node.name or edit.output}/weight/DQ"
        dequantized = self._dequantize_before(node, operands, edit.axis, name, label, edit.group_size)
        _wire(node, edit.index, dequantized)

    def quantize_bias(self, edit: BiasEdit) -> None:
        """Zero point 0, as integer kernels ask for, is what DequantizeLinear has without one."""
        node = self.producer(edit.output)
        name = _operand_name(node, BIAS) or f"{edit.output}.bias"
        operands = [self._initializer(f"{name}.q", edit.values), self._initializer(f"{name}.scale", edit.scale)]
        label = f"{node.name or edit.output}/bias/DQ"
        _wire(node, BIAS, self._dequantize_before(node, operands, 0, name, label))

    def quantize_activation(self, edit: ActivationEdit) -> None:
        value = self._values[edit.value]
        readers = [(node, index) for node, index in value.uses()]
        scale = np.array(edit.scale, np.float32)
        parameters = [
            self._initializer(f"{edit.value}.scale", scale),
            self._integers(f"{edit.value}.zero", np.array(edit.zero_point), edit.container, edit.bits),
        ]
        first, inserted = value, []
        if edit.bits < edit.container.bits:  # saturate to the bits first
            bounds = tuple(end - edit.zero_point for end in edit.container.bounds(edit.bits))
            operands = [
                self._initializer(f"{edit.value}.{end}", np.array(bound * scale, np.float32))
                for end, bound in zip(("low", "high"), bounds, strict=True)
            ]
            inserted.append(ir.node("Clip", [value, *operands], name=self._labels.unused(f"{edit.value}/Clip")))
            first = inserted[0].outputs[0]
            first.name = self._names.unused(f"{edit.value}.clipped")
        quantize = ir.node("QuantizeLinear", [first, *parameters], name=self._labels.unused(f"{edit.value}/Q"))
        quantize.outputs[0].name = self._names.unused(f"{edit.value}.q")
        label = self._labels.unused(f"{edit.value}/DQ")
        dequantize = ir.node("DequantizeLinear", [quantize.outputs[0], *parameters], name=label)
        dequantize.outputs[0].name = self._names.unused(f"{edit.value}.dequantized")
        inserted += [quantize, dequantize]
        producer = value.producer()
        if producer is None:
            self._graph.insert_before(next(iter(self._graph)), inserted)
        else:
            self._graph.insert_after(producer, inserted)
        for node, index in readers:
            node.replace_input_with(index, dequantize.outputs[0])

    def _initializer(self, name: str, array: np.ndarray) -> ir.Value:
        return graphs.add_initializer(self._graph, self._names.unused(name), array)

    def _integers(self, name: str, values: np.ndarray, container: Container, bits: int) -> ir.Value:
        """An initializer of the container's type. Raises ValueError when a value does not fit in `bits` bits."""
        low, high = container.bounds(bits)
        if values.min(initial=0) < low or values.max(initial=0) > high:
            raise ValueError(f"{name}: integers outside [{low}, {high}]")
        tensor = ir.tensor(values.astype(container.numpy), dtype=container.dtype, name=self._names.unused(name))
        return graphs.add_initializer(self._graph, str(tensor.name), tensor)

    def _dequantize_before(
        self, node: ir.Node, operands: list[ir.Value], axis: int, value: str, name: str, group_size: int = 0
    ) -> ir.Value:
        label = self._labels.unused(name)
        attributes = {"axis": axis} | ({"block_size": group_size} if group_size else {})
        dequantize = ir.node("DequantizeLinear", operands, attributes=attributes, name=label)
        dequantize.outputs[0].name = self._names.unused(f"{value}.dequantized")
        self._graph.insert_before(node, dequantize)
        return dequantize.outputs[0]


def _operand_name(node: ir.Node, index: int) -> str | None:
    operand = node.inputs[index] if index < len(node.inputs) else None
    return str(operand.name) if operand is not None else None


def _wire(node: ir.Node, index: int, new: ir.Value) -> None:
    if index >= len(node.inputs):
        node.resize_inputs(index + 1)
    node.replace_input_with(index, new)
