"""One number type: what is stored or computed in 16, 64 or a few bits becomes float32.

Inversion and reconstruction compute in float32 whatever the file says, so 16-bit and double tensors are widened (or
narrowed) where they are stored, casts to them become casts to float32, and integer weights behind a DequantizeLinear
become the real numbers that they stand for. Values are converted when they are read; nothing is held twice.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from converters import graphs

HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
OTHER_FLOATS = (*HALVES, ir.DataType.DOUBLE)
FLOATS = (ir.DataType.FLOAT, *OTHER_FLOATS)
IMAGE_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE, ir.DataType.UINT8)
"""Types that an image input may have: what numpy has, and onnxruntime takes from it."""

OWN_DOMAIN = "mixmix"
"""Of operators that stand in the normalised graph alone, and in no file."""

RESIZES = ("Resize", "Upsample")

FEW_BITS = {
    ir.DataType.INT4: ir.DataType.INT8,
    ir.DataType.UINT4: ir.DataType.UINT8,
    ir.DataType.INT2: ir.DataType.INT8,
    ir.DataType.UINT2: ir.DataType.UINT8,
}
"""Integer types that torch does not have, and the wider ones that hold their values."""


def uses_other_floats(model: ir.Model) -> bool:
    """Whether anything is stored or computed in a float type other than float32."""
    values = [*model.graph.initializers.values(), *model.graph.inputs, *model.graph.outputs]
    stored = any(value.dtype in OTHER_FLOATS or _type_of(value) in OTHER_FLOATS for value in values)
    return stored or any(_names_other_float(node) for node in model.graph.all_nodes())


def computes_in_halves(model: ir.Model) -> bool:
    """Whether a layer multiplies in 16-bit floats: its weight is read as it is stored, without a Cast between."""
    layers = [node for node in model.graph.all_nodes() if node.op_type in ("Conv", "Gemm", "MatMul")]
    operands = [value for node in layers for value in node.inputs if value is not None]
    return any(value.dtype in HALVES or _type_of(value) in HALVES for value in operands)


def _type_of(value: ir.Value) -> ir.DataType | None:
    return value.const_value.dtype if value.const_value is not None else None


def _names_other_float(node: ir.Node) -> bool:
    return any(
        (attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype in OTHER_FLOATS)
        or (name in ("to", "dtype", "output_dtype") and attribute.value in OTHER_FLOATS)
        for name, attribute in node.attributes.items()
    )


def to_float32(model: ir.Model) -> bool:
    """Store and compute everything in float32, the image and the outputs too."""
    if not uses_other_floats(model):
        return False
    for value in model.graph.initializers.values():
        if value.const_value is not None and value.const_value.dtype in OTHER_FLOATS:
            value.const_value = _as_float32(value.const_value)
            value.type = ir.TensorType(ir.DataType.FLOAT)
    for node in model.graph.all_nodes():
        for name, attribute in list(node.attributes.items()):
            if attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype in OTHER_FLOATS:
                node.attributes[name] = ir.AttrTensor(name, _as_float32(attribute.value))
            elif name in ("to", "dtype", "output_dtype") and attribute.value in OTHER_FLOATS:
                node.attributes[name] = ir.AttrInt64(name, ir.DataType.FLOAT.value)
    for value in (*model.graph.inputs, *(v for node in model.graph for v in node.outputs)):
        if value.dtype in OTHER_FLOATS:
            value.type = ir.TensorType(ir.DataType.FLOAT)
    return True


def to_float32_inside(model: ir.Model) -> bool:
    """The same, but the image and the outputs keep the types that the file gave them, by a Cast at either end."""
    graph = model.graph
    image = graphs.image_input(graph)
    outside = {value: value.dtype for value in [image, *graph.outputs] if value.dtype in OTHER_FLOATS}
    if not to_float32(model):
        return False
    for value, dtype in outside.items():
        assert dtype is not None
        if value is image:
            image.type = ir.TensorType(dtype)
            readers = list(image.uses())
            widened = _cast(graph, image, ir.DataType.FLOAT, f"{image.name}.float32")
            graph.insert_before(next(iter(graph)), widened)
            for node, index in readers:
                node.replace_input_with(index, widened.outputs[0])
            continue
        name, producer = value.name, value.producer()
        assert producer is not None
        value.name = graphs.unused_name(graph, f"{name}.float32")
        narrowed = _cast(graph, value, dtype, str(name))
        narrowed.outputs[0].shape = value.shape
        graph.insert_after(producer, narrowed)
        graph.outputs[graph.outputs.index(value)] = narrowed.outputs[0]
    return True


def _cast(graph: ir.Graph, value: ir.Value, dtype: ir.DataType, name: str) -> ir.Node:
    node = ir.node("Cast", [value], attributes={"to": dtype.value}, name=f"{name}/Cast")
    node.outputs[0].name = graphs.unused_name(graph, name)
    node.outputs[0].type = ir.TensorType(dtype)
    return node


def _as_float32(tensor: ir.TensorProtocol) -> ir.LazyTensor:
    return _lazily(lambda: tensor.numpy().astype(np.float32), graphs.shape_of(tensor), tensor.name)


def _lazily(read: Callable[[], np.ndarray], shape: ir.Shape, name: str | None) -> ir.LazyTensor:
    """A float32 tensor that is computed whenever it is read."""
    kind = ir.DataType.FLOAT
    return ir.LazyTensor(lambda: ir.Tensor(np.ascontiguousarray(read())), dtype=kind, shape=shape, name=name)


def image_is_float(model: ir.Model) -> bool:
    """An image input of bytes becomes one of floats that hold the same whole numbers, and so what is computed in bytes.

    After constants are folded: the Cast that makes floats of bytes would be taken for one of floats, and removed, and
    its output is what a layer reads that can be quantized. What a linear Resize computes between bytes is cut off to
    whole numbers, as onnxruntime does where it does not smooth before (`antialias`).
    """
    image = graphs.image_input(model.graph)
    if image.dtype != ir.DataType.UINT8:
        return False
    waiting = [image]
    while waiting:
        value = waiting.pop()
        value.type = ir.TensorType(ir.DataType.FLOAT)
        waiting += [out for node, _ in value.uses() for out in node.outputs if out.dtype == ir.DataType.UINT8]
        node = value.producer()
        if node is not None and _cuts_off(node):
            _cut_off(model, node)
    return True


def _cuts_off(node: ir.Node) -> bool:
    """Whether a node makes bytes of what lies between bytes by leaving their fractions out."""
    linear = node.op_type in RESIZES and graphs.text(node, "mode") == "linear"
    return linear and not graphs.integer(node, "antialias", 0)


def _cut_off(model: ir.Model, node: ir.Node) -> None:
    """Let whoever reads the node's output read what is left of it without fractions."""
    model.opset_imports[OWN_DOMAIN] = 1
    value = node.outputs[0]
    readers = list(value.uses())
    whole = ir.node("Truncate", [value], domain=OWN_DOMAIN, name=f"{node.name}/Truncate")
    whole.outputs[0].name = graphs.unused_name(model.graph, f"{value.name}.whole")
    whole.outputs[0].type, whole.outputs[0].shape = value.type, value.shape
    for reader, index in readers:
        reader.replace_input_with(index, whole.outputs[0])
    model.graph.insert_after(node, whole)


def dequantize_constants(model: ir.Model) -> bool:
    """DequantizeLinear of constants becomes an initializer of the real numbers, under the name of its output."""
    changed = False
    for node in list(model.graph):
        operands = [graphs.constant_behind(value) for value in node.inputs]
        if node.op_type != "DequantizeLinear" or None in operands or node.outputs[0].is_graph_output():
            continue
        quantized, *parameters = (value for value in operands if value is not None)
        axis, block = graphs.integer(node, "axis", 1), graphs.integer(node, "block_size", 0)
        real, output = _dequantized(quantized, parameters, axis, block), node.outputs[0]
        name = str(output.name)
        output.name = graphs.unused_name(model.graph, f"{name}.quantized")
        constant = graphs.add_initializer(model.graph, name, real)
        output.replace_all_uses_with(constant)
        model.graph.remove(node, safe=True)
        changed = True
    return changed


def _dequantized(quantized: ir.Value, parameters: list[ir.Value], axis: int, block: int) -> ir.LazyTensor:
    """(q - zero point) * scale: per tensor, per channel of `axis`, or per `block` of `axis`."""
    tensor = ir.convenience.get_const_tensor(quantized)
    assert tensor is not None
    shape = graphs.shape_of(tensor)
    rank = len(shape)

    def spread(values: np.ndarray, length: int) -> np.ndarray:
        if block and values.ndim == rank:
            return values.repeat(block, axis).take(range(length), axis)
        return values.reshape([-1 if a == axis % rank else 1 for a in range(rank)]) if values.ndim else values

    def read() -> np.ndarray:
        integers = graphs.to_numpy(quantized).astype(np.float32)
        length = integers.shape[axis % rank] if rank else 1  # the default axis is 1, also where there is only one
        scale, *zero = (spread(graphs.to_numpy(value).astype(np.float32), length) for value in parameters)
        return ((integers - zero[0] if zero else integers) * scale).astype(np.float32)

    return _lazily(read, shape, None)


def widen_few_bits(model: ir.Model) -> bool:
    """QuantizeLinear to 4 or 2 bits becomes a Clip to what they hold, and 8 bits: torch has no narrower type."""
    changed = False
    for node in list(model.graph):
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear") or len(node.inputs) < 3:
            continue
        scale, zero = (graphs.constant_behind(value) for value in node.inputs[1:3])
        narrow = None if zero is None else ir.convenience.get_const_tensor(zero)
        if scale is None or zero is None or narrow is None or narrow.dtype not in FEW_BITS:
            continue
        wide = FEW_BITS[narrow.dtype]
        point, step = narrow.numpy().astype(np.int32), graphs.to_numpy(scale).astype(np.float32)
        if node.op_type == "QuantizeLinear":
            signed = narrow.dtype in (ir.DataType.INT4, ir.DataType.INT2)
            low = -(2 ** (narrow.dtype.bitwidth - 1)) if signed else 0
            bounds = [(low - point) * step, (low + 2**narrow.dtype.bitwidth - 1 - point) * step]
            if not all(bound.size == 1 for bound in bounds):
                continue  # per channel, which no exporter writes for activations: the conversion will name the node
            named = [
                graphs.add_initializer(
                    model.graph,
                    graphs.unused_name(model.graph, f"{node.outputs[0].name}.{end}"),
                    np.array(bound, np.float32).reshape(()),
                )
                for end, bound in zip(("low", "high"), bounds, strict=True)
            ]
            clip = ir.node("Clip", [node.inputs[0], *named], name=f"{node.name}/Clip")
            clip.outputs[0].name = graphs.unused_name(model.graph, f"{node.outputs[0].name}.clipped")
            model.graph.insert_before(node, clip)
            node.replace_input_with(0, clip.outputs[0])
            node.attributes.pop("output_dtype", None)
        name = graphs.unused_name(model.graph, f"{zero.name}.wide")
        node.replace_input_with(2, graphs.add_initializer(model.graph, name, np.asarray(point, wide.numpy())))
        changed = True
    return changed
