"""The layers of a file that any tool wrote: what each stores, which value of a reference it answers to, both computed.

Values are matched by name. Where a layer's own output has a name that the reference lacks, the first value after it
that both have stands for it, through what only biases, normalises, clips or quantizes. A name alone can mislead: a
quantizer that lets QuantizeLinear clip at 0 removes the Relu and gives its name to the layer, and some folders of
BatchNorm keep the name of the layer and some that of the BatchNorm; both are recognised by what writes the value.

Beside that: which layers' integers some processors cannot add up.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from converters import graphs
from converters.classifier import Classifier
from converters.runtime import Array, Session

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
MOST_PRODUCTS = 2**15 - 1
"""What two products may add up to where they are added in 16 bits (vpmaddubsw), before they saturate: those of 8-bit
inputs and weights of `targets.SAFE_BITS` do not."""
STEPS = QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
CLIPPING = ("Relu", "Clip")
MOVING = ("Cast", "Dropout", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")
"""Operators that convert or move numbers and compute none."""
FOLLOWING = ("BatchNormalization", QUANTIZE, DEQUANTIZE, *CLIPPING, *MOVING)
"""Operators that a layer's output is followed through to a value that the reference has."""

Values = Mapping[str, ir.Value]
Scales = tuple[float, float]


@dataclass(frozen=True)
class LayerValue:
    """A node with a constant weight in a candidate.

    `name` is what users know it by (`graphs.node_names`), `value` its output. `bits` is the least width for the
    integers that occur in the weight, `act_bits` that of the activation it reads; `scale` and `act_scale` are the
    smallest and the largest of their scales. None where they are float, scales also where the file computes them.
    `measured` and `reference` name the candidate's and the reference's value to compare, None where there is none.
    `reads` names the value that the layer's input is made of and the reference's for it, None where it is the image or
    has no counterpart.
    """

    name: str
    value: str
    op: str
    bits: int | None
    container: str
    """Type that the weight is stored in."""
    act_bits: int | None
    scale: Scales | None
    act_scale: Scales | None
    sparsity: float
    """Share of the weights that are zero."""
    measured: str | None
    reference: str | None
    reads: tuple[str, str] | None


def read_layers(candidate: Classifier, reference: Classifier) -> list[LayerValue]:
    """The layers of `candidate`, in order, with their counterparts in `reference`."""
    known = _float_values(reference.original.graph)
    names, found = graphs.node_names(candidate.original.graph), []
    for node, operand, weight in _layers(candidate.original.graph):
        bits, container, sparsity = _stored(*weight)
        value, data = node.outputs[0], node.inputs[1 - operand]
        pair, reads = _counterparts(value, known), _origin(data, known)
        found.append(
            LayerValue(
                name=names[node],
                value=str(value.name),
                op=node.op_type,
                bits=bits,
                container=container,
                act_bits=_activation_bits(data),
                scale=_scales(next((between for between in weight[0] if between.op_type in STEPS), None)),
                act_scale=_scales(_quantizer(data)),
                sparsity=sparsity,
                measured=pair and pair[0],
                reference=pair and pair[1],
                reads=reads,
            )
        )
    return found


def layers_on_their_own(candidate: Classifier, fed: Iterable[str]) -> set[str]:
    """Layers, by output, whose input depends on no other layer once the values `fed` are given."""
    given = set(fed)
    layers = {node: operand for node, operand, _ in _layers(candidate.original.graph)}
    alone = set()
    for layer, operand in layers.items():
        waiting, seen = [layer.inputs[1 - operand]], set()
        while waiting:
            value = waiting.pop()
            if value is None or value in seen or value.name in given:
                continue
            seen.add(value)
            node = value.producer()
            if node in layers:
                break
            waiting.extend(node.inputs if node is not None else ())
        else:
            alone.add(str(layer.outputs[0].name))
    return alone


class Tap:
    """Named values of a classifier's graph, from onnxruntime with graph optimisations off.

    `feeds` (name -> type) are values that are given instead of computed, for all that read them.
    """

    def __init__(
        self,
        classifier: Classifier,
        values: Iterable[str],
        feeds: Mapping[str, np.dtype[np.generic]] | None = None,
        *,
        threads: int = 0,
    ) -> None:
        probe = classifier.original.clone()
        graph = probe.graph
        named = {str(value.name): value for node in graph for value in node.outputs}
        self._feeds: dict[str, tuple[str, np.dtype[np.generic]]] = {}
        for name, kind in (feeds or {}).items():
            given = ir.Value(
                name=graphs.unused_name(graph, f"{name}.given"), type=ir.TensorType(ir.DataType.from_numpy(kind))
            )
            for node, index in list(named[name].uses()):
                node.replace_input_with(index, given)
            graph.inputs.append(given)
            self._feeds[name] = (str(given.name), kind)
        graphs.set_outputs(graph, values)
        common.RemoveUnusedNodesPass()(probe)
        self._session = Session(probe, optimise=False, threads=threads, name=str(classifier.path))

    def run(self, inputs: Array, batch: int, feeds: Mapping[str, Array] | None = None) -> dict[str, Array]:
        """The values for inputs [N, ...], `batch` at a time, by name, joined along the first axis.

        The last batch is filled up, and what was computed for that is cut off where the first axis goes with images.
        """
        feeds = feeds or {}
        parts: list[list[Array]] = []
        for start in range(0, len(inputs), batch):
            more = {
                self._feeds[name][0]: _part(array, len(inputs), start, batch).astype(self._feeds[name][1])
                for name, array in feeds.items()
            }
            parts.append(self._session.run(_part(inputs, len(inputs), start, batch), more=more))
        computed = len(parts) * batch
        joined = [np.concatenate(pieces) if len(pieces) > 1 else pieces[0] for pieces in zip(*parts, strict=True)]
        return {
            name: array[: len(array) // computed * len(inputs)] if array.ndim and len(array) % computed == 0 else array
            for name, array in zip(self._session.output_names, joined, strict=True)
        }


def _part(array: Array, images: int, start: int, batch: int) -> Array:
    """What `array`, that holds `images` images along its first axis, has for `batch` of them, the last one repeated."""
    if array.ndim == 0 or len(array) % images:  # its first axis does not go with images
        return array
    by_image = array.reshape(images, len(array) // images, *array.shape[1:])
    chosen = np.minimum(np.arange(start, start + batch), images - 1)
    return by_image[chosen].reshape(-1, *array.shape[1:])


def _layers(graph: ir.Graph) -> Iterator[tuple[ir.Node, int, tuple[list[ir.Node], ir.Value]]]:
    """Nodes with a constant weight: the node, the weight's operand position, and where the weight comes from."""
    for node in graph:
        if node.op_type not in LAYERS or len(node.inputs) < 2:
            continue
        behind = [_constant(value) for value in node.inputs[:2]]
        operand = 0 if node.op_type == "MatMul" and behind[0] is not None else 1
        weight = behind[operand]
        if weight is not None and behind[1 - operand] is None and graphs.to_numpy(weight[1]).ndim > 1:
            yield node, operand, weight


def saturating_layers(candidate: Classifier) -> list[str]:
    """Layers, by the value they write, whose integer kernel may saturate on x86 processors without VNNI.

    Those have quantized 8-bit inputs and INT8 weights of which two products with them may exceed `MOST_PRODUCTS`;
    kernels add 128 to signed inputs.
    """
    found = []
    for node, operand, (_, constant) in _layers(candidate.original.graph):
        integers, value = graphs.to_numpy(constant), node.inputs[1 - operand]
        quantizer = _quantizer(value)
        signed = quantizer is not None and _quantized_type(quantizer) == ir.DataType.INT8
        if integers.dtype == np.int8 and (signed or _activation_bits(value) == 8):
            largest = int(np.abs(integers.astype(np.int64)).max(initial=0))
            if 2 * 255 * largest > MOST_PRODUCTS:
                found.append(str(node.outputs[0].name))
    return found


def _constant(value: ir.Value | None) -> tuple[list[ir.Node], ir.Value] | None:
    """The constant that a value is made of, and the nodes between, the nearest to the value first."""
    between: list[ir.Node] = []
    while value is not None:
        if ir.convenience.get_const_tensor(value) is not None:
            return between, value
        node = value.producer()
        if node is None or node.op_type not in (QUANTIZE, DEQUANTIZE, *MOVING):
            return None
        between.append(node)
        value = node.inputs[0]
    return None


def _stored(between: Sequence[ir.Node], constant: ir.Value) -> tuple[int | None, str, float]:
    """Bits, container and share of zeros of a weight."""
    array, tensor = graphs.to_numpy(constant), ir.convenience.get_const_tensor(constant)
    assert tensor is not None  # `_constant` found it
    container = tensor.dtype.name.lower()
    quantizer = next((node for node in between if node.op_type == QUANTIZE), None)
    if quantizer is not None:  # of a float weight, at every run
        return _width(_quantized_type(quantizer)), container, _share(array == 0)
    dequantizer = next((node for node in between if node.op_type == DEQUANTIZE), None)
    if dequantizer is None:
        return None, container, _share(array == 0)
    integers = array.astype(np.int64)
    span = int(np.ptp(integers)) if integers.size else 0
    return max(1, span.bit_length()), container, _share(integers == _zero_points(dequantizer, integers))


def _scales(node: ir.Node | None) -> Scales | None:
    """The smallest and the largest scale of a QuantizeLinear or DequantizeLinear."""
    constant = graphs.constant_behind(node.inputs[1]) if node is not None and len(node.inputs) > 1 else None
    if constant is None:
        return None
    scale = graphs.to_numpy(constant)
    return (float(scale.min()), float(scale.max())) if scale.size else None


def _share(mask: NDArray[np.bool_]) -> float:
    return float(mask.mean()) if mask.size else 0.0


def _zero_points(node: ir.Node, integers: NDArray[np.int64]) -> NDArray[np.int64]:
    """The zero points of a DequantizeLinear in a shape that broadcasts with what it reads."""
    operand = node.inputs[2] if len(node.inputs) > 2 else None
    constant = graphs.constant_behind(operand)
    if constant is None:
        return np.zeros((), np.int64)
    zero = graphs.to_numpy(constant).astype(np.int64)
    if zero.size == 1:
        return zero.reshape(())
    axis, block = graphs.integer(node, "axis", 1) % integers.ndim, graphs.integer(node, "block_size", 0)
    if block:
        return zero.repeat(block, axis).take(np.arange(integers.shape[axis]), axis)
    return zero.reshape([-1 if other == axis else 1 for other in range(integers.ndim)])


def _quantized_type(node: ir.Node) -> ir.DataType:
    """The type that a QuantizeLinear writes."""
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    if zero is not None and zero.dtype is not None:
        return zero.dtype
    return ir.DataType(graphs.integer(node, "output_dtype", 0) or ir.DataType.UINT8)


def _width(kind: ir.DataType) -> int:
    return round(8 * kind.itemsize)


def _quantizer(value: ir.Value | None) -> ir.Node | None:
    """The QuantizeLinear that an activation comes from, through what leaves its numbers on the grid."""
    node = value.producer() if value is not None else None
    while node is not None and node.op_type in (DEQUANTIZE, "MaxPool", *MOVING):
        source = node.inputs[0]
        node = source.producer() if source is not None else None
    return node if node is not None and node.op_type == QUANTIZE else None


def _activation_bits(value: ir.Value | None) -> int | None:
    """Bits of a layer's input: what its QuantizeLinear writes, fewer where a Clip before it leaves fewer steps."""
    node = _quantizer(value)
    if node is None:
        return None
    width = _width(_quantized_type(node))
    clip = node.inputs[0].producer() if node.inputs[0] is not None else None
    scale = graphs.constant_behind(node.inputs[1])
    if clip is None or clip.op_type != "Clip" or scale is None or len(clip.inputs) < 3:
        return width
    bounds = [graphs.constant_behind(bound) for bound in clip.inputs[1:3]]
    step = graphs.to_numpy(scale)
    if bounds[0] is None or bounds[1] is None or step.size != 1:
        return width
    low, high = (float(graphs.to_numpy(bound).reshape(())) for bound in bounds if bound is not None)
    steps = (high - low) / float(step.reshape(()))
    return min(width, max(1, round(steps).bit_length())) if np.isfinite(steps) else width


def _float_values(graph: ir.Graph) -> dict[str, ir.Value]:
    """Values that nodes write, by name, integers of QuantizeLinear left out."""
    return {str(v.name): v for node in graph if node.op_type != QUANTIZE for v in node.outputs if v.name}


def _made_by(value: ir.Value) -> str:
    node = value.producer()
    return "" if node is None else node.op_type


def _counterparts(value: ir.Value, known: Values) -> tuple[str, str] | None:
    """Names of the candidate's and the reference's value to compare for a layer that writes `value`."""
    while value.name not in known or _made_by(value) == QUANTIZE:
        after = next((node for node, index in value.uses() if _is_followed(node, index)), None)
        if after is None:
            return None
        value = after.outputs[0]
    other = known[str(value.name)]
    here, there = _made_by(value), _made_by(other)
    if there in CLIPPING and here not in (*CLIPPING, DEQUANTIZE):  # the clipping went into a QuantizeLinear
        other = _input(other)
    elif here in CLIPPING and there in LAYERS:  # the same in the reference
        value = _input(value)
    else:
        other = _normalised(value, other)
    return (str(value.name), str(other.name)) if str(other.name) in known else None


def _origin(value: ir.Value | None, known: Values) -> tuple[str, str] | None:
    """The value that a layer's input is made of, before it is quantized, and the name of the reference's for it."""
    quantizer = _quantizer(value)
    value = value if quantizer is None else quantizer.inputs[0]
    while value is not None and value.name not in known:
        node = value.producer()
        if node is None or node.op_type not in ("Clip", *MOVING):  # a Clip that narrows the bits
            return None
        value = node.inputs[0]
    if value is None:
        return None
    other = known[str(value.name)]
    if _made_by(value) in CLIPPING and _made_by(other) in LAYERS:  # the reference's is not clipped yet
        return None
    return str(value.name), str(_normalised(value, other).name)


def _is_followed(node: ir.Node, index: int) -> bool:
    if node.op_type == "Add":  # a bias
        return len(node.inputs) == 2 and _constant(node.inputs[1 - index]) is not None
    return index == 0 and node.op_type in FOLLOWING


def _input(value: ir.Value) -> ir.Value:
    """What the node that writes `value` reads first."""
    node = value.producer()
    source = node.inputs[0] if node is not None else None
    return value if source is None else source


def _normalised(value: ir.Value, other: ir.Value) -> ir.Value:
    """`other`, or what BatchNormalization makes of it where the candidate's layer has that folded in."""
    norms = [_norm_after(value), _norm_after(other)]
    folded = norms[0] is None and norms[1] is not None and {_made_by(value), _made_by(other)} <= set(LAYERS)
    return norms[1].outputs[0] if folded and norms[1] is not None else other


def _norm_after(value: ir.Value) -> ir.Node | None:
    """The BatchNormalization of a value, or of what quantization makes of it."""
    readers = [node for node, index in value.uses() if index == 0]
    while readers:
        norm = next((node for node in readers if node.op_type == "BatchNormalization"), None)
        if norm is not None:
            return norm
        between = [node.outputs[0] for node in readers if node.op_type in (QUANTIZE, DEQUANTIZE)]
        readers = [node for quantized in between for node, index in quantized.uses() if index == 0]
    return None
