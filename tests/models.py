"""Small ONNX models built by hand: one function a model, each with just what its tests are about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Floats = NDArray[np.float32]
Tensors = Mapping[str, NDArray[Any]]
Shape = Sequence[int | str]
Nodes = list[onnx.NodeProto]

CHANNELS, SIDE, CLASSES = 3, 8, 5
PIXELS = CHANNELS * SIDE * SIDE
IMAGE: Shape = ("batch", CHANNELS, SIDE, SIDE)
LOGITS: Shape = ("batch", CLASSES)


def random(*shape: int, seed: int = 0) -> Floats:
    """Seeded normal numbers."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def weights(*shape: int, seed: int = 0, fan_in: int | None = None) -> Floats:
    """Seeded normal numbers, scaled so that a layer of `fan_in` keeps the magnitude of what it reads."""
    return random(*shape, seed=seed) / np.float32(np.sqrt(fan_in or np.prod(shape[1:], initial=1)))


def images(batch: int = 2, shape: Shape = IMAGE, seed: int = 1) -> Floats:
    """Seeded normal numbers in the shape of an input."""
    return random(batch, *(int(size) for size in shape[1:]), seed=seed)


def node(op: str, inputs: str, outputs: str, **attributes: Any) -> onnx.NodeProto:
    """A node named OUTPUT/OP; operands are one string, with `-` for one left out."""
    operands = ["" if name == "-" else name for name in inputs.split()]
    return helper.make_node(op, operands, outputs.split(), name=f"{outputs.split()[0]}/{op}", **attributes)


def assemble(
    nodes: Sequence[onnx.NodeProto],
    tensors: Tensors | None = None,
    *,
    inputs: Mapping[str, Shape] | None = None,
    outputs: Mapping[str, Shape] | None = None,
    opset: int = 17,
    metadata: Mapping[str, str] | None = None,
) -> onnx.ModelProto:
    """A model of IR version 8 (10 from opset 21 on) from nodes and initializers."""
    domains = sorted({entry.domain for entry in nodes} - {""})
    graph = helper.make_graph(
        list(nodes),
        "graph",
        [_declared(name, shape) for name, shape in (inputs or {"image": IMAGE}).items()],
        [_declared(name, shape) for name, shape in (outputs or {"logits": LOGITS}).items()],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in (tensors or {}).items()],
    )
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10 if opset >= 21 else 8)
    helper.set_model_props(model, dict(metadata or {}))
    return model


def _declared(name: str, shape: Shape) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape))


def write(model: onnx.ModelProto, path: Path) -> Path:
    """The model as a file."""
    path.write_bytes(model.SerializeToString())
    return path


def head(features: str) -> Nodes:
    """Global pooling and a Gemm (transB=1) on a feature map; `head_tensors` has its weights."""
    return [
        node("GlobalAveragePool", features, "pooled"),
        node("Flatten", "pooled", "flat"),
        node("Gemm", "flat head.weight head.bias", "logits", transB=1),
    ]


def head_tensors(channels: int) -> Tensors:
    return {"head.weight": weights(CLASSES, channels, seed=8), "head.bias": weights(CLASSES, seed=9)}


def linear(output: str = "logits") -> Nodes:
    """A Gemm (transB=1) on all pixels, its weight `fc.weight` [classes, pixels]."""
    return [node("Flatten", "image", "flat"), node("Gemm", "flat fc.weight", output, transB=1)]


def statistics(channels: int) -> Tensors:
    """What the node `batchnorm_node` reads: scale, bias, mean and variance far from the identity."""
    return {
        "bn.scale": 1 + 0.3 * random(channels, seed=2),
        "bn.bias": 0.5 * random(channels, seed=3),
        "bn.mean": 0.5 * random(channels, seed=4),
        "bn.var": 0.5 + random(channels, seed=5) ** 2,
    }


def batchnorm_node(source: str, output: str) -> onnx.NodeProto:
    return node("BatchNormalization", f"{source} bn.scale bn.bias bn.mean bn.var", output, epsilon=1e-3)


def conv(
    *,
    bias: bool = True,
    opset: int = 17,
    image: Shape = IMAGE,
    metadata: Mapping[str, str] | None = None,
    **attributes: Any,
) -> onnx.ModelProto:
    """image -Conv-> features -Relu-> active -pool, Gemm-> logits; `attributes` (auto_pad, pads) are the Conv's."""
    tensors = {"conv.weight": weights(4, CHANNELS, 3, 3), "conv.bias": weights(4, seed=1)}
    if not bias:
        del tensors["conv.bias"]
    first = node("Conv", f"image {' '.join(tensors)}", "features", **attributes)
    return assemble(
        [first, node("Relu", "features", "active"), *head("active")],
        tensors | head_tensors(4),
        inputs={"image": image},
        outputs={"logits": (image[0], CLASSES)},
        opset=opset,
        metadata=metadata,
    )


def chaotic() -> onnx.ModelProto:
    """Sin of large numbers makes much of the last digit of a Sigmoid, which onnxruntime computes in another way."""
    tensors = {"loud": np.float32(1e4), "fc.weight": weights(CLASSES, PIXELS)}
    nodes = [
        node("Sigmoid", "image", "gate"),
        node("Mul", "gate loud", "large"),
        node("Sin", "large", "chaos"),
        node("Flatten", "chaos", "flat"),
        node("Gemm", "flat fc.weight", "logits", transB=1),
    ]
    return assemble(nodes, tensors)


def depthwise() -> onnx.ModelProto:
    """A Conv with one group a channel and two outputs a group."""
    first = node("Conv", "image conv.weight", "features", group=CHANNELS)
    return assemble([first, *head("features")], {"conv.weight": weights(6, 1, 3, 3), **head_tensors(6)})


def gemm(*, trans_b: int, bias: bool = True) -> onnx.ModelProto:
    """image -Flatten-> flat -Gemm-> logits, its weight [O, I] (transB=1) or [I, O] (transB=0)."""
    weight = weights(CLASSES, PIXELS)
    tensors = {"fc.weight": weight if trans_b else weight.T.copy(), "fc.bias": weights(CLASSES, seed=1)}
    if not bias:
        del tensors["fc.bias"]
    last = node("Gemm", f"flat {' '.join(tensors)}", "logits", transB=trans_b)
    return assemble([node("Flatten", "image", "flat"), last], tensors)


def matmul(*, bias: bool = True) -> onnx.ModelProto:
    """image -Flatten-> flat -MatMul [I, O]-> product -Add-> logits; without a bias the product is the logits."""
    nodes = [node("MatMul", "flat fc.weight", "product" if bias else "logits")]
    nodes += [node("Add", "product fc.bias", "logits")] * bias
    tensors = {"fc.weight": weights(PIXELS, CLASSES, fan_in=PIXELS), "fc.bias": weights(CLASSES, seed=1)}
    return assemble([node("Flatten", "image", "flat"), *nodes], tensors)


def tokens() -> onnx.ModelProto:
    """Pixels as tokens: image -> [N, T, C] -MatMul-> mixed [N, T, 6] -mean over tokens-> Gemm -> logits."""
    nodes = [
        node("Reshape", "image rows", "flat"),
        node("Transpose", "flat", "sequence", perm=[0, 2, 1]),
        node("MatMul", "sequence token.weight", "mixed"),
        node("ReduceMean", "mixed", "pooled", axes=[1], keepdims=0),
        node("Gemm", "pooled head.weight head.bias", "logits", transB=1),
    ]
    shape = np.array([0, CHANNELS, PIXELS // CHANNELS], dtype=np.int64)
    return assemble(nodes, {"rows": shape, "token.weight": weights(CHANNELS, 6), **head_tensors(6)})


def batchnorm(*, shared: bool = False, opset: int = 17) -> onnx.ModelProto:
    """image -Conv-> features -BatchNormalization-> normed -Relu-> active; `shared` adds features to active."""
    nodes = [
        node("Conv", "image conv.weight", "features", pads=[1, 1, 1, 1]),
        batchnorm_node("features", "normed"),
        node("Relu", "normed", "active"),
        *([node("Add", "active features", "joined")] if shared else []),
        *head("joined" if shared else "active"),
    ]
    tensors = {"conv.weight": weights(4, CHANNELS, 3, 3), **statistics(4), **head_tensors(4)}
    return assemble(nodes, tensors, opset=opset)


def batchnorm_last() -> onnx.ModelProto:
    """Conv and BatchNormalization, whose value `normed` [N, classes, 1, 1] is the output."""
    tensors = {"conv.weight": weights(CLASSES, CHANNELS, SIDE, SIDE), "conv.bias": weights(CLASSES, seed=1)}
    return assemble(
        [node("Conv", "image conv.weight conv.bias", "features"), batchnorm_node("features", "normed")],
        tensors | statistics(CLASSES),
        outputs={"normed": ("batch", CLASSES, 1, 1)},
    )


def feature_map() -> onnx.ModelProto:
    """No classifier: a Conv, whose value `features` [N, 4, 6, 6] is the output."""
    return assemble(
        [node("Conv", "image conv.weight", "features")],
        {"conv.weight": weights(4, CHANNELS, 3, 3)},
        outputs={"features": ("batch", 4, SIDE - 2, SIDE - 2)},
    )


def smooth() -> onnx.ModelProto:
    """Conv, BatchNormalization, SiLU, strided Conv, Tanh: a model whose every derivative exists."""
    nodes = [
        node("Conv", "image a.weight", "a", pads=[1, 1, 1, 1]),
        batchnorm_node("a", "normed"),
        node("Sigmoid", "normed", "gate"),
        node("Mul", "normed gate", "silu"),
        node("Conv", "silu b.weight b.bias", "b", strides=[2, 2], group=2),
        node("Tanh", "b", "tanh"),
    ]
    first = {"a.weight": weights(4, CHANNELS, 3, 3), **statistics(4)}
    second = {"b.weight": weights(6, 2, 3, 3, seed=6), "b.bias": weights(6, seed=7)}
    return assemble(nodes + head("tanh"), first | second | head_tensors(6))


def shared_weight() -> onnx.ModelProto:
    """Two MatMuls (`first`, `second`) that read one square weight, a Tanh between them."""
    size = PIXELS // 4
    return assemble(
        [
            node("AveragePool", "image", "small", kernel_shape=[2, 2], strides=[2, 2]),
            node("Flatten", "small", "flat"),
            node("MatMul", "flat square", "first"),
            node("Tanh", "first", "between"),
            node("MatMul", "between square", "second"),
            node("MatMul", "second fc.weight", "logits"),
        ],
        {"square": weights(size, size), "fc.weight": weights(size, CLASSES, seed=1, fan_in=size)},
    )


def hidden_weight(op: str = "Identity") -> onnx.ModelProto:
    """A Conv whose weight `hidden` comes through an Identity, or from a Constant node."""
    weight = weights(4, CHANNELS, 3, 3)
    nodes = [node("Conv", "image hidden", "features"), *head("features")]
    if op == "Constant":
        constant = node("Constant", "", "hidden", value=numpy_helper.from_array(weight))
        return assemble([constant, *nodes], head_tensors(4))
    return assemble([node(op, "conv.weight", "hidden"), *nodes], {"conv.weight": weight, **head_tensors(4)})


def half_weight(kind: int = TensorProto.FLOAT16) -> onnx.ModelProto:
    """A Conv whose weight is stored in 16 bits and cast to float32."""
    weight = helper.make_tensor("half", kind, [4, CHANNELS, 3, 3], weights(4, CHANNELS, 3, 3).ravel())
    cast, first = node("Cast", "half", "hidden", to=TensorProto.FLOAT), node("Conv", "image hidden", "features")
    model = assemble([cast, first, *head("features")], head_tensors(4))
    model.graph.initializer.append(weight)
    return model


def softmax(op: str = "Softmax", *, behind_identity: bool = False) -> onnx.ModelProto:
    """Gemm to `scores`, then a closing Softmax or LogSoftmax, then perhaps an Identity."""
    ending = [node(op, "scores", "probabilities", axis=-1)]
    if behind_identity:
        ending = [node(op, "scores", "soft", axis=-1), node("Identity", "soft", "probabilities")]
    tensors = {"fc.weight": weights(CLASSES, PIXELS)}
    return assemble(linear("scores") + ending, tensors, outputs={"probabilities": LOGITS})


def fixed_batch(*, reshape: Sequence[int] | None = None) -> onnx.ModelProto:
    """Batch 1 written into the file; with `reshape`, a Reshape to that shape instead of the Flatten."""
    nodes, tensors = linear(), {"fc.weight": weights(CLASSES, PIXELS)}
    if reshape:
        nodes[0] = node("Reshape", "image shape", "flat")
        tensors["shape"] = np.array(reshape)
    return assemble(nodes, tensors, inputs={"image": (1, *IMAGE[1:])}, outputs={"logits": (1, CLASSES)})


def split(*, sizes: bool = True) -> onnx.ModelProto:
    """A Split in two equal parts, with or without `sizes`; `left` and a bent `right` are added again."""
    nodes = [
        node("Conv", "image conv.weight", "features"),
        node("Split", "features sizes" if sizes else "features", "left right", axis=1),
        node("Tanh", "right", "bent"),
        node("Add", "left bent", "joined"),
    ]
    tensors = {"conv.weight": weights(4, CHANNELS, 3, 3), **({"sizes": np.array([2, 2])} if sizes else {})}
    return assemble(nodes + head("joined"), tensors | head_tensors(2))


def unknown_operator() -> onnx.ModelProto:
    """A classifier with an operator of another domain that nobody has."""
    return assemble([node("Frobnicate", "image", "frob", domain="com.example"), *head("frob")], head_tensors(3))


def read_indices() -> onnx.ModelProto:
    """Pooling whose second output, the places of the maxima, is read."""
    nodes = [
        node("MaxPool", "image", "largest places", kernel_shape=[2, 2]),
        node("Cast", "places", "indices", to=TensorProto.FLOAT),
        node("Add", "largest indices", "features"),
    ]
    return assemble([*nodes, *head("features")], head_tensors(IMAGE[1]))


def nan_weights(*, constant_node: bool = False) -> onnx.ModelProto:
    """A Gemm with one NaN among its weights, in an initializer or in a Constant node."""
    weight = weights(CLASSES, PIXELS)
    weight[1, 2] = np.nan
    if constant_node:
        return assemble([node("Constant", "", "fc.weight", value=numpy_helper.from_array(weight)), *linear()])
    return assemble(linear(), {"fc.weight": weight})


def detector() -> onnx.ModelProto:
    """Two outputs, `boxes` [N, 4] and `scores` [N, 5]."""
    return assemble(
        [*linear("scores"), node("MatMul", "flat box.weight", "boxes")],
        {"fc.weight": weights(CLASSES, PIXELS), "box.weight": weights(PIXELS, 4)},
        outputs={"boxes": ("batch", 4), "scores": LOGITS},
    )


def two_inputs(other: Shape = IMAGE) -> onnx.ModelProto:
    """The sum of an image and another input, classified."""
    inputs = {"image": IMAGE, "other": other}
    return assemble([node("Add", "image other", "sum"), *head("sum")], head_tensors(3), inputs=inputs)


def flat_input() -> onnx.ModelProto:
    """An input of three dimensions."""
    return assemble(linear(), {"fc.weight": weights(CLASSES, 42)}, inputs={"image": ("batch", 6, 7)})


def broken_graph() -> onnx.ModelProto:
    """A node that reads a value which nobody writes."""
    return assemble([node("Relu", "nowhere", "active"), *head("active")], head_tensors(3))
