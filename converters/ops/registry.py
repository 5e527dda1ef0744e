"""One table of operators, keyed by (domain, operator, since_version).

An entry is a plain function: it takes the node's attributes and returns the function of its operands. One function
serves every version of an operator that changed nothing but the admitted types, or where something is said. What is
not in the table is looked up in onnx2torch's registry, which is imported for that alone, and an operator that neither
has is an error which names the node.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import onnx
import torch
from torch import Tensor, nn

from converters.errors import BrokenLibraryError, UnsupportedOperatorError
from converters.ops.advice import what_helps

if TYPE_CHECKING:
    from onnx2torch.onnx_graph import OnnxGraph

Body = Callable[..., Any]
"""The operator on tensors: operands in ONNX order, None for one left out; a tensor, or a tuple of outputs."""

Attributes = Mapping[str, Any]
Builder = Callable[[Attributes], Body]

OUTPUTS = "number of outputs"
"""Among a node's attributes: before opset 18, only that says how many parts Split makes."""

_TABLE: dict[tuple[str, str, int], Builder] = {}

_STATIC: dict[str, tuple[int, ...]] = {}
"""Operands, by position, that are numbers and not data: sizes, axes, bounds. Where they are constant, the body gets
them as Python numbers, so that running a step neither copies them off a GPU nor computes with one-element tensors."""

OLDEST, NEWEST = 7, 25
"""The opsets whose operators are converted."""


@dataclass(frozen=True)
class Operator:
    """An operator ready to run: `body` takes the values named in `inputs` (None where the name is empty)."""

    body: Body
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    module: nn.Module | None = None
    static: tuple[int, ...] = ()


Found = tuple[onnx.NodeProto, Operator]
"""A node and its operator."""


def operator(name: str, *versions: int, domain: str = "", static: tuple[int, ...] = ()) -> Callable[[Builder], Builder]:
    """Enter a builder for versions of one operator (none named: all from OLDEST to NEWEST), with its static operands.

    Raises ValueError for an entry that exists.
    """

    def enter(builder: Builder) -> Builder:
        for version in versions or versions_in_force(name, domain):
            key = (domain, name, version)
            if key in _TABLE:
                raise ValueError(f"operator {key} is in the table already")
            _TABLE[key] = builder
        _STATIC[name] = static
        return builder

    return enter


def numbers(operand: Tensor | list[int] | int) -> list[int]:
    """A static operand as integers, whether it was constant or had to be computed."""
    if isinstance(operand, Tensor):
        operand = operand.tolist()
    return operand if isinstance(operand, list) else [operand]


def since_version(name: str, opset: int, domain: str = "") -> int:
    """The version of the operator in force at `opset`; `opset` itself for an operator that onnx does not know."""
    try:
        return onnx.defs.get_schema(name, max_inclusive_version=opset, domain=domain).since_version
    except (RuntimeError, onnx.defs.SchemaError):
        return opset


def versions_in_force(name: str, domain: str = "") -> list[int]:
    """The versions of an operator that a model of the opsets OLDEST to NEWEST can mean, oldest first."""
    found = set()
    for opset in range(OLDEST, NEWEST + 1):
        try:
            schema = onnx.defs.get_schema(name, max_inclusive_version=opset, domain=domain)
        except (RuntimeError, onnx.defs.SchemaError):  # not yet
            continue
        if not schema.deprecated:
            found.add(schema.since_version)
    return sorted(found)


def attributes_of(node: onnx.NodeProto) -> dict[str, Any]:
    """The node's attributes, texts as str and tensors as torch's, and OUTPUTS, how many outputs it names."""
    given = {entry.name: _plain(onnx.helper.get_attribute_value(entry)) for entry in node.attribute}
    return given | {OUTPUTS: len(node.output)}


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, onnx.TensorProto):
        return torch.from_numpy(onnx.numpy_helper.to_array(value).copy())
    return [_plain(entry) for entry in value] if isinstance(value, list) else value


class Onnx2Torch:
    """A graph for onnx2torch, imported when the first node needs it: that imports torchvision, which takes a second."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._graph = graph

    @cached_property
    def _read(self) -> OnnxGraph:
        from onnx2torch.onnx_graph import OnnxGraph

        return OnnxGraph(self._graph)

    def operator(self, node: onnx.NodeProto, version: int, domain: str) -> Operator:
        """The operator of a node of the graph. Raises whatever onnx2torch's reading of it runs into.

        Raises BrokenLibraryError where onnx2torch cannot be imported.
        """
        try:
            from onnx2torch.node_converters.registry import get_converter
        except Exception as error:  # a torchvision that was built for another torch raises RuntimeError
            raise BrokenLibraryError(
                f"onnx2torch cannot be imported ({error}): install it again, and the torchvision that goes with torch"
                f" {torch.__version__}"
            ) from error
        convert = get_converter(node.op_type, version, domain)
        module, mapping = convert(self._read.value_as_node_output(first_output(node))[0], self._read)
        module.eval().requires_grad_(False)
        return Operator(_positional(module), mapping.inputs, tuple(mapping.outputs), module)


def first_output(node: onnx.NodeProto) -> str:
    """The name of the first value that the node gives."""
    return next(name for name in node.output if name)


def find(node: onnx.NodeProto, others: Onnx2Torch, opset: int) -> Operator:
    """The operator of one node of the graph of `others`, by the table or else by those.

    Raises UnsupportedOperatorError with the node, the operator and the opset, and BrokenLibraryError.
    """
    name, domain = node.op_type, "" if node.domain == "ai.onnx" else node.domain
    version = since_version(name, opset, domain)
    builder = _TABLE.get((domain, name, version))
    try:
        if builder is None:
            return others.operator(node, version, domain)
        return Operator(builder(attributes_of(node)), tuple(node.input), tuple(node.output), static=_STATIC[name])
    except BrokenLibraryError:
        raise
    except Exception as error:  # converters raise whatever their reading of the node runs into
        where = f"node {node.name or first_output(node)!r} ({domain or 'ai.onnx'}.{name}, opset {opset})"
        raise UnsupportedOperatorError(
            f"{where} cannot be converted ({str(error).strip() or 'no converter'}): {what_helps(name, domain)}"
        ) from error


def _positional(module: nn.Module) -> Body:
    """Call a module whose optional operands may be left out in the middle (onnx2torch takes those by keyword)."""
    names = tuple(inspect.signature(module.forward).parameters)

    def run(*operands: Tensor | None) -> Any:
        if None not in operands:
            return module(*operands)
        first = operands.index(None)
        given = zip(names[first:], operands[first:], strict=False)
        return module(*operands[:first], **{key: value for key, value in given if value is not None})

    return run
