"""A model tells which pixels it takes: by its first nodes, or by the statistics that it stored of real ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from converters.classifier import Classifier
from converters.detect import KNOWN, LEAST_CONFIDENCE, Known
from converters.input_spec import IMAGENET_MEAN, InputSpec
from converters.load import load_classifier
from tests import models
from tests.converters import oracle

Load = Callable[[onnx.ModelProto], Classifier]
SIDE = 32
IMAGE: models.Shape = ("batch", 3, SIDE, SIDE)


def world(count: int = 64) -> torch.Tensor:
    """Images [N, 3, 32, 32] that the detector has not seen: random cosines, with ImageNet's colour statistics."""
    generator = torch.Generator().manual_seed(3)
    waves = torch.zeros(count, 3, SIDE, SIDE)
    grid = torch.arange(SIDE) / SIDE
    for period in (1, 2, 4):
        phase, tint = (
            torch.rand(2, count, 1, 1, 1, generator=generator),
            torch.rand(count, 3, 1, 1, generator=generator),
        )
        row = torch.cos(2 * torch.pi * (period * grid.view(1, 1, -1, 1) + phase[0]))
        waves += (tint + 0.5) * (row + torch.cos(2 * torch.pi * (period * grid + phase[1]))) / period
    waves = (waves - waves.mean((0, 2, 3), keepdim=True)) / waves.std((0, 2, 3), keepdim=True)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (KNOWN[0].mean, KNOWN[0].std))
    return (waves * std + mean).clamp(0, 1)


def trained(known: Known, seed: int) -> onnx.ModelProto:
    """Conv and BatchNormalization with the statistics that a training on `world` under a normalisation leaves."""
    weight = models.weights(16, 3, 3, 3, seed=seed)
    x = InputSpec(size=(SIDE, SIDE), **known.keys("rgb")).to_input(world())
    values = torch.nn.functional.conv2d(x, torch.from_numpy(weight))
    tensors = {
        "conv.weight": weight,
        "bn.scale": np.ones(16, np.float32),
        "bn.bias": np.zeros(16, np.float32),
        "bn.mean": values.mean((0, 2, 3)).numpy(),
        "bn.var": values.var((0, 2, 3)).numpy(),
    }
    nodes = [models.node("Conv", "image conv.weight", "features"), models.batchnorm_node("features", "normed")]
    return models.assemble([*nodes, *models.head("normed")], tensors | models.head_tensors(16), inputs={"image": IMAGE})


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("known", KNOWN, ids=lambda known: known.name)
def test_statistics_tell_the_normalisation(load: Load, known: Known, seed: int) -> None:
    classifier = load(trained(known, seed))
    assert classifier.detection is not None
    assert classifier.detection.name == known.name
    assert LEAST_CONFIDENCE <= classifier.detection.confidence < 1
    assert (classifier.spec.source, classifier.spec.scale) == ("detected", known.scale)
    assert sorted(classifier.spec.mean) == sorted(known.mean)


@pytest.mark.parametrize("known", KNOWN[:2], ids=lambda known: known.name)
def test_channels_that_no_image_gives_back_do_not_decide(load: Load, known: Known) -> None:
    """As in EfficientNet-Lite1 and Lite2, which have dead channels among the first ones."""
    model = trained(known, 0)
    for tensor in model.graph.initializer:
        if tensor.name in ("bn.mean", "bn.var"):
            numbers = onnx.numpy_helper.to_array(tensor).copy()
            numbers[:4] = {"bn.mean": 3.0, "bn.var": 1e-12}[tensor.name]
            tensor.CopyFrom(onnx.numpy_helper.from_array(numbers, tensor.name))
    found = load(model).detection
    assert found is not None
    assert found.name == known.name


def test_options_override_what_is_detected(write: Callable[[onnx.ModelProto], Path]) -> None:
    path = write(trained(KNOWN[2], 0))
    spec = load_classifier(path, {"mean": [0.1, 0.2, 0.3]}).spec
    assert (spec.mean, spec.source) == ((0.1, 0.2, 0.3), "options")
    assert load_classifier(path, {"channels": "bgr"}).spec.channels == "bgr"


def test_a_sidecar_that_names_the_order_is_heard_by_detection(write: Callable[[onnx.ModelProto], Path]) -> None:
    """What is detected for an order is in that order, whether the user typed it or wrote it down."""
    path = write(trained(KNOWN[0], 0))
    typed = load_classifier(path, {"channels": "bgr"}).spec
    path.with_suffix(".toml").write_text('[input]\nchannels = "bgr"\n')
    written = load_classifier(path).spec
    assert (written.channels, written.mean, written.std) == ("bgr", typed.mean, typed.std)
    assert written.mean == IMAGENET_MEAN[::-1]


def test_untrained_statistics_tell_nothing(load: Load) -> None:
    model = trained(KNOWN[0], 0)
    for tensor in model.graph.initializer:
        if tensor.name in ("bn.mean", "bn.var"):
            wild = np.random.default_rng(1).lognormal(3, 4, 16).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(wild, tensor.name))
    classifier = load(model)
    assert classifier.detection is None
    assert classifier.spec.source == "assumed"


def test_no_statistics_are_no_evidence(load: Load) -> None:
    assert load(models.conv()).spec.source == "assumed"


HEADS: dict[str, tuple[list[tuple[str, list[float]]], float, str]] = {
    "over 255": ([("Div", [255.0])], 255, "rgb"),
    "times 1/255": ([("Mul", [1 / 255])], 255, "rgb"),
    "-1 to 1 of bytes": ([("Div", [127.5]), ("Sub", [1.0])], 255, "rgb"),
    "127 and 128": ([("Sub", [127.0]), ("Div", [128.0])], 255, "rgb"),
    "ImageNet": ([("Sub", [0.485, 0.456, 0.406]), ("Div", [0.229, 0.224, 0.225])], 1, "rgb"),
    "ImageNet of bytes": ([("Sub", [123.675, 116.28, 103.53]), ("Div", [58.395, 57.12, 57.375])], 255, "rgb"),
    "mean in BGR": ([("Sub", [103.939, 116.779, 123.68])], 255, "bgr"),
}


@pytest.mark.parametrize("name", HEADS)
def test_arithmetic_in_the_graph_tells_the_range(load: Load, name: str) -> None:
    steps, scale, order = HEADS[name]
    nodes, tensors, value = [], dict(models.head_tensors(3)), "image"
    for index, (op, numbers) in enumerate(steps):
        tensors[f"n{index}"] = np.array(numbers, np.float32).reshape(-1, 1, 1)
        nodes.append(models.node(op, f"{value} n{index}", f"v{index}"))
        value = f"v{index}"
    classifier = load(models.assemble([*nodes, *models.head(value)], tensors))
    spec = classifier.spec
    assert (spec.source, spec.scale, spec.mean, spec.std, spec.channels) == (
        "detected", scale, (0, 0, 0), (1, 1, 1), order,
    )  # fmt: skip
    x = spec.to_input(torch.rand(2, 3, 8, 8)).numpy()
    assert oracle.run(models.assemble([*nodes, *models.head(value)], tensors), x).shape == (2, models.CLASSES)
