"""One table of operators, keyed by (domain, operator, since_version).

An entry is a plain function: it takes the node's attributes and returns the function of its operands. A version that
changed nothing but the admitted types is listed with the entry it repeats. What is not in the table is looked up in
onnx2torch's registry, and an operator that neither has is an error which names the node.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import onnx
from onnx2torch.node_converters.registry import get_converter
from onnx2torch.onnx_graph import OnnxGraph
from onnx2torch.onnx_node import OnnxNode
from torch import Tensor, nn

from converters.errors import UnsupportedOperatorError

Body = Callable[..., Any]
"""The operator on tensors: operands in ONNX order, None for one left out; a tensor, or a tuple of outputs."""

Attributes = Mapping[str, Any]
Builder = Callable[[Attributes], Body]

_TABLE: dict[tuple[str, str, int], Builder] = {}

_STATIC: dict[str, tuple[int, ...]] = {}
"""Operands, by position, that are numbers and not data: sizes, axes, bounds. Where they are constant, the body gets
them as Python numbers, so that running a step neither copies them off a GPU nor computes with one-element tensors."""

SAME_SINCE: dict[tuple[str, int], int] = {
    ("ConstantOfShape", 20): 9,
    ("ConstantOfShape", 21): 9,
    ("ConstantOfShape", 23): 9,
    ("ConstantOfShape", 24): 9,
    ("ConstantOfShape", 25): 9,
    ("Elu", 22): 6,
    ("Equal", 19): 13,
    ("HardSigmoid", 22): 6,
    ("HardSwish", 22): 14,
    ("Identity", 19): 16,
    ("Identity", 21): 16,
    ("Identity", 23): 16,
    ("Identity", 24): 16,
    ("Identity", 25): 16,
    ("InstanceNormalization", 22): 6,
    ("Shape", 19): 15,
    ("Shape", 21): 15,
    ("Shape", 23): 15,
    ("Shape", 24): 15,
    ("Shape", 25): 15,
    ("Softplus", 22): 1,
    ("Squeeze", 23): 13,
    ("Squeeze", 24): 13,
    ("Squeeze", 25): 13,
    ("Transpose", 21): 13,
    ("Transpose", 23): 13,
    ("Transpose", 24): 13,
    ("Transpose", 25): 13,
    ("Unsqueeze", 21): 13,
    ("Unsqueeze", 23): 13,
    ("Unsqueeze", 24): 13,
    ("Unsqueeze", 25): 13,
}
"""(operator, version) -> the older onnx2torch version that it repeats with more types admitted."""


@dataclass(frozen=True)
class Operator:
    """An operator ready to run: `body` takes the values named in `inputs` (None where the name is empty)."""

    body: Body
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    module: nn.Module | None = None
    static: tuple[int, ...] = ()


def operator(name: str, *versions: int, domain: str = "", static: tuple[int, ...] = ()) -> Callable[[Builder], Builder]:
    """Enter a builder for the versions of one operator, with its static operands.

    Raises ValueError for an entry that exists.
    """

    def enter(builder: Builder) -> Builder:
        for version in versions:
            key = (domain, name, version)
            if key in _TABLE:
                raise ValueError(f"operator {key} is in the table already")
            _TABLE[key] = builder
        _STATIC[name] = static
        return builder

    return enter


def since_version(name: str, opset: int, domain: str = "") -> int:
    """The version of the operator in force at `opset`; `opset` itself for an operator that onnx does not know."""
    try:
        return onnx.defs.get_schema(name, max_inclusive_version=opset, domain=domain).since_version
    except (RuntimeError, onnx.defs.SchemaError):
        return opset


def find(node: OnnxNode, graph: OnnxGraph, opset: int) -> Operator:
    """The operator of one node. Raises UnsupportedOperatorError with the node, the operator and the opset."""
    name, domain = node.operation_type, "" if node.domain == "ai.onnx" else node.domain
    version = since_version(name, opset, domain)
    builder = _TABLE.get((domain, name, version))
    wanted = SAME_SINCE.get((name, version), version) if domain == "" else version
    try:
        if builder is not None:
            return Operator(builder(node.attributes), node.input_values, node.output_values, static=_STATIC[name])
        module, mapping = get_converter(name, wanted, domain)(node, graph)
    except Exception as error:  # converters raise whatever their reading of the node runs into
        where = f"node {node.name or node.output_values[0]!r} ({domain or 'ai.onnx'}.{name}, opset {opset})"
        raise UnsupportedOperatorError(
            f"{where} cannot be converted ({str(error).strip() or 'no converter'}): export the model without it"
        ) from error
    module.eval().requires_grad_(False)
    return Operator(_positional(module), mapping.inputs, tuple(mapping.outputs), module)


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
