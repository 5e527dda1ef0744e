"""Any batch size: what exporters write of the one they saw is taken out of the graph.

A file with a fixed batch has it in the targets of Reshape and Expand, alone or multiplied into another dimension
(windows, heads). A file with an open batch computes those targets from the image's shape; that side path runs past
every layer, so no block could end before it, and it ties a stretch of the graph to the image. Both become constants:
0 (as in the input) or -1 (what is left) in the batch's place, and 1 in that of an Expand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from converters import graphs
from converters.known_sizes import FEW, is_of_sizes, values_of_a_run

BATCH = "batch"
BROADCASTING = ("Add", "Div", "Max", "Min", "Mul", "Pow", "Sub", "Where")
"""Operators that repeat dimensions of size 1 of all operands, counted from the last."""


@dataclass(frozen=True)
class Place:
    """Where the batch is in a shape: in dimension `axis`, with a factor `inner` of that dimension inside of it.

    [N, 3, 8, 8]: Place(0, 1); [N * 12, 197, 64], twelve heads an image: Place(0, 12); [197, N, 768]: Place(1, 1).
    """

    axis: int
    inner: int = 1


def fixed_batch(image: ir.Value) -> int | None:
    """The batch size that an image input's shape fixes; None where it is open, by a name or by a number below 1."""
    batch = image.shape[0] if image.shape is not None and len(image.shape) else None
    return batch if isinstance(batch, int) and batch > 0 else None


def batch_size(image: ir.Value) -> int | str:
    """The batch in an image input's shape: the number that fixes it, or what the file calls an open one."""
    batch = image.shape[0] if image.shape is not None and len(image.shape) else None
    named = batch.value if isinstance(batch, ir.SymbolicDim) else None
    return fixed_batch(image) or named or BATCH


def open_batch(model: ir.Model) -> bool:
    """A batch dimension fixed in the file becomes symbolic, and stale inferred shapes are forgotten.

    The constants that hold it must be folded already.
    """
    graph = model.graph
    image = graphs.image_input(graph)
    fixed = fixed_batch(image)
    if fixed is None:
        return False
    common.ShapeInferencePass(check_type=False, strict_mode=False)(model)
    _open_reshapes(graph, image, fixed)
    for node in graph:
        for value in node.outputs:
            value.shape = None if not value.is_graph_output() or value.shape is None else _any_batch(value.shape)
    assert image.shape is not None
    image.shape = _any_batch(image.shape)
    return True


def _any_batch(shape: ir.Shape) -> ir.Shape:
    return ir.Shape([BATCH, *list(shape)[1:]])


def _open_reshapes(graph: ir.Graph, image: ir.Value, batch: int) -> None:
    """Follow the batch from value to value, and free the target of every Reshape on the way."""
    places = {image: Place(0)}
    for node in graph:
        for index, value in enumerate(node.inputs):
            if value is None or value not in places:
                continue
            source, target = _sizes(value), _sizes(node.outputs[0])
            if source is None or target is None:
                break
            if node.op_type == "Reshape" and len(target) == 1 and places[value] == Place(0):
                row = _keep_rows(graph, node, source, batch, _constant)
                if row is not None:
                    target, node.outputs[0].shape = row, ir.Shape(row)
            place = _after(node, index, places[value], source, target, batch)
            if place is not None and node.op_type == "Reshape":
                kept = place.axis == places[value].axis and source[place.axis] == target[place.axis]
                target[place.axis] = 0 if kept else -1
                _set_target(graph, node, target)
            if place is not None and node.op_type == "Expand" and source[places[value].axis] == target[place.axis]:
                target[place.axis] = 1  # as it is, for both shapes are broadcast
                _set_target(graph, node, target)
            if place == Place(0) and node.op_type == "Resize":
                _free_sizes(graph, node)
            if place is not None:
                _take_one(graph, node, place, len(target), batch)
                places.update(dict.fromkeys(node.outputs, place))
            break


def _take_one(graph: ir.Graph, node: ir.Node, place: Place, rank: int, batch: int) -> None:
    """A constant beside the images that holds the same for each of them becomes that of one, which fits any number.

    So a class token is stored that was expanded to the batch: [N, 1, D].
    """
    if batch == 1 or place.inner != 1:
        return
    for index, value in enumerate(node.inputs):
        constant = graphs.constant_behind(value)
        if constant is None or value is None:
            continue
        array = graphs.to_numpy(constant)
        axis = place.axis - (rank - array.ndim)
        if axis < 0 or array.shape[axis] != batch or not _repeats(node, index, axis, array.ndim):
            continue
        one = array.take([0], axis)
        if (array == one).all():
            name = graphs.unused_name(graph, f"{value.name}.one")
            node.replace_input_with(index, graphs.add_initializer(graph, name, one))


def _repeats(node: ir.Node, index: int, axis: int, rank: int) -> bool:
    """Whether a node repeats an operand of size 1 along `axis` to the output's size there; of Concat, ours does."""
    match node.op_type:
        case "Concat":
            return axis != graphs.integer(node, "axis", 0) % rank
        case "Gemm":
            return index == 2
        case "MatMul":
            return axis < rank - 2
        case name:
            return name in BROADCASTING


def _constant(value: ir.Value | None) -> np.ndarray | None:
    constant = graphs.constant_behind(value)
    return None if constant is None else graphs.to_numpy(constant)


def _keep_rows(
    graph: ir.Graph,
    node: ir.Node,
    source: Sequence[int],
    batch: int,
    read: Callable[[ir.Value | None], np.ndarray | None],
) -> list[int] | None:
    """What `as_strided` is exported as, a Reshape of all images to one row and a Gather from it, image by image.

    [N, 3, 4] -> [N * 12] -> Gather of [N, ...] places becomes [N, 12] -> Gather of [...] places on axis 1, where each
    image's places lie in its own part and are the same there. `read` gives the places for a batch of `batch`. The
    Reshape's new sizes, or None where that is not so.
    """
    size = math.prod(source[1:])
    own: list[tuple[ir.Node, np.ndarray]] = []
    for reader, index in node.outputs[0].uses():
        places = read(reader.inputs[1]) if reader.op_type == "Gather" and index == 0 else None
        if places is None or graphs.integer(reader, "axis", 0) != 0:
            return None
        first = np.arange(batch).reshape(-1, *[1] * (places.ndim - 1)) * size
        if places.ndim < 1 or len(places) != batch or not places.size or (places != places[:1] + first).any():
            return None
        if places[0].max() >= size:
            return None
        own.append((reader, places[0]))
    if not own or any(places.min() < 0 for _, places in own):
        return None
    for reader, places in own:
        name = graphs.unused_name(graph, f"{reader.outputs[0].name}.places")
        reader.replace_input_with(1, graphs.add_initializer(graph, name, places))
        reader.attributes["axis"] = ir.AttrInt64("axis", 1)
    return [batch, size]


def _free_sizes(graph: ir.Graph, node: ir.Node) -> None:
    """A Resize to constant sizes takes the first of them, the batch, from what it reads."""
    sizes = graphs.constant_behind(node.inputs[3]) if len(node.inputs) > 3 else None
    if sizes is None or "axes" in node.attributes:
        return
    name = str(node.outputs[0].name)
    first = graphs.add_initializer(graph, graphs.unused_name(graph, f"{name}.first"), np.zeros(1, np.int64))
    sides = graphs.add_initializer(graph, graphs.unused_name(graph, f"{name}.sides"), graphs.to_numpy(sizes)[1:])
    shape = ir.node("Shape", [node.inputs[0]])
    batch = ir.node("Gather", [shape.outputs[0], first])
    joined = ir.node("Concat", [batch.outputs[0], sides], attributes={"axis": 0})
    for new, kind in ((shape, "shape"), (batch, "batch"), (joined, "sizes")):
        new.name = new.outputs[0].name = graphs.unused_name(graph, f"{name}.{kind}")
        graph.insert_before(node, new)
    node.replace_input_with(3, joined.outputs[0])


def _sizes(value: ir.Value) -> list[int] | None:
    if value.shape is None:
        return None
    sizes = [size for size in value.shape if isinstance(size, int)]
    return sizes if len(sizes) == len(value.shape) else None


def _after(
    node: ir.Node, index: int, place: Place, source: Sequence[int], target: Sequence[int], batch: int
) -> Place | None:
    """Where the batch is in a node's outputs, given where it is in operand `index`; None where it is in none."""
    axis, shift = place.axis, len(target) - len(source)
    match node.op_type:
        case "Shape" | "Size":
            return None
        case "Reshape" | "Flatten":
            return reshaped(place, source, target, batch)
        case "Transpose":
            order = graphs.ints(node, "perm") or list(range(len(source)))[::-1]
            return replace(place, axis=list(order).index(axis))
        case "Squeeze":
            gone = graphs.axes(node, len(source))
            if gone is None:
                gone = [a for a, size in enumerate(source) if size == 1]
            return None if axis in gone else replace(place, axis=axis - sum(a < axis for a in gone))
        case "Unsqueeze":
            new = set(graphs.axes(node, len(target)) or [])
            return replace(place, axis=[a for a in range(len(target)) if a not in new][axis])
        case "Gather":
            along = graphs.integer(node, "axis", 0) % len(source)
            if index != 0 or axis == along:
                return None
            return replace(place, axis=axis + shift if axis > along else axis)
        case "Einsum":
            return _in_einsum(node, index, place)
        case name if name.startswith("Reduce") or name == "ArgMax":
            gone = graphs.axes(node, len(source)) or []
            dropped = sum(a < axis for a in gone) if shift else 0
            return None if axis in gone else replace(place, axis=axis - dropped)
        case _:
            return replace(place, axis=axis + shift) if 0 <= axis + shift < len(target) else None  # aligned right


def _in_einsum(node: ir.Node, index: int, place: Place) -> Place | None:
    equation = graphs.text(node, "equation").replace(" ", "")
    terms, arrow, result = equation.partition("->")
    if not arrow or "." in equation:
        return None
    found = result.find(terms.split(",")[index][place.axis])
    return replace(place, axis=found) if found >= 0 else None


def reshaped(place: Place, source: Sequence[int], target: Sequence[int], batch: int) -> Place | None:
    """Where the batch is after a Reshape, which keeps the order of elements: where its stride falls.

    An edge between two dimensions belongs to both when the batch is 1. A dimension of the batch's own size comes first,
    then one in front of dimensions that stay as they were ([197, N, 768] -> [197 N, 768]), then one that the batch can
    be multiplied into ([197, N, 768] -> [197, N 12, 64]); the last one holds what weights are multiplied with, and is
    taken only where nothing else fits ([197, N, 12, 64] -> [197 N, 768]).
    """
    stride = place.inner * math.prod(source[place.axis + 1 :])
    inside = [math.prod(target[axis + 1 :]) for axis in range(len(target))]
    fitting = [
        axis
        for axis, size in enumerate(target)
        if stride % inside[axis] == 0 and batch * stride <= inside[axis] * size and inside[axis] <= stride
    ]
    if not fitting:
        return None
    alone = [axis for axis in fitting if target[axis] == batch and inside[axis] == stride]
    fitting = [axis for axis in fitting if axis < len(target) - 1] or fitting
    same = [
        axis
        for axis in fitting
        if place.inner == 1 and list(target[axis + 1 :]) == list(source[place.axis + 1 :]) and inside[axis] == stride
    ]
    outermost = [axis for axis in fitting if inside[axis] * target[axis] == batch * stride]
    axis = (alone or same or outermost or fitting)[0]
    return Place(axis, stride // inside[axis])


def keep_rows(model: ir.Model) -> bool:
    """What `as_strided` is exported as takes each image's places from its own row, where the batch is open.

    The places are computed from the size of the batch, which runs from the image past every layer.
    """
    graph, changed = model.graph, False
    image = graphs.image_input(graph)
    rows = {
        node: [FEW, *sizes]
        for node in graph
        if node.op_type == "Reshape" and _is_one_row(node) and (sizes := _sizes_of_one(node.inputs[0], image))
    }
    places = [
        value
        for node in rows
        for reader, _ in node.outputs[0].uses()
        if reader.op_type == "Gather" and reader.graph is graph and (value := reader.inputs[1]) is not None
        if value.producer() is not None and is_of_sizes(value, image)
    ]
    found = values_of_a_run(model, list(dict.fromkeys(places)))
    for node, source in rows.items():
        row = _keep_rows(graph, node, source, FEW, lambda value: found.get(value) if value is not None else None)
        if row is not None:
            _set_target(graph, node, [-1, row[1]])
            node.outputs[0].shape = None
            changed = True
    return changed


def _sizes_of_one(value: ir.Value | None, image: ir.Value) -> list[int] | None:
    """The shape [N, ...] of a value but for N, the open batch; None where it does not begin so, or is not known."""
    if value is None or value.shape is None or image.shape is None or not value.shape or not image.shape:
        return None
    sizes = [size for size in list(value.shape)[1:] if isinstance(size, int)]
    return sizes if value.shape[0] == image.shape[0] and len(sizes) == len(value.shape) - 1 else None


def _is_one_row(node: ir.Node) -> bool:
    target = _constant(node.inputs[1])
    return target is not None and target.tolist() == [-1]


def free_reshapes(model: ir.Model) -> bool:
    """A Reshape whose target has one computed size, and no -1, gets -1 for it; for the batch beside a -1, it gets 0.

    An Expand of what begins with the batch already gets 1 for it: both shapes are broadcast.
    """
    image, changed = graphs.image_input(model.graph), False
    assert image.shape is not None
    for node in model.graph:
        if node.op_type not in ("Reshape", "Expand") or node.inputs[0] is None or node.inputs[1] is None:
            continue
        if graphs.integer(node, "allowzero", 0):
            continue
        sizes = _partly_constant(node.inputs[1])
        if sizes is None or sizes.count(None) != 1:
            continue
        at, source = sizes.index(None), node.inputs[0].shape
        begins_with_batch = at == 0 and source is not None and len(source) > 0 and source[0] == image.shape[0]
        is_batch = begins_with_batch and _is_batch_size(_first_part(node.inputs[1]))
        if node.op_type == "Expand":
            if not is_batch or source is None or len(source) != len(sizes):
                continue
            sizes[at] = 1
        elif -1 not in sizes:
            sizes[at] = -1
        elif is_batch:
            sizes[at] = 0
        else:
            continue
        _set_target(model.graph, node, [int(size or 0) for size in sizes])
        changed = True
    return changed


def _set_target(graph: ir.Graph, node: ir.Node, sizes: Sequence[int]) -> None:
    node.attributes.pop("allowzero", None)  # today's exporter writes it everywhere; here 0 means "as in the input"
    name = graphs.unused_name(graph, f"{node.outputs[0].name}.shape")
    node.replace_input_with(1, graphs.add_initializer(graph, name, np.array(sizes, np.int64)))


def _partly_constant(target: ir.Value) -> list[int | None] | None:
    """The sizes that a Concat puts together, None for a computed one; None where it is no such Concat."""
    concat = target.producer()
    if concat is None or concat.op_type != "Concat":
        return None
    sizes: list[int | None] = []
    for part in concat.inputs:
        constant = graphs.constant_behind(part)
        if constant is not None:
            sizes += [int(size) for size in np.atleast_1d(graphs.to_numpy(constant))]
        elif part is not None and _is_one_number(part):
            sizes.append(None)
        else:
            return None
    return sizes


def _is_one_number(value: ir.Value) -> bool:
    """Whether a computed part of a shape is a single size: by its inferred shape, or a scalar that was unsqueezed."""
    if value.shape is not None and len(value.shape) == 1 and isinstance(value.shape[0], int):
        return value.shape[0] == 1
    producer = value.producer()
    return producer is not None and producer.op_type == "Unsqueeze"


def _first_part(target: ir.Value) -> ir.Value | None:
    concat = target.producer()
    return concat.inputs[0] if concat is not None else None


def _is_batch_size(value: ir.Value | None) -> bool:
    """Whether a value is element 0 of the Shape of something, as exporters spell the size of the batch."""
    node = value.producer() if value is not None else None
    while node is not None and node.op_type in ("Unsqueeze", "Cast", "Squeeze", "Reshape"):
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    if node is None or not node.inputs or node.inputs[0] is None:
        return False
    if node.op_type == "Shape":
        return graphs.integer(node, "end", 0) == 1 and graphs.integer(node, "start", 0) == 0
    index = node.inputs[1] if len(node.inputs) > 1 else None
    taken = graphs.constant_behind(index)
    source = node.inputs[0].producer()
    takes_first = node.op_type == "Gather" and taken is not None and not graphs.to_numpy(taken).any()
    return takes_first and source is not None and source.op_type == "Shape"
