"""What comes around a convolution and can be part of it: scales and shifts of its channels, zeros around its input."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from converters import graphs

BATCHNORM_EPSILON = 1e-5  # the operator's default
Channels = NDArray[np.float64]


@dataclass(frozen=True)
class _Affine:
    """x -> factor * x + shift, by channel; `shift_from` is the constant that says the shift."""

    factor: Channels
    shift: Channels
    shift_from: ir.Value | None

    def then(self, other: _Affine) -> _Affine:
        return _Affine(
            self.factor * other.factor,
            self.shift * other.factor + other.shift,
            other.shift_from or self.shift_from,
        )


def fold_affine(model: ir.Model) -> bool:
    """Fold what alone follows a Conv and does the same to all of a channel into that Conv's weight and bias.

    That is BatchNormalization, and Mul, Add, Sub and Div by constants, which is how TensorFlow's exporter spells a
    BatchNorm behind a depthwise convolution; a Transpose may come between. With x -> f x + s, a channel at a time:
    W' = W f, b' = b f + s, where f = gamma / sqrt(var + eps) and s = beta - mean f for a BatchNormalization (Jacob et
    al. 2018, 3.2). Shared initializers are copied on write; the value at the end keeps its name.
    """
    changed = False
    for conv in list(model.graph):
        if conv.op_type == "Conv":
            changed |= _fold_behind(model.graph, conv)
    if changed:
        common.RemoveUnusedNodesPass()(model)
    return changed


def fold_padding(model: ir.Model) -> bool:
    """Let Convs pad with zeros what a Pad does so before them, which is how TensorFlow spells padding of its own kinds.

    The quantizers of a Conv's input then are in front of the Pad, and onnxruntime's integer kernels do it on the way.
    """
    changed = False
    for conv in list(model.graph):
        if conv.op_type != "Conv" or (source := conv.inputs[0]) is None or (pad := source.producer()) is None:
            continue
        added = _zeros_around(pad)
        if added is None or graphs.text(conv, "auto_pad") not in ("", "NOTSET", "VALID"):
            continue
        conv.attributes.pop("auto_pad", None)
        own = graphs.ints(conv, "pads") or [0] * len(added)
        conv.attributes["pads"] = ir.AttrInt64s("pads", [a + b for a, b in zip(own, added, strict=True)])
        conv.replace_input_with(0, pad.inputs[0])
        changed = True
    if changed:
        common.RemoveUnusedNodesPass()(model)
    return changed


def _zeros_around(node: ir.Node) -> list[int] | None:
    """As a Conv says it, what zeros a node puts around the places of [N, C, ...]; None where it is no Pad or other."""
    if node.op_type != "Pad" or len(node.inputs) < 2 or graphs.text(node, "mode") not in ("", "constant"):
        return None
    operands = [graphs.constant_behind(value) for value in node.inputs[1:]]
    if any(value is not None and operand is None for value, operand in zip(node.inputs[1:], operands, strict=True)):
        return None
    pads, fill, axes = (graphs.to_numpy(o) if o is not None else None for o in (*operands, None, None)[:3])
    if pads is None or axes is not None or (fill is not None and fill.any()):
        return None
    before, after = np.split(pads, 2)
    if before[:2].any() or after[:2].any() or (pads < 0).any():
        return None
    return [*before[2:].tolist(), *after[2:].tolist()]


def shifted_end(value: ir.Value, channels: int, rank: int) -> tuple[ir.Value, int] | None:
    """Where `fold_affine` would end behind a Conv that writes `value` [N, channels, ...]; the axis of channels there.

    None where nothing is added to each channel, or by a BatchNormalization, which has statistics of its own.
    """
    steps, conv = _chain(value, channels, rank), value.producer()
    offsets = [step.affine.shift_from for step in steps if step.affine.shift_from is not None]
    if all(graphs.to_numpy(offset).size == 1 for offset in offsets) or conv is None:
        return None
    if any(step.node.op_type == "BatchNormalization" for step in steps) or not _takes_bias(conv):
        return None
    return steps[-1].node.outputs[0], steps[-1].axis


def _takes_bias(conv: ir.Node) -> bool:
    """Whether a Conv has a constant bias, or room for one."""
    given = conv.inputs[2] if len(conv.inputs) > 2 else None
    return given is None or graphs.constant_behind(given) is not None


def _fold_behind(graph: ir.Graph, conv: ir.Node) -> bool:
    weight = graphs.constant_behind(conv.inputs[1])
    if weight is None or not _takes_bias(conv):
        return False
    bias = graphs.constant_behind(conv.inputs[2]) if len(conv.inputs) > 2 else None
    array = graphs.to_numpy(weight)
    channels = len(array)
    steps = _chain(conv.outputs[0], channels, array.ndim)
    if not steps:
        return False
    affine = _Affine(np.ones(channels), np.zeros(channels), None)
    for step in steps:
        affine = affine.then(step.affine)
    scaled = array * affine.factor.reshape(-1, *[1] * (array.ndim - 1))
    shifted = (graphs.to_numpy(bias) if bias is not None else 0.0) * affine.factor + affine.shift
    named = affine.shift_from or bias
    conv.resize_inputs(2 if named is None else 3)
    for place, like, content in ((1, weight, scaled), (2, named, shifted)):
        if like is not None:
            name = graphs.unused_name(graph, f"{like.name}.folded")
            conv.replace_input_with(place, graphs.add_initializer(graph, name, content.astype(array.dtype)))
    end = steps[-1].node.outputs[0].name
    for step in steps:
        _leave_out(graph, step.node, step.reads)
    value = conv.outputs[0]
    while value.name != end:  # what a Transpose reads has other numbers now than what its name stands for in the file
        value.name = graphs.unused_name(graph, f"{value.name}.folded")
        (following,) = value.consumers()
        value = following.outputs[0]
    return True


def _leave_out(graph: ir.Graph, node: ir.Node, place: int) -> None:
    """What `node` reads, and nothing else does, takes the place and the name of what it writes."""
    replaced, kept = node.outputs[0], node.inputs[place]
    assert kept is not None
    name = replaced.name
    if replaced.is_graph_output():
        graph.outputs[graph.outputs.index(replaced)] = kept
        kept.shape, kept.type = replaced.shape, replaced.type
    replaced.replace_all_uses_with(kept)
    graph.remove(node, safe=True)
    kept.name = name


@dataclass(frozen=True)
class _Step:
    """A node that can be folded, the place of what it reads among its operands, and the axis of channels there."""

    node: ir.Node
    reads: int
    axis: int
    affine: _Affine


def _chain(value: ir.Value, channels: int, rank: int) -> list[_Step]:
    """What can be folded of all that comes behind `value` [N, channels, ...], each alone to read what is before it."""
    steps: list[_Step] = []
    axis, graph = 1, value.graph
    while len(value.uses()) == 1 and not value.is_graph_output():
        ((node, place),) = value.uses()
        if node.graph is not graph or node.domain not in ("", "ai.onnx"):
            break
        if node.op_type == "Transpose":
            axis = (graphs.ints(node, "perm") or list(reversed(range(rank)))).index(axis)
        elif (affine := _affine(node, place, axis, channels, rank)) is not None:
            steps.append(_Step(node, place, axis, affine))
        else:
            break
        value = node.outputs[0]
    return steps


def _affine(node: ir.Node, place: int, axis: int, channels: int, rank: int) -> _Affine | None:
    """What a node does to its operand at `place`, which has `channels` on that axis, where it is the same in each."""
    if node.op_type == "BatchNormalization":
        return _batchnorm(node) if (place, axis) == (0, 1) else None
    if node.op_type not in ("Mul", "Add", "Sub", "Div"):
        return None
    operand = graphs.constant_behind(node.inputs[1 - place])
    constant = None if operand is None else _by_channel(graphs.to_numpy(operand), axis, channels, rank)
    if constant is None:
        return None
    one, none = np.ones(channels), np.zeros(channels)
    match node.op_type, place:
        case "Mul", _:
            return _Affine(constant, none, None)
        case "Add", _:
            return _Affine(one, constant, operand)
        case "Sub", 0:
            return _Affine(one, -constant, operand)
        case "Sub", _:
            return _Affine(-one, constant, operand)
        case "Div", 0 if constant.all():
            return _Affine(1 / constant, none, None)
    return None


def _batchnorm(node: ir.Node) -> _Affine | None:
    parameters = [graphs.constant_behind(operand) for operand in node.inputs[1:5]]
    arrays = [graphs.to_numpy(operand).astype(np.float64) for operand in parameters if operand is not None]
    if len(arrays) < len(parameters) or graphs.integer(node, "training_mode", 0):
        return None
    gamma, beta, mean, variance = arrays
    epsilon = node.attributes.get("epsilon")
    factor = gamma / np.sqrt(variance + (epsilon.as_float() if epsilon else BATCHNORM_EPSILON))
    return _Affine(factor, beta - mean * factor, parameters[1])


def _by_channel(array: np.ndarray, axis: int, channels: int, rank: int) -> Channels | None:
    """A constant as one number a channel; None where it has more, or makes another shape of what it meets."""
    if array.ndim > rank or array.dtype.kind != "f":
        return None
    shape = [1] * (rank - array.ndim) + list(array.shape)
    if shape.pop(axis) not in (1, channels) or any(length != 1 for length in shape):
        return None
    return np.broadcast_to(array.astype(np.float64).ravel(), channels).copy()
