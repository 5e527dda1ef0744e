"""Classifiers that are hard to convert, one for each thing that is hard about them.

    python -m tests.hard_cases FOLDER          # writes them as files, FOLDER/NAME.onnx

Most have the case between a Conv and a head: image -Conv-> features -> the case -> out -pool, Gemm-> logits.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests import models
from tests.models import node

Build = Callable[[], onnx.ModelProto]
WIDTH = 8  # channels of `features`, whose sides are those of the image
MAP = (WIDTH, models.SIDE, models.SIDE)
HALF, DOUBLE = TensorProto.FLOAT16, TensorProto.DOUBLE


def between(
    *nodes: onnx.NodeProto, width: int = WIDTH, opset: int = 17, image: models.Shape = models.IMAGE, **tensors: Any
) -> onnx.ModelProto:
    """A Conv to `features` [N, 8, H, W], the nodes to `out` of `width` channels, and a head."""
    first = node("Conv", "image conv.weight conv.bias", "features", pads=[1, 1, 1, 1])
    given = {"conv.weight": models.weights(WIDTH, int(image[1]), 3, 3), "conv.bias": 0.1 * models.random(WIDTH, seed=1)}
    return models.assemble(
        [first, *nodes, *models.head("out")],
        {**given, **tensors, **models.head_tensors(width)},
        inputs={"image": image},
        opset=opset,
    )


def one(op: str, operands: str = "features", *, width: int = WIDTH, opset: int = 17, **given: Any) -> onnx.ModelProto:
    """A single node between Conv and head; arrays are initializers, everything else is an attribute."""
    tensors = {name: value for name, value in given.items() if isinstance(value, np.ndarray)}
    attributes = {name: value for name, value in given.items() if name not in tensors}
    return between(node(op, operands, "out", **attributes), width=width, opset=opset, **tensors)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def floats(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def vector(seed: int, size: int = WIDTH) -> np.ndarray:
    return 1 + 0.3 * models.random(size, seed=seed)


def attention_by_hand() -> onnx.ModelProto:
    """Two heads over the pixels of the map as tokens, as exporters write it."""
    return between(
        node("Reshape", "features tokens", "line"),
        node("Transpose", "line", "rows", perm=[0, 2, 1]),
        node("MatMul", "rows qkv", "all"),
        node("Reshape", "all heads", "apart"),
        node("Transpose", "apart", "turned", perm=[2, 0, 3, 1, 4]),
        node("Split", "turned", "q0 k0 v0", axis=0, num_outputs=3),
        *(node("Squeeze", f"{name}0 first", name) for name in "qkv"),
        node("Transpose", "k", "kt", perm=[0, 1, 3, 2]),
        node("MatMul", "q kt", "products"),
        node("Mul", "products scale", "scaled"),
        node("Softmax", "scaled", "shares", axis=-1),
        node("MatMul", "shares v", "mixed"),
        node("Transpose", "mixed", "back", perm=[0, 2, 1, 3]),
        node("Reshape", "back joined", "tokens_out"),
        node("Transpose", "tokens_out", "channels", perm=[0, 2, 1]),
        node("Reshape", "channels map", "out"),
        opset=18,
        tokens=ints(0, WIDTH, -1),
        qkv=models.weights(WIDTH, 3 * WIDTH, seed=5, fan_in=WIDTH),
        heads=ints(0, -1, 3, 2, WIDTH // 2),
        first=ints(0),
        scale=np.float32(0.5),
        joined=ints(0, -1, WIDTH),
        map=ints(-1, *MAP),
    )


def attention_fused() -> onnx.ModelProto:
    """The Attention operator of opset 23 on the pixels as tokens, two heads by attribute."""
    return between(
        node("Reshape", "features tokens", "line"),
        node("Transpose", "line", "rows", perm=[0, 2, 1]),
        *(node("MatMul", f"rows {name}.weight", name) for name in ("query", "key", "value")),
        node("Attention", "query key value", "mixed", q_num_heads=2, kv_num_heads=2),
        node("Transpose", "mixed", "channels", perm=[0, 2, 1]),
        node("Reshape", "channels map", "out"),
        opset=23,
        tokens=ints(0, WIDTH, -1),
        map=ints(-1, *MAP),
        **{
            f"{name}.weight": models.weights(WIDTH, WIDTH, seed=seed)
            for seed, name in enumerate(("query", "key", "value"))
        },
    )


def local_function() -> onnx.ModelProto:
    """A function of the model, with an attribute of its own, that holds the activation."""
    model = between(node("Bent", "features", "out", domain="local", slope=0.2))
    relu = helper.make_node("LeakyRelu", ["x"], ["y"])
    relu.attribute.append(onnx.AttributeProto(name="alpha", ref_attr_name="slope", type=onnx.AttributeProto.FLOAT))
    opsets = [helper.make_opsetid("", 17)]
    model.functions.append(helper.make_function("local", "Bent", ["x"], ["y"], [relu], opsets, ["slope"]))
    return model


def constant_if() -> onnx.ModelProto:
    """An If whose condition is the rank of the map, as scripted models have it."""
    branches = {
        "then_branch": helper.make_graph(
            [helper.make_node("Relu", ["features"], ["a"])], "then", [], [onnx.ValueInfoProto(name="a")]
        ),
        "else_branch": helper.make_graph(
            [helper.make_node("Neg", ["features"], ["b"])], "else", [], [onnx.ValueInfoProto(name="b")]
        ),
    }
    return between(
        node("Shape", "features", "shape"),
        node("Size", "shape", "rank"),
        node("Equal", "rank four", "condition"),
        node("If", "condition", "out", **branches),
        four=np.array(4, np.int64),
    )


def resize_to_sizes() -> onnx.ModelProto:
    """A fixed batch of 1, which stands in the sizes of a Resize too."""
    return between(
        node("Resize", "features - - sizes", "out", mode="linear", coordinate_transformation_mode="asymmetric"),
        image=(1, *models.IMAGE[1:]),
        sizes=ints(1, WIDTH, 12, 5),
    )


def weights_in_nodes() -> onnx.ModelProto:
    """Every weight in a Constant node in front, as PaddlePaddle's exporter writes them."""
    model = models.batchnorm()
    constants = [node("Constant", "", tensor.name, value=tensor) for tensor in model.graph.initializer]
    nodes = [*constants, *model.graph.node]
    del model.graph.initializer[:], model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def tensorflow() -> onnx.ModelProto:
    """As TensorFlow's exporter writes a MobileNet: channels last outside, BatchNorm as Mul and Add behind a depthwise
    convolution and as a bias elsewhere, padding as a node, and what it could not transpose in between."""
    side = models.SIDE
    nodes = [
        node("Transpose", "image", "planes", perm=[0, 3, 1, 2]),
        node("Pad", "planes pads", "wide"),
        node("Conv", "wide first.weight first.bias", "first", strides=[2, 2]),
        node("Clip", "first zero six", "first.active"),
        node("Conv", "first.active deep.weight", "deep", group=WIDTH, pads=[1, 1, 1, 1]),
        node("Mul", "deep scale", "deep.scaled"),
        node("Add", "deep.scaled shift", "deep.normed"),
        node("Clip", "deep.normed zero six", "deep.active"),
        node("Conv", "deep.active last.weight", "last"),
        node("Transpose", "last", "last.rows", perm=[0, 2, 3, 1]),
        node("Add", "last.rows rows.shift", "last.normed"),
        node("Transpose", "last.normed", "last.planes", perm=[0, 3, 1, 2]),
        node("Add", "first.active last.planes", "sum"),
        node("GlobalAveragePool", "sum", "pooled"),
        node("Squeeze", "pooled axes", "flat"),
        node("MatMul", "flat head.weight", "scores"),
        node("Add", "scores head.bias", "biased"),
        node("Softmax", "biased", "logits"),
    ]
    tensors = {
        "pads": ints(0, 0, 0, 0, 0, 0, 1, 1),
        "axes": ints(2, 3),
        "zero": np.float32(0),
        "six": np.float32(6),
        "first.weight": models.weights(WIDTH, models.CHANNELS, 3, 3),
        "first.bias": vector(1),
        "deep.weight": models.weights(WIDTH, 1, 3, 3),
        "scale": vector(2).reshape(1, -1, 1, 1),
        "shift": vector(3).reshape(1, -1, 1, 1),
        "last.weight": models.weights(WIDTH, WIDTH, 1, 1),
        "rows.shift": vector(4),
        "head.weight": models.weights(WIDTH, models.CLASSES),
        "head.bias": models.random(models.CLASSES, seed=5),
    }
    return models.assemble(nodes, tensors, inputs={"image": ("batch", side, side, models.CHANNELS)})


def paddlepaddle() -> onnx.ModelProto:
    """As PaddlePaddle's exporter ends a network: flattened by computed sizes, and a MatMul and the Add of a bias."""
    nodes = [
        node("Conv", "image conv.weight", "features"),
        node("Relu", "features", "active"),
        node("GlobalAveragePool", "active", "pooled"),
        node("Shape", "pooled", "shape"),
        node("Slice", "shape start end axes", "batch"),
        node("Concat", "batch rest", "sizes", axis=0),
        node("Reshape", "pooled sizes", "flat"),
        node("MatMul", "flat head.weight", "scores"),
        node("Add", "scores head.bias", "sum"),
        node("Identity", "sum", "logits"),
    ]
    tensors = {
        "conv.weight": models.weights(WIDTH, models.CHANNELS, 3, 3),
        "start": ints(0),
        "end": ints(1),
        "axes": ints(0),
        "rest": ints(-1),
        "head.weight": models.weights(WIDTH, models.CLASSES),
        "head.bias": models.random(models.CLASSES, seed=5),
    }
    return models.assemble(nodes, tensors)


def transposed_weight() -> onnx.ModelProto:
    """A MatMul behind a Transpose of the weight, as an exporter without constant folding writes a linear layer."""
    nodes = [
        node("Flatten", "image", "flat"),
        node("Transpose", "fc.weight", "turned", perm=[1, 0]),
        node("MatMul", "flat turned", "logits"),
    ]
    return models.assemble(nodes, {"fc.weight": models.weights(models.CLASSES, models.PIXELS)})


def weight_first() -> onnx.ModelProto:
    """A MatMul with the weight as first operand: it mixes the channels of a map of [N, C, H * W]."""
    return between(
        node("Reshape", "features rows", "line"),
        node("MatMul", "mix line", "mixed"),
        node("Reshape", "mixed map", "out"),
        rows=ints(0, WIDTH, -1),
        mix=models.weights(WIDTH, WIDTH, seed=4),
        map=ints(-1, *MAP),
    )


def in_type(kind: int) -> onnx.ModelProto:
    """Image, weights and logits in another float type; onnxruntime has no Conv in double."""
    model = models.gemm(trans_b=1) if kind == DOUBLE else models.conv()
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    for tensor in model.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(dtype), tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = kind
    return model


def bytes_in() -> onnx.ModelProto:
    """uint8 pixels [N, H, W, C], cast and transposed in the graph."""
    nodes = [
        node("Cast", "image", "numbers", to=TensorProto.FLOAT),
        node("Transpose", "numbers", "upright", perm=[0, 3, 1, 2]),
        node("Mul", "upright scale", "scaled"),
        node("Conv", "scaled conv.weight", "features"),
        *models.head("features"),
    ]
    image = ("batch", models.SIDE, models.SIDE, models.CHANNELS)
    tensors = {"scale": np.float32(1 / 255), "conv.weight": models.weights(4, models.CHANNELS, 3, 3)}
    model = models.assemble(nodes, {**tensors, **models.head_tensors(4)}, inputs={"image": image})
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8
    return model


def label_only() -> onnx.ModelProto:
    """Softmax and ArgMax: the label is all that the file gives."""
    tensors = {"fc.weight": models.weights(models.CLASSES, models.PIXELS)}
    nodes = [
        *models.linear("scores"),
        node("Softmax", "scores", "shares", axis=1),
        node("ArgMax", "shares", "label", axis=1),
    ]
    model = models.assemble(nodes, tensors, outputs={"label": ("batch", 1)})
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.INT64
    return model


def two_outputs() -> onnx.ModelProto:
    """Logits, and the features before them."""
    tensors = {"fc.weight": models.weights(models.CLASSES, models.PIXELS)}
    return models.assemble(
        models.linear(), tensors, outputs={"flat": ("batch", models.PIXELS), "logits": models.LOGITS}
    )


def open_sides() -> onnx.ModelProto:
    """Height and width left open; the network ends in global pooling, so 224 x 224 is assumed."""
    return models.conv(image=("batch", models.CHANNELS, "height", "?"))


def quantized() -> onnx.ModelProto:
    """An image that is rounded to 8 bits, behind a Conv whose weight is stored in 8 bits."""
    integers = np.random.default_rng(0).integers(-127, 128, (WIDTH, WIDTH, 3, 3)).astype(np.int8)
    return between(
        node("QuantizeLinear", "features step zero", "few"),
        node("DequantizeLinear", "few step zero", "rounded"),
        node("DequantizeLinear", "weight.q weight.scale weight.zero", "weight", axis=0),
        node("Conv", "rounded weight", "out"),
        step=np.float32(0.05),
        zero=np.array(3, np.int8),
        **{
            "weight.q": integers,
            "weight.scale": np.full(WIDTH, 0.002, np.float32),
            "weight.zero": np.zeros(8, np.int8),
        },
    )


CASES: dict[str, Build] = {
    "pads_asymmetric": lambda: models.conv(pads=[0, 1, 2, 3]),
    "pads_same_upper": lambda: models.conv(auto_pad="SAME_UPPER", strides=[2, 2]),
    "pads_same_lower": lambda: models.conv(auto_pad="SAME_LOWER", strides=[2, 1]),
    "pool_ceil": lambda: one("MaxPool", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1),
    "pool_average_ceil": lambda: one("AveragePool", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1, opset=19),
    "pool_count_pads": lambda: one("AveragePool", kernel_shape=[3, 3], pads=[0, 1, 1, 0], count_include_pad=1),
    "pool_same": lambda: one("AveragePool", kernel_shape=[2, 2], auto_pad="SAME_UPPER"),
    "pool_lp": lambda: one("LpPool", kernel_shape=[2, 2], strides=[2, 2], p=2),
    "conv_depthwise": models.depthwise,
    "conv_grouped_dilated": lambda: one(
        "Conv", "features w", w=models.weights(WIDTH, 4, 3, 3), group=2, dilations=[2, 1]
    ),
    "conv_transpose": lambda: one(
        "ConvTranspose",
        "features w",
        w=models.weights(WIDTH, 4, 3, 3),
        group=2,
        strides=[2, 2],
        pads=[1, 0, 1, 1],
        output_padding=[1, 0],
    ),
    "lrn": lambda: one("LRN", size=3, alpha=0.1, beta=0.75, bias=2.0),
    "instance_norm": lambda: one("InstanceNormalization", "features a b", a=vector(2), b=vector(3)),
    "group_norm": lambda: one("GroupNormalization", "features a b", a=vector(2), b=vector(3), num_groups=4, opset=21),
    "layer_norm": lambda: one("LayerNormalization", "features a b", a=vector(2), b=vector(3), axis=-1),
    "rms_norm": lambda: one("RMSNormalization", "features a", a=vector(2), axis=-1, opset=23),
    "gelu": lambda: one("Gelu", opset=20),
    "gelu_tanh": lambda: one("Gelu", approximate="tanh", opset=20),
    "hard_swish": lambda: one("HardSwish"),
    "mish": lambda: one("Mish", opset=18),
    "prelu": lambda: one("PRelu", "features a", a=0.2 * vector(2).reshape(-1, 1, 1)),
    "softplus": lambda: one("Softplus"),
    "swish": lambda: one("Swish", alpha=1.5, opset=24),
    "einsum": lambda: one(
        "Einsum", "features w", w=models.weights(WIDTH, 4, fan_in=WIDTH), equation="nchw,cd->ndhw", width=4
    ),
    "attention_by_hand": attention_by_hand,
    "attention_fused": attention_fused,
    "gather": lambda: one("Gather", "features at", at=ints(7, -1, 0, 2), axis=1, width=4),
    "gather_nd": lambda: between(
        node("Transpose", "features", "first", perm=[1, 0, 2, 3]),
        node("GatherND", "first at", "taken"),
        node("Transpose", "taken", "out", perm=[1, 0, 2, 3]),
        width=3,
        at=ints(3, 1, 7).reshape(3, 1),
    ),
    "slice_backwards": lambda: one(
        "Slice", "features start end axes step", start=ints(-1), end=ints(-99), axes=ints(1), step=ints(-2), width=4
    ),
    "slice_attributes": lambda: one("Slice", starts=[1], ends=[5], axes=[1], width=4, opset=9),
    "split": models.split,
    "split_uneven": lambda: between(
        node("Split", "features", "a b c", axis=1, num_outputs=3),
        node("Concat", "c a", "out", axis=1),
        width=5,
        opset=18,
    ),
    "resize_cubic": lambda: one("Resize", "features - scales", scales=floats(1, 1, 1.5, 2), mode="cubic"),
    "resize_linear_antialias": lambda: one(
        "Resize", "features - scales", scales=floats(1, 1, 0.5, 0.75), mode="linear", antialias=1, opset=18
    ),
    "resize_nearest": lambda: one("Resize", "features - scales", scales=floats(1, 1, 0.5, 1.3), mode="nearest"),
    "resize_to_sizes_of_a_fixed_batch": resize_to_sizes,
    "upsample": lambda: one("Upsample", "features scales", scales=floats(1, 1, 2, 2), mode="nearest", opset=9),
    "depth_to_space": lambda: one("DepthToSpace", blocksize=2, mode="CRD", width=2),
    "space_to_depth": lambda: one("SpaceToDepth", blocksize=2, width=32),
    "where": lambda: between(
        node("Greater", "features zero", "positive"),
        node("Where", "positive features slope", "out"),
        zero=np.float32(0),
        slope=np.float32(-0.1),
    ),
    "trilu_and_range": lambda: between(
        node("Shape", "features", "shape"),
        node("Gather", "shape last", "side", axis=0),
        node("Range", "zero side one", "places"),
        node("Cast", "places", "ramp", to=TensorProto.FLOAT),
        node("Mul", "features ramp", "tilted"),
        node("Trilu", "tilted", "out", upper=0),
        last=np.array(3, np.int64),
        zero=np.array(0, np.int64),
        one=np.array(1, np.int64),
    ),
    "quantized": quantized,
    "local_function": local_function,
    "constant_if": constant_if,
    "float16": lambda: in_type(HALF),
    "float64": lambda: in_type(DOUBLE),
    "float16_weight": models.half_weight,
    "bfloat16_weight": lambda: models.half_weight(TensorProto.BFLOAT16),
    "fixed_batch": models.fixed_batch,
    "fixed_batch_reshaped": lambda: models.fixed_batch(reshape=[1, models.PIXELS]),
    "bytes_in": bytes_in,
    "softmax": models.softmax,
    "log_softmax": lambda: models.softmax("LogSoftmax", behind_identity=True),
    "two_outputs": two_outputs,
    "label_only": label_only,
    "gray": lambda: between(node("Relu", "features", "out"), image=("batch", 1, 8, 8)),
    "seven_channels": lambda: between(node("Relu", "features", "out"), image=("batch", 7, 8, 8)),
    "wide_image": lambda: between(node("Relu", "features", "out"), image=("batch", 3, 6, 20)),
    "open_sides": open_sides,
    "weights_in_nodes": weights_in_nodes,
    "tensorflow": tensorflow,
    "paddlepaddle": paddlepaddle,
    "weight_behind_identity": models.hidden_weight,
    "weight_shared": models.shared_weight,
    "weight_transposed": transposed_weight,
    "weight_first": weight_first,
    "gemm_rows": lambda: models.gemm(trans_b=0),
    "matmul": models.matmul,
}


def write_all(folder: Path) -> Iterator[Path]:
    """Each case as a file, and one more whose weights lie beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, build in CASES.items():
        yield models.write(build(), folder / f"{name}.onnx")
    path = folder / "external_data.onnx"
    onnx.save_model(
        models.gemm(trans_b=1), path, save_as_external_data=True, location="external_data.bin", size_threshold=0
    )
    yield path


if __name__ == "__main__":
    for written in write_all(Path(sys.argv[1])):
        print(written)
