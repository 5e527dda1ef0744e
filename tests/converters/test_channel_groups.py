"""Channels that go together because of where they meet: groups of a convolution, heads of attention."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from torch import Tensor, nn

from converters import writeback
from converters.channel_cuts import Channels
from converters.channels import find_channels
from converters.classifier import Classifier
from converters.edits import apply_edits
from converters.numbering import FIXED
from tests import models
from tests.converters.test_channels import difference, prepared_module, some
from tests.exports import export
from tests.models import assemble, head, head_tensors, node, random, weights

Load = Callable[[onnx.ModelProto], Classifier]
HEADS, WIDTH = 3, 4
"""Of the models here: heads of attention, and how wide each is."""
INNER, TOKENS, FEATURES = HEADS * WIDTH, models.PIXELS // models.CHANNELS, 6


def check_each(classifier: Classifier) -> Channels:
    """Whatever can go, goes without a trace: each number alone, and half of them."""
    module = prepared_module(classifier)
    channels = find_channels(module)
    for removed in [*([number] for number in channels.numbers()), some(channels, 0.5)]:
        assert difference(module, channels, np.array(removed)) < 1e-5
    return channels


def cut_graph(classifier: Classifier, channels: Channels, removed: list[int]) -> onnx.GraphProto:
    module = prepared_module(classifier)
    edits = channels.edits(np.array(removed), {}, module.constant)
    return onnx.load_from_string(writeback.serialise(apply_edits(module.classifier.original, edits))).graph


def grouped(inputs: int, outputs: int, groups: int = 4) -> onnx.ModelProto:
    """Conv, Relu, a Conv of so many inputs and outputs in each group, a head."""
    nodes = [
        node("Conv", "image a.weight a.bias", "a"),
        node("Relu", "a", "bent"),
        node("Conv", "bent b.weight b.bias", "b", group=groups),
    ]
    first = {"a.weight": weights(groups * inputs, models.CHANNELS, 3, 3), "a.bias": weights(groups * inputs, seed=2)}
    second = {
        "b.weight": weights(groups * outputs, inputs, 3, 3, seed=1),
        "b.bias": weights(groups * outputs, seed=3),
    }
    return assemble(nodes + head("b"), first | second | head_tensors(groups * outputs))


@pytest.mark.parametrize(("inputs", "outputs"), [(2, 2), (2, 3), (1, 2), (3, 1)])
def test_groups_go_whole(inputs: int, outputs: int, load: Load) -> None:
    """With the channels that they read, and with those that they make."""
    classifier = load(grouped(inputs, outputs))
    channels = check_each(classifier)
    assert [len(np.unique(entry.outputs)) for entry in channels.layers[:2]] == [4, 4]
    graph = cut_graph(classifier, channels, [int(channels.numbers()[1])])
    (group,) = (a.i for n in graph.node if n.output[0] == "b" for a in n.attribute if a.name == "group")
    shapes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    assert group == 3
    assert shapes["a.weight"] == [3 * inputs, models.CHANNELS, 3, 3]
    assert shapes["b.weight"] == [3 * outputs, inputs, 3, 3]
    assert shapes["head.weight"] == [models.CLASSES, 3 * outputs]


def test_groups_of_the_image_stay(load: Load) -> None:
    channels = check_each(load(models.depthwise()))
    assert len(channels.numbers()) == 0


def attention(project: models.Nodes, tensors: models.Tensors, scores: models.Nodes | None = None) -> onnx.ModelProto:
    """Tokens, `project` to `q`, `v` [N, heads, T, width] and `k` [N, heads, width, T], attention, a Gemm of the mean.

    `scores` makes `soft` of `raw`, the product of queries and keys.
    """
    nodes = [
        node("Reshape", "image rows", "flat"),
        node("Transpose", "flat", "sequence", perm=[0, 2, 1]),
        *project,
        node("MatMul", "q k", "raw"),
        *(scores or [node("Softmax", "raw", "soft", axis=-1)]),
        node("MatMul", "soft v", "mixed"),
        node("Transpose", "mixed", "back", perm=[0, 2, 1, 3]),
        node("Reshape", "back side", "joined"),
        node("MatMul", "joined out.weight", "out"),
        node("ReduceMean", "out", "pooled", axes=[1], keepdims=0),
        node("Gemm", "pooled head.weight head.bias", "logits", transB=1),
    ]
    own = {
        "rows": np.array([0, models.CHANNELS, TOKENS]),
        "side": np.array([0, TOKENS, INNER]),
        "out.weight": weights(INNER, FEATURES, seed=5, fan_in=INNER),
        **head_tensors(FEATURES),
    }
    return assemble(nodes, own | tensors)


def separate() -> onnx.ModelProto:
    """Three projections with biases."""
    project, tensors = [], {"heads": np.array([0, TOKENS, HEADS, WIDTH])}
    for seed, name in enumerate("qkv"):
        project += [
            node("MatMul", f"sequence {name}.weight", f"{name}.raw"),
            node("Add", f"{name}.bias {name}.raw", f"{name}.sum"),
            node("Reshape", f"{name}.sum heads", f"{name}.split"),
            node("Transpose", f"{name}.split", name, perm=[0, 2, 3, 1] if name == "k" else [0, 2, 1, 3]),
        ]
        tensors[f"{name}.weight"] = 2 * random(models.CHANNELS, INNER, seed=seed)
        tensors[f"{name}.bias"] = random(INNER, seed=10 + seed)
    return attention(project, tensors)


FUSED = [node("MatMul", "sequence qkv.weight", "qkv.raw"), node("Add", "qkv.raw qkv.bias", "qkv")]
FUSED_TENSORS = {"qkv.weight": 2 * random(models.CHANNELS, 3 * INNER), "qkv.bias": random(3 * INNER, seed=1)}


def parts() -> onnx.ModelProto:
    """One projection to [3, heads, width], whose parts are gathered; the scale is computed from a shape."""
    project = [
        *FUSED,
        node("Reshape", "qkv parts", "five"),
        node("Transpose", "five", "turned", perm=[2, 0, 3, 1, 4]),
        *(node("Gather", f"turned at.{part}", f"{part}.plain", axis=0) for part in "qkv"),
        node("Transpose", "k.plain", "k", perm=[0, 1, 3, 2]),
        node("Identity", "q.plain", "q"),
        node("Identity", "v.plain", "v"),
    ]
    scores = [
        node("Shape", "q.plain", "sizes"),
        node("Gather", "sizes at.heads", "count", axis=0),  # no exporter scales by the heads, but it has to stay
        node("Cast", "count", "divisor", to=onnx.TensorProto.FLOAT),
        node("Div", "raw divisor", "scaled"),
        node("Softmax", "scaled", "soft", axis=-1),
    ]
    at = {f"at.{part}": np.array(index) for index, part in enumerate("qkv")}
    sizes = {"parts": np.array([0, TOKENS, 3, HEADS, WIDTH]), "at.heads": np.array(1)}
    return attention(project, FUSED_TENSORS | at | sizes, scores)


def thirds() -> onnx.ModelProto:
    """One projection to [3 * heads, width], sliced; targets and bounds computed, a position bias, heads normalised."""
    bounds = {f"bound.{index}": np.array([index * HEADS]) for index in range(4)}
    project = [
        *FUSED,
        node("Shape", "qkv", "sizes"),
        node("Slice", "sizes bound.0 two", "start"),
        node("Concat", "start wide", "target", axis=0),
        node("Reshape", "qkv target", "four"),
        node("Transpose", "four", "turned", perm=[0, 2, 1, 3]),
        *(
            node("Slice", f"turned bound.{index} bound.{index + 1} one", f"{part}.plain")
            for index, part in enumerate("qkv")
        ),
        node("LayerNormalization", "q.plain scale", "q", axis=-1),
        node("Transpose", "k.plain", "k", perm=[0, 1, 3, 2]),
        node("Identity", "v.plain", "v"),
    ]
    scores = [node("Add", "raw position", "placed"), node("Softmax", "placed", "soft", axis=-1)]
    tensors = {
        "one": np.array([1]),
        "two": np.array([2]),
        "wide": np.array([3 * HEADS, WIDTH]),
        "position": random(1, HEADS, TOKENS, TOKENS, seed=7),
        "scale": 1 + random(WIDTH, seed=8) / 4,
    }
    return attention(project, FUSED_TENSORS | bounds | tensors, scores)


def columns() -> onnx.ModelProto:
    """One projection, split into three before each is reshaped, heads and batch in one axis."""
    project = [*FUSED, node("Split", "qkv sizes", "q.own k.own v.own", axis=2)]
    for part in "qkv":
        project += [
            node("Reshape", f"{part}.own heads", f"{part}.four"),
            node("Transpose", f"{part}.four", f"{part}.turned", perm=[0, 2, 1, 3]),
            node("Reshape", f"{part}.turned together", f"{part}.three"),
            node("Reshape", f"{part}.three apart", part if part != "k" else "k.apart"),
        ]
    project.append(node("Transpose", "k.apart", "k", perm=[0, 1, 3, 2]))
    tensors = {
        "sizes": np.array([INNER] * 3),
        "heads": np.array([0, TOKENS, HEADS, WIDTH]),
        "together": np.array([-1, TOKENS, WIDTH]),
        "apart": np.array([-1, HEADS, TOKENS, WIDTH]),
    }
    return attention(project, FUSED_TENSORS | tensors)


def lengths(computed: bool = True) -> onnx.ModelProto:
    """Queries and keys of length 1 (Swin V2), the one as torch spells it, with a target that may be computed."""
    model = separate()
    graph = model.graph
    queries, keys = (next(entry for entry in graph.node if entry.output[0] == name) for name in "qk")
    queries.output[0], keys.output[0] = "q.plain", "k.plain"
    at = list(graph.node).index(next(entry for entry in graph.node if entry.output[0] == "raw"))
    unit = [
        node("ReduceL2", "q.plain", "q.length", axes=[3]),
        node("Clip", "q.length least", "q.bounded"),
        *([node("Shape", "q.plain", "target")] if computed else []),
        node("Expand", "q.bounded target", "q.repeated"),
        node("Div", "q.plain q.repeated", "q.unit"),
        node("Mul", "q.unit sharpness", "q"),
        node("LpNormalization", "k.plain", "k", axis=2, p=2),
    ]
    for entry in reversed(unit):
        graph.node.insert(at, entry)
    tensors = {"least": np.array(1e-6, np.float32), "sharpness": 3 + random(HEADS, 1, 1, seed=6)}
    if not computed:
        tensors["target"] = np.array([1, HEADS, TOKENS, WIDTH])
    graph.initializer.extend(numpy_helper.from_array(tensor, name) for name, tensor in tensors.items())
    return model


def lengths_of_a_fixed_target() -> onnx.ModelProto:
    return lengths(computed=False)


def test_what_is_repeated_keeps_its_channels(load: Load) -> None:
    """The mean of each channel, repeated over the map that it is subtracted from, in a target that is computed."""
    nodes = [
        node("Conv", "image a.weight", "a"),
        node("GlobalAveragePool", "a", "mean"),
        node("Shape", "a", "sizes"),
        node("Expand", "mean sizes", "repeated"),
        node("Sub", "a repeated", "centred"),
        node("Relu", "centred", "bent"),
    ]
    tensors = {"a.weight": weights(6, models.CHANNELS, 3, 3)}
    channels = check_each(load(assemble(nodes + head("bent"), tensors | head_tensors(6))))
    assert len(channels.numbers()) == 6


def test_what_is_repeated_as_often_as_there_are_images_stays(load: Load) -> None:
    """A target that the batch is in cannot be written as numbers."""
    nodes = [
        node("Conv", "image a.weight", "a"),
        node("ReduceMean", "a", "mean", axes=[0, 2, 3]),
        node("Shape", "a", "sizes"),
        node("Expand", "mean sizes", "repeated"),
        node("Relu", "repeated", "bent"),
    ]
    tensors = {"a.weight": weights(6, models.CHANNELS, 3, 3)}
    channels = find_channels(prepared_module(load(assemble(nodes + head("bent"), tensors | head_tensors(6)))))
    assert len(channels.numbers()) == 0


@pytest.mark.parametrize("build", [separate, parts, thirds, columns, lengths, lengths_of_a_fixed_target])
def test_heads_go_whole(build: Callable[[], onnx.ModelProto], load: Load) -> None:
    """From queries, keys, values and what reads them, however the graph spells it."""
    classifier = load(build())
    channels = check_each(classifier)
    assert len(channels.numbers()) == HEADS + FEATURES
    graph = cut_graph(classifier, channels, [int(channels.numbers()[0])])
    left = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    assert left["out.weight"].shape == (2 * WIDTH, FEATURES)
    projections = [left[name].shape[1] for name in ("q.weight", "k.weight", "v.weight", "qkv.weight") if name in left]
    assert projections in ([2 * WIDTH] * 3, [3 * 2 * WIDTH])


def whole(change: str) -> onnx.ModelProto:
    """Attention of which no head can go: a softmax over heads, heads that are summed, one head."""
    model = separate()
    nodes = {entry.output[0]: entry for entry in model.graph.node}
    if change == "softmax":
        nodes["soft"].attribute[0].i = 1
    if change == "unequal":  # every head of values meets the scores of one
        nodes["soft"].input[0] = "summed"
        at = list(model.graph.node).index(nodes["soft"])
        model.graph.node.insert(at, node("ReduceSum", "raw over", "summed", keepdims=1))
        model.graph.initializer.append(numpy_helper.from_array(np.array([1]), "over"))
    if change == "one head":
        for tensor in model.graph.initializer:
            if tensor.name == "heads":
                tensor.CopyFrom(numpy_helper.from_array(np.array([0, TOKENS, 1, INNER]), "heads"))
    return model


@pytest.mark.parametrize("change", ["softmax", "unequal", "one head"])
def test_heads_that_cannot_be_told_apart_stay(change: str, load: Load) -> None:
    channels = check_each(load(whole(change)))
    queries, keys, values, _, _ = (entry.outputs for entry in channels.layers)
    assert (queries == FIXED).all()
    assert (keys == FIXED).all()
    assert change == "unequal" or (values == FIXED).all()


class Transformer(nn.Module):
    """Two blocks of attention and a grouped convolution, as torch spells them."""

    def __init__(self) -> None:
        super().__init__()
        grouped = nn.Conv2d(16, 16, 3, 2, groups=4)
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2), nn.ReLU(), grouped, nn.ReLU(), nn.Conv2d(16, 24, 1))
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(24, 4, 32, batch_first=True) for _ in range(2))
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.stem(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            tokens = block(tokens)
        return self.head(tokens.mean(1))


@pytest.mark.parametrize("dynamo", [False, True])
def test_what_torch_exports(dynamo: bool, tmp_path: Path) -> None:
    opset = None if dynamo else 17
    module_ = prepared_module(export(Transformer().eval(), tmp_path / "model.onnx", dynamo=dynamo, opset=opset))
    channels = find_channels(module_)
    assert len(channels.numbers()) == 4 + 2 * (4 + 32)  # groups of the stem, heads and widths of each block
    for seed in range(3):
        assert difference(module_, channels, some(channels, 0.5, seed)) < 1e-5
