"""What a file's layers store, which value of the reference each answers to, and values computed in batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from converters.classifier import Classifier
from converters.layer_values import LayerValue, Tap, layers_on_their_own, read_layers
from converters.load import load_classifier
from tests import models
from tests.models import node

Load = Callable[[onnx.ModelProto], Classifier]


@pytest.fixture
def pair(tmp_path: Path) -> Callable[[onnx.ModelProto, onnx.ModelProto], list[LayerValue]]:
    """The layers of a candidate, read against a reference."""

    def read(candidate: onnx.ModelProto, reference: onnx.ModelProto) -> list[LayerValue]:
        paths = tmp_path / "candidate.onnx", tmp_path / "reference.onnx"
        files = [load_classifier(models.write(m, p)) for m, p in zip((candidate, reference), paths, strict=True)]
        return read_layers(*files)

    return read


def stored(integers: np.ndarray, zero: np.ndarray, **attributes: Any) -> onnx.ModelProto:
    """A Conv whose weight is `integers` [4, 3, 3, 3] behind a DequantizeLinear."""
    nodes = [
        node("DequantizeLinear", "w.q w.scale w.zero", "w", **attributes),
        node("Conv", "image w", "features"),
        *models.head("features"),
    ]
    scale = np.full(zero.shape, 0.1, np.float32)
    return models.assemble(nodes, {"w.q": integers, "w.scale": scale, "w.zero": zero, **models.head_tensors(4)})


@pytest.mark.parametrize(("low", "high", "bits"), [(-2, 1, 2), (-4, 3, 3), (-7, 7, 4), (-127, 127, 8), (3, 3, 1)])
def test_bits_are_those_that_occur(load: Load, low: int, high: int, bits: int) -> None:
    """Whatever the container holds; a zero is where the integer is the zero point of its channel."""
    integers = np.full((4, 3, 3, 3), low, np.int8)
    integers[1:] = high
    zero = np.array([low, 0, 0, high], np.int8)
    model = load(stored(integers, zero, axis=0))
    layer, head = read_layers(model, model)
    zeros = 4 if high == 0 else 2
    assert (layer.bits, layer.container, layer.sparsity) == (bits, "int8", zeros / 4)
    assert (head.bits, head.container, head.op) == (None, "float", "Gemm")


def test_a_weight_quantized_at_every_run(load: Load) -> None:
    nodes = [
        node("QuantizeLinear", "w.float step zero", "w.q"),
        node("DequantizeLinear", "w.q step zero", "w"),
        node("Conv", "image w", "features"),
        *models.head("features"),
    ]
    tensors = {"w.float": models.weights(4, 3, 3, 3), "step": np.float32(0.1), "zero": np.array(0, np.int8)}
    model = load(models.assemble(nodes, {**tensors, **models.head_tensors(4)}))
    assert [(layer.bits, layer.container) for layer in read_layers(model, model)] == [(8, "float"), (None, "float")]


def quantized_input(*, clip: tuple[float, float] | None = None, absorbed: bool = False) -> onnx.ModelProto:
    """`models.conv`, its value `active` quantized to uint8; `absorbed` without the Relu, whose name the Conv has."""
    first = node("Conv", "image conv.weight conv.bias", "active" if absorbed else "features")
    tensors = {"conv.weight": models.weights(4, models.CHANNELS, 3, 3), "conv.bias": models.weights(4, seed=1)}
    tensors |= {"step": np.float32(0.25), "zero": np.array(0, np.uint8)}
    nodes = [first] if absorbed else [first, node("Relu", "features", "active")]
    if clip is not None:
        tensors |= {"low": np.float32(clip[0]), "high": np.float32(clip[1])}
        nodes.append(node("Clip", "active low high", "clipped"))
    nodes += [
        node("QuantizeLinear", f"{'clipped' if clip else 'active'} step zero", "few"),
        node("DequantizeLinear", "few step zero", "rounded"),
        node("Flatten", "rounded", "flat"),
        node("Gemm", "flat fc.weight", "logits", transB=1),
    ]
    return models.assemble(nodes, {**tensors, "fc.weight": models.weights(models.CLASSES, 144)})


@pytest.mark.parametrize(
    ("clip", "bits"), [(None, 8), ((0.0, 3.75), 4), ((0.0, 0.75), 2), ((0.0, 6.0), 5), ((0.0, 1e9), 8)]
)
def test_bits_of_a_layers_input(load: Load, clip: tuple[float, float] | None, bits: int) -> None:
    model = load(quantized_input(clip=clip))
    first, last = read_layers(model, model)
    assert (first.act_bits, last.act_bits) == (None, bits)


def test_a_relu_that_went_into_quantization(pair: Callable[..., list[LayerValue]]) -> None:
    """The Conv has the name of the Relu, and is compared with what the Relu reads; and the other way round."""
    plain, absorbed = quantized_input(), quantized_input(absorbed=True)
    first, last = pair(absorbed, plain)
    assert (first.value, first.measured, first.reference) == ("active", "active", "features")
    assert last.reads == ("active", "active")
    first, last = pair(plain, absorbed)
    assert (first.value, first.measured, first.reference) == ("features", "features", "active")
    assert last.reads is None  # the reference's `active` is what the Relu would read


@pytest.mark.parametrize("name", ["features", "normed"])
def test_a_folded_batchnorm(pair: Callable[..., list[LayerValue]], name: str) -> None:
    """Some tools keep the name of the Conv, some that of the BatchNormalization: both are compared with the latter."""
    nodes = [node("Conv", "image conv.weight", name, pads=[1, 1, 1, 1]), node("Relu", name, "active")]
    folded = models.assemble(
        [*nodes, *models.head("active")],
        {"conv.weight": models.weights(4, models.CHANNELS, 3, 3), **models.head_tensors(4)},
    )
    first = pair(folded, models.batchnorm())[0]
    assert (first.measured, first.reference) == (name, "normed")
    kept = pair(models.batchnorm(), models.batchnorm())[0]
    assert (kept.measured, kept.reference) == ("features", "features")


def test_an_output_that_was_renamed(pair: Callable[..., list[LayerValue]]) -> None:
    """What follows it is compared: behind a bias here."""
    renamed = models.matmul()
    for entry, name in ((renamed.graph.node[1].output, 0), (renamed.graph.node[2].input, 0)):
        entry[name] = "other"
    (layer,) = pair(renamed, models.matmul())
    assert (layer.value, layer.measured, layer.reference) == ("other", "logits", "logits")


def test_what_the_reference_does_not_have(pair: Callable[..., list[LayerValue]]) -> None:
    first, head = pair(models.conv(), models.matmul())
    assert (first.measured, first.reference) == (None, None)
    assert head.reference == "logits"


def test_layers_that_stand_alone_once_their_input_is_given(load: Load) -> None:
    model = load(models.smooth())
    assert layers_on_their_own(model, []) == {"a"}
    assert layers_on_their_own(model, ["silu"]) == {"a", "b"}
    assert layers_on_their_own(model, ["silu", "flat"]) == {"a", "b", "logits"}


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 8])
def test_values_do_not_depend_on_the_batch(load: Load, batch: int) -> None:
    model, x = load(models.smooth()), models.images(5)
    expected = Tap(model, ["b", "silu", "logits"]).run(x, 5)
    actual = Tap(model, ["b", "silu", "logits"]).run(x, batch)
    for name, array in expected.items():
        np.testing.assert_allclose(actual[name], array, rtol=1e-4, atol=1e-5)
    given = Tap(model, ["b", "logits"], {"silu": np.dtype(np.float32)}).run(0 * x, batch, {"silu": expected["silu"]})
    for name, array in given.items():
        np.testing.assert_allclose(array, expected[name], rtol=1e-4, atol=1e-5)
