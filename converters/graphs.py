"""Reading and changing a graph: what passes and edits have in common."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np
import onnx_ir as ir


def image_input(graph: ir.Graph) -> ir.Value:
    """The input that is not an initializer (old files list those too)."""
    return next(value for value in graph.inputs if not value.is_initializer())


def integer(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()


def ints(node: ir.Node, name: str) -> list[int] | None:
    attribute = node.attributes.get(name)
    return None if attribute is None else list(attribute.as_ints())


def text(node: ir.Node, name: str) -> str:
    attribute = node.attributes.get(name)
    return "" if attribute is None else attribute.as_string()


def axes(node: ir.Node, rank: int) -> list[int] | None:
    """Axes of a reduction, Squeeze or Unsqueeze, from 0 up, by attribute or constant operand; None where not given."""
    given = ints(node, "axes")
    if given is None and "axis" in node.attributes:
        given = [integer(node, "axis", 0)]
    if given is None:
        constant = constant_behind(node.inputs[1]) if len(node.inputs) > 1 else None
        given = None if constant is None else [int(axis) for axis in to_numpy(constant).ravel()]
    return None if given is None else [axis % rank for axis in given]


def is_constant(value: ir.Value | None) -> bool:
    return value is not None and value.is_initializer() and value.const_value is not None


def constant_behind(value: ir.Value | None) -> ir.Value | None:
    """The constant that a value is, looking through Identity and Constant nodes; None where it is computed."""
    while value is not None:
        if is_constant(value):
            return value
        producer = value.producer()
        if producer is None:
            return None
        if producer.op_type == "Constant":
            return value if ir.convenience.get_const_tensor(value) is not None else None
        value = producer.inputs[0] if producer.op_type == "Identity" else None
    return None


def to_numpy(value: ir.Value) -> np.ndarray:
    """The array of a constant value. Raises ValueError for one that is computed."""
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None:
        raise ValueError(f"{value.name} is not constant")
    return tensor.numpy()


def shape_of(tensor: ir.TensorProtocol) -> ir.Shape:
    return ir.Shape(tensor.shape.numpy())


def add_initializer(graph: ir.Graph, name: str, array: np.ndarray | ir.TensorProtocol) -> ir.Value:
    """Register a new initializer. The name must be unused (`unused_name`)."""
    tensor = ir.tensor(array, name=name) if isinstance(array, np.ndarray) else array
    value = ir.Value(name=name, shape=shape_of(tensor), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


class Names:
    """Names that are taken, read once by who adds many."""

    def __init__(self, taken: Iterable[str]) -> None:
        self._taken = set(taken)

    @classmethod
    def of_values(cls, graph: ir.Graph) -> Names:
        """Of the graph and of those that its nodes hold: branches of an If see its values, and hide none of them."""
        graphs = [graph, *graph.subgraphs()]
        inputs = [str(value.name) for each in graphs for value in each.inputs]
        return cls([*inputs, *(name for each in graphs for name in (*each.initializers, *value_names(each)))])

    @classmethod
    def of_nodes(cls, graph: ir.Graph) -> Names:
        return cls(node.name for node in graph if node.name)

    def unused(self, name: str) -> str:
        """`name`, or `name.N` with the least N for which that is not taken; from now on it is taken."""
        candidate, count = name, 0
        while candidate in self._taken:
            count += 1
            candidate = f"{name}.{count}"
        self._taken.add(candidate)
        return candidate


def unused_name(graph: ir.Graph, name: str) -> str:
    """`name`, or `name.N` with the least N that no value of the graph, or of one in it, has."""
    return Names.of_values(graph).unused(name)


def node_names(graph: ir.Graph) -> dict[ir.Node, str]:
    """What a user finds each node by in a viewer: its name or, where it has none or shares it, its first output's."""
    shared = Counter(node.name for node in graph)
    return {node: node.name if node.name and shared[node.name] == 1 else str(node.outputs[0].name) for node in graph}


def name_nodes(graph: ir.Graph) -> None:
    """Give every node its name of `node_names`, before a pass invents one for those that have none."""
    for node, name in node_names(graph).items():
        node.name = name


def value_names(graph: ir.Graph) -> Iterable[str]:
    return (str(value.name) for node in graph for value in node.outputs)


def values_by_name(graph: ir.Graph) -> dict[str, ir.Value]:
    """What nodes write, and the inputs."""
    values = [*graph.inputs, *(value for node in graph for value in node.outputs)]
    return {str(value.name): value for value in values}


def set_outputs(graph: ir.Graph, names: Iterable[str]) -> None:
    """Make the named values of nodes the graph's outputs, each once, in that order.

    Types and shapes are left for onnxruntime to infer: what a file says of inner values may be wrong.
    """
    named = {str(value.name): value for node in graph for value in node.outputs}
    graph.outputs[:] = [named[name] for name in dict.fromkeys(names)]
    for value in graph.outputs:
        value.type = value.shape = None
