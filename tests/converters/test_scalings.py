"""Scalings: which channels can be counted in another unit, and that the file computes the same in it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest

from converters import writeback
from converters.classifier import Classifier
from converters.conversion import relative_difference, to_torch
from converters.edits import TensorEdit
from converters.scalings import Scaling, find_scalings
from converters.targets import PORTABLE
from converters.torch_module import TorchClassifier
from tests import models
from tests.models import CHANNELS, CLASSES, LOGITS, SIDE, assemble, head, head_tensors, node, weights

Load = Callable[[onnx.ModelProto], Classifier]


def prepared_module(classifier: Classifier) -> TorchClassifier:
    return to_torch(writeback.prepare_for_quantization(classifier, PORTABLE, 4, 4), check=False)


def pairs(scalings: list[Scaling]) -> dict[str, set[str]]:
    """Who makes channels, and who reads them, by what they write."""
    return {found.makers[0].output: {slot.output for slot in found.readers} for found in scalings}


def scaled(module: TorchClassifier, scalings: list[Scaling], seed: int = 0) -> Classifier:
    """The file with channels in units drawn by lot, between a fifth of the old ones and five times as much."""
    lot = np.random.default_rng(seed)
    tensors: dict[tuple[str, int], np.ndarray] = {}
    for found in scalings:
        factors = np.exp(lot.uniform(-1.6, 1.6, found.count))
        for slots, each in ((found.makers, 1 / factors), (found.readers, factors)):
            for slot in slots:
                key = (slot.output, slot.index)
                tensor = np.moveaxis(
                    tensors.get(key, module.constant(slot.name).numpy().astype(np.float64)), slot.axis, -1
                )
                tensors[key] = np.moveaxis(tensor * each[slot.numbers], -1, slot.axis)
    edits = [TensorEdit(*key, tensor.astype(np.float32)) for key, tensor in tensors.items()]
    return writeback.edited_classifier(module.classifier, edits)


def difference(module: TorchClassifier, other: Classifier) -> float:
    """Between two files in onnxruntime, on noise."""
    spec = module.spec
    x = models.images(2, (2, spec.channel_count, *spec.size))
    first, second = (c.session(optimise=False).run_in_batches(x, 1) for c in (module.classifier, other))
    return relative_difference(second, first)


def between(*nodes: onnx.NodeProto, middle: str, bias: bool = True, **attributes: object) -> onnx.ModelProto:
    """image -Conv-> features -`nodes`-> `middle` -Conv (attributes)-> second -Relu, pool, Gemm-> logits."""
    tensors = {"a.weight": weights(4, CHANNELS, 3, 3), "a.bias": weights(4, seed=1)}
    if not bias:
        del tensors["a.bias"]
    groups = attributes.get("group", 1)
    assert isinstance(groups, int)
    second = node("Conv", f"{middle} b.weight", "second", **attributes)
    first = node("Conv", f"image {' '.join(tensors)}", "features", pads=[1, 1, 1, 1])
    return assemble(
        [first, *nodes, second, node("Relu", "second", "active"), *head("active")],
        {
            **tensors,
            "b.weight": weights(8, 4 // groups, 3, 3, seed=2),
            "slope": weights(4, 1, 1),
            "low": np.zeros((), np.float32),
            "high": np.full((), 6, np.float32),
            "pads": np.array([0, 0, 1, 0, 0, 0, 1, 0]),
            **head_tensors(8),
        },
    )


RELU = node("Relu", "features", "relu")
POOL = node("MaxPool", "relu", "pool", kernel_shape=[2, 2])
HOMOGENEOUS = {
    "relu": between(RELU, middle="relu"),
    "no bias": between(RELU, middle="relu", bias=False),
    "pools": between(RELU, POOL, node("AveragePool", "pool", "mean", kernel_shape=[2, 2]), middle="mean"),
    "slopes": between(node("PRelu", "features slope", "prelu"), middle="prelu"),
    "leaky": between(node("LeakyRelu", "features", "leaky", alpha=0.2), middle="leaky"),
    "padded": between(node("Pad", "features pads", "padded"), middle="padded"),
    "depthwise": between(RELU, middle="relu", group=4),
}


@pytest.mark.parametrize("case", HOMOGENEOUS)
def test_homogeneous_operators_pass_a_unit_on(case: str, load: Load) -> None:
    module = prepared_module(load(HOMOGENEOUS[case]))
    scalings = find_scalings(module)
    assert pairs(scalings) == {"features": {"second"}, "second": {"logits"}}
    assert difference(module, scaled(module, scalings)) < 1e-5


REFUSED = {
    "ReLU6": between(node("Clip", "features low high", "clipped"), middle="clipped"),
    "HardSwish": between(node("HardSwish", "features", "swish"), middle="swish"),
    "sum": between(RELU, node("Add", "relu features", "sum"), middle="sum"),
    "gate": between(
        RELU,
        node("GlobalAveragePool", "relu", "squeezed"),
        node("Sigmoid", "squeezed", "gate"),
        node("Mul", "relu gate", "gated"),
        middle="gated",
    ),
    "groups of two": between(RELU, middle="relu", group=2),
    "bordered with ones": between(
        node("Constant", "", "one", value_float=1.0), node("Pad", "features pads one", "padded"), middle="padded"
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_homogeneous_is_refused(case: str, load: Load) -> None:
    assert "features" not in pairs(find_scalings(prepared_module(load(REFUSED[case]))))


def test_a_part_that_nobody_reads_and_a_border_that_is_computed_are_no_obstacle(load: Load) -> None:
    """Nor do they pass anything on."""
    split = node("Split", "relu", "left right", axis=1)
    computed = (
        node("ReduceMax", "image", "largest", keepdims=0),
        node("Mul", "largest nothing", "border"),
        node("Pad", "relu pads border", "padded"),
    )
    tensors = {"nothing": np.zeros((), np.float32), "pads": np.array([0, 0, 1, 0, 0, 0, 1, 0])}
    for nodes, middle, channels in (((split,), "right", 2), (computed, "padded", 4)):
        model = assemble(
            [
                node("Conv", "image a.weight", "features"),
                RELU,
                *nodes,
                node("Conv", f"{middle} b.weight", "second"),
                *head("second"),
            ],
            {
                "a.weight": weights(4, CHANNELS, 3, 3),
                "b.weight": weights(8, channels, 3, 3),
                **tensors,
                **head_tensors(8),
            },
        )
        assert "features" not in pairs(find_scalings(prepared_module(load(model))))


@pytest.mark.parametrize("opset", [17, 18])
@pytest.mark.parametrize("axes", [[2, 3], [1, 2]])
def test_a_mean_passes_a_unit_on_but_over_channels(opset: int, axes: list[int], load: Load) -> None:
    tensors = {"a.weight": weights(SIDE, CHANNELS, 1, 1), "axes": np.array(axes), **head_tensors(SIDE)}
    mean = (
        node("ReduceMean", "a axes", "mean", keepdims=0)
        if opset == 18
        else node("ReduceMean", "a", "mean", axes=axes, keepdims=0)
    )
    nodes = [node("Conv", "image a.weight", "a"), mean, node("Gemm", "mean head.weight head.bias", "logits", transB=1)]
    module = prepared_module(load(assemble(nodes, tensors, opset=opset)))
    scalings = find_scalings(module)
    assert pairs(scalings) == ({"a": {"logits"}} if axes == [2, 3] else {})
    assert difference(module, scaled(module, scalings)) < 1e-5


def test_a_flattened_map_has_its_channels_in_rows(load: Load) -> None:
    tensors = {"a.weight": weights(4, CHANNELS, 1, 1), "fc.weight": weights(CLASSES, 4 * SIDE * SIDE)}
    nodes = [
        node("Conv", "image a.weight", "a"),
        node("Flatten", "a", "flat"),
        node("Gemm", "flat fc.weight", "logits", transB=1),
    ]
    module = prepared_module(load(assemble(nodes, tensors)))
    scalings = find_scalings(module)
    assert pairs(scalings) == {"a": {"logits"}}
    assert difference(module, scaled(module, scalings)) < 1e-5


def test_other_outputs_keep_their_units(load: Load) -> None:
    """An auxiliary classifier reads what a layer of the main one reads."""
    several = onnx.ModelProto()
    several.CopyFrom(HOMOGENEOUS["relu"])
    several.graph.node.append(node("ReduceMax", "relu", "peak", axes=[2, 3], keepdims=0))
    several.graph.node.append(node("MatMul", "peak aux.weight", "auxiliary"))
    several.graph.initializer.append(onnx.numpy_helper.from_array(weights(4, CLASSES), "aux.weight"))
    several.graph.output.append(onnx.helper.make_tensor_value_info("auxiliary", onnx.TensorProto.FLOAT, LOGITS))
    assert find_scalings(prepared_module(load(several))) == []


PAIRS = {"plain": 6, "residual": 5, "dense": 18, "inverted": 0, "inverted_folded": 0, "attention": 0}


def test_the_embedded_models_stay_what_they_were(embedded: Classifier) -> None:
    """In any units. Those with ReLU6 have nothing to scale, and a BatchNormalization behind a Concat makes channels."""
    module = prepared_module(embedded)
    scalings = find_scalings(module)
    if embedded.name in PAIRS:
        assert len(scalings) == PAIRS[embedded.name]
    assert difference(module, scaled(module, scalings)) < 1e-5
