"""Quantization and pruning of models spelt as few exporters spell them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from converters.classifier import Classifier
from converters.conversion import seeded_input
from converters.targets import choose_target
from converters.writeback import prepare_for_pruning, prepare_for_training
from recipes.images import ImageSet, gaussian_noise
from recipes.prune.engine import prune
from recipes.prune.goal import make_goal
from recipes.prune.settings import PruneSettings
from recipes.quantize.engine import quantize
from recipes.quantize.settings import QuantizeSettings
from tests import models
from tests.models import node

Load = Callable[[onnx.ModelProto], Classifier]
WIDTH = 8


def built(
    first: list[onnx.NodeProto], last: list[onnx.NodeProto], opset: int = 17, **more: np.ndarray
) -> onnx.ModelProto:
    """`first` makes `start` of the image, or nothing; a Conv makes `features`; `last` makes logits of them."""
    start = "start" if first else "image"
    tensors = {"conv.weight": models.weights(WIDTH, 3, 3, 3), "conv.bias": models.random(WIDTH)}
    conv = node("Conv", f"{start} conv.weight conv.bias", "features", pads=[1, 1, 1, 1])
    return models.assemble([*first, conv, *last], tensors | dict(models.head_tensors(WIDTH)) | more, opset=opset)


def of_bytes(*first: onnx.NodeProto) -> onnx.ModelProto:
    ends = {"from": np.zeros(4, np.int64), "to": np.full(4, 99, np.int64)}
    model = built(list(first), models.head("features"), **ends)
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8
    return model


def in_a_branch() -> onnx.ModelProto:
    """An If that is settled, with a tensor of 128 kB in one of its branches."""
    large = numpy_helper.from_array(models.random(1, WIDTH, 64, 64), "large")
    nodes = [
        helper.make_node("Constant", [], ["large"], value=large),
        helper.make_node("ReduceMean", ["large"], ["small"], axes=[2, 3], keepdims=1),
        helper.make_node("Add", ["features", "small"], ["sum"]),
    ]
    then = helper.make_graph(nodes, "then", [], [helper.make_tensor_value_info("sum", TensorProto.FLOAT, None)])
    other = helper.make_graph(
        [helper.make_node("Relu", ["features"], ["relu"])],
        "else",
        [],
        [helper.make_tensor_value_info("relu", TensorProto.FLOAT, None)],
    )
    choice = helper.make_node("If", ["yes"], ["out"], then_branch=then, else_branch=other)
    return built([], [choice, *models.head("out")], yes=np.array(True))


def pooled(*last: onnx.NodeProto, **tensors: np.ndarray) -> onnx.ModelProto:
    start = [node("GlobalAveragePool", "features", "pooled"), node("Flatten", "pooled", "flat")]
    return built([], [*start, *last], **tensors)


def named_like_ours() -> onnx.ModelProto:
    model = built([], [node("Relu", "features", "out"), *models.head("out")])
    model.graph.node[1].name = "image/DQ"
    return model


def with_its_weight_as_an_output() -> onnx.ModelProto:
    model = built([], models.head("features"))
    model.graph.output.append(helper.make_tensor_value_info("head.weight", TensorProto.FLOAT, [models.CLASSES, WIDTH]))
    return model


BUILD: dict[str, Callable[[], onnx.ModelProto]] = {
    "bytes, cast": lambda: of_bytes(node("Cast", "image", "start", to=TensorProto.FLOAT)),
    "bytes, sliced and cast": lambda: of_bytes(
        node("Slice", "image from to", "part"), node("Cast", "part", "start", to=TensorProto.FLOAT)
    ),
    "a large tensor in a branch": in_a_branch,
    "a bias with two dimensions": lambda: pooled(
        node("Gemm", "flat head.weight bias", "logits", transB=1), bias=models.random(1, models.CLASSES)
    ),
    "rows transposed, as transA undoes": lambda: pooled(
        node("Transpose", "flat", "turned"),
        node("Gemm", "turned head.weight head.bias", "logits", transA=1, transB=1, alpha=0.5),
    ),
    "columns computed, that transA makes rows of": lambda: pooled(
        node("Transpose", "flat", "columns"),
        node("Relu", "columns", "turned"),
        node("Gemm", "turned head.weight head.bias", "logits", transA=1, transB=1),
    ),
    "GroupNormalization of opset 18": lambda: built(
        [],
        [node("GroupNormalization", "features scale shift", "out", num_groups=2), *models.head("out")],
        18,
        scale=1 + 0.3 * models.random(2),
        shift=models.random(2),
    ),
    "a node named like ours": named_like_ours,
    "a weight that is an output": with_its_weight_as_an_output,
}


STAYS_WHOLE = ("GroupNormalization of opset 18",)
"""What has no channels that can be removed."""


@pytest.fixture(scope="module")
def images() -> ImageSet:
    return gaussian_noise(8, models.CHANNELS, (models.SIDE, models.SIDE), 0)


@pytest.mark.parametrize("name", BUILD)
def test_it_is_quantized_and_pruned(name: str, load: Load, images: ImageSet, tmp_path: Path) -> None:
    """Each file is proved against what was computed, and has the interface of the one that it was made from."""
    classifier = load(BUILD[name]())
    few = QuantizeSettings(unit="none", range_steps=4)
    for bits, act_bits, target in ((4, None, "portable"), (8, 8, "ort-cpu")):
        output = tmp_path / f"{target}.onnx"
        quantize(classifier, images, output, few, bits, act_bits, choose_target(target, act_bits=act_bits))
    prune(classifier, images, tmp_path / "pruned.onnx", PruneSettings(), make_goal("unstructured", 0.3))
    if name not in STAYS_WHOLE:
        prune(classifier, images, tmp_path / "narrow.onnx", PruneSettings(), make_goal("channel", None, 0.8))
    x = seeded_input(classifier, 4).numpy()
    expected = classifier.session(optimise=False).run(x)[0]
    for prepare in (prepare_for_pruning, prepare_for_training):
        actual = prepare(classifier).session(optimise=False).run(x)[0]
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4 * float(np.abs(expected).max()))
    for path in tmp_path.glob("*.onnx"):
        before, after = (onnx.load(file).graph for file in (classifier.path, path))
        assert [value.SerializeToString() for value in after.input] == [
            value.SerializeToString() for value in before.input
        ]
        assert [value.name for value in after.output] == [value.name for value in before.output]
