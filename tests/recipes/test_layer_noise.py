"""Signal-to-noise by layer: figures by hand, files of other tools, and one damaged layer found among noisy ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

from converters.classifier import Classifier
from converters.load import load_classifier
from recipes import layer_noise, zoo
from recipes.images import ImageSet
from recipes.layer_noise import LayerNoise, measure_layers
from recipes.quantize.engine import quantize
from recipes.quantize.settings import PACKAGE, QuantizeSettings
from recipes.settings import load_recipe
from recipes.validate import validate
from tests import hard_cases, models

Classifiers = Callable[[str], Classifier]
GRAY = {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0], "scale": 1.0}


@pytest.fixture
def images() -> ImageSet:
    """Seven images, an odd number."""
    return ImageSet(torch.rand(7, *models.IMAGE[1:], generator=torch.Generator().manual_seed(0)))


@pytest.fixture(scope="module")
def two_bits(
    tmp_path_factory: pytest.TempPathFactory, classifier_of: Classifiers, calibration_images: ImageSet
) -> Path:
    """`plain` with weights of 2 bits, rounded to nearest."""
    output = tmp_path_factory.mktemp("noise") / "plain.w2.onnx"
    quantize(
        classifier_of("plain"), calibration_images, output, load_recipe(QuantizeSettings, PACKAGE, "nearest"), 2, None
    )
    return output


def named(path: Path, model: onnx.ModelProto) -> Classifier:
    return load_classifier(models.write(model, path), dict(GRAY))


def layers_of(reference: Classifier, candidate: Classifier, images: ImageSet) -> list[LayerNoise]:
    found = validate(reference, [candidate], images, layers=True, threads=1).candidates[0].layers
    assert found is not None
    return found


def by_value(layers: list[LayerNoise]) -> dict[str, LayerNoise]:
    return {layer.value: layer for layer in layers}


def test_layers_are_measured_only_when_asked_for(tmp_path: Path, images: ImageSet) -> None:
    model = named(tmp_path / "m.onnx", models.conv())
    assert validate(model, [model], images, threads=1).candidates[0].layers is None


def test_figures_by_hand(tmp_path: Path, images: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise on two layers, in numpy: the second carries the first's as the file runs, and only its own alone."""
    square, head = models.weights(models.PIXELS, 6, fan_in=models.PIXELS), models.weights(6, models.CLASSES, seed=1)
    noisy = square + 0.01 * models.random(*square.shape, seed=2), head + 0.2 * models.random(*head.shape, seed=3)
    nodes = [
        models.node("Flatten", "image", "flat"),
        models.node("MatMul", "flat first", "between"),
        models.node("MatMul", "between second", "logits"),
    ]
    reference = named(tmp_path / "a.onnx", models.assemble(nodes, {"first": square, "second": head}))
    candidate = named(tmp_path / "b.onnx", models.assemble(nodes, {"first": noisy[0], "second": noisy[1]}))
    x = images.pixels.reshape(7, -1).numpy().astype(np.float64)

    def snr(expected: np.ndarray, actual: np.ndarray) -> float:
        return float(10 * np.log10(np.square(expected).sum() / np.square(actual - expected).sum()))

    first, second = x @ square, x @ square @ head
    for step in (1, 4, 7, 50):
        monkeypatch.setattr(layer_noise, "STEP", step)
        found = by_value(layers_of(reference, candidate, images))
        assert found["between"].snr == pytest.approx(snr(first, x @ noisy[0]), abs=1e-3)
        assert found["between"].own_snr == pytest.approx(found["between"].snr, abs=1e-3)
        assert found["logits"].snr == pytest.approx(snr(second, x @ noisy[0] @ noisy[1]), abs=1e-3)
        assert found["logits"].own_snr == pytest.approx(snr(second, first @ noisy[1]), abs=1e-3)
        assert list(found) == ["logits", "between"]


def test_only_the_first_images_are_run(tmp_path: Path) -> None:
    model, asked = named(tmp_path / "m.onnx", models.conv()), []

    def inputs(_: Classifier, start: int, stop: int) -> np.ndarray:
        asked.append((start, stop))
        return models.images(stop - start)

    measure_layers(model, model, inputs, 1000, threads=1)
    assert max(stop for _, stop in asked) == layer_noise.IMAGES
    assert max(stop - start for start, stop in asked) == layer_noise.STEP


@pytest.mark.parametrize("damaged", ["/4/BatchNormalization_output_0", "/10/BatchNormalization_output_0", "logits"])
def test_the_damaged_layer_comes_first(
    classifier_of: Classifiers, judging_images: ImageSet, two_bits: Path, tmp_path: Path, damaged: str
) -> None:
    """Its integers in another order: what follows runs on garbage, but only this layer makes it."""
    images = judging_images.take(32)
    before = by_value(layers_of(classifier_of("plain"), load_classifier(two_bits), images))
    model = ir.load(two_bits)
    layer = next(node for node in model.graph if node.outputs[0].name == damaged)
    integers = layer.inputs[1].producer().inputs[0]
    array = integers.const_value.numpy()
    shuffled = np.random.default_rng(0).permutation(array.ravel()).reshape(array.shape)
    integers.const_value = ir.tensor(shuffled, dtype=integers.const_value.dtype, name=integers.name)
    ir.save(model, tmp_path / "damaged.onnx")
    after = layers_of(classifier_of("plain"), load_classifier(tmp_path / "damaged.onnx"), images)
    assert after[0].value == damaged
    assert after[0].own_snr < 3 < before[damaged].own_snr
    for other in after[1:]:
        assert other.own_snr == pytest.approx(before[other.value].own_snr, abs=0.01)
    assert next(iter(before)) != damaged


def test_a_file_of_ours(classifier_of: Classifiers, judging_images: ImageSet, two_bits: Path) -> None:
    """BatchNorm is folded in the file and kept in the reference; first and last layer keep 8 bits."""
    layers = layers_of(classifier_of("plain"), load_classifier(two_bits), judging_images.take(32))
    assert len(layers) == 7
    assert sorted(layer.bits or 0 for layer in layers)[0] == 2
    assert all(layer.snr is not None and layer.own_snr is not None and layer.reason is None for layer in layers)
    assert [layer.own_snr for layer in layers] == sorted(layer.own_snr for layer in layers)
    first = by_value(layers)["/1/BatchNormalization_output_0"]
    assert (first.bits, first.container) == (8, "int8")
    assert first.own_snr == pytest.approx(first.snr)  # it reads the image
    assert min(layer.own_snr for layer in layers if layer.bits == 8) > 30
    assert max(layer.own_snr for layer in layers if layer.bits == 2) < 20


class Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
    """Calibration batches, as onnxruntime's quantizer takes them."""

    def __init__(self, name: str, batches: Iterator[np.ndarray]) -> None:
        self._batches = ({name: batch} for batch in batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._batches, None)


@pytest.mark.parametrize(
    ("name", "per_channel"), [("plain", False), ("inverted_folded", True), ("attention", False), ("attention", True)]
)
def test_a_file_of_onnxruntime(
    classifier_of: Classifiers, calibration_images: ImageSet, tmp_path: Path, name: str, per_channel: bool
) -> None:
    """It removes Relu and Clip, renames outputs, and quantizes every input: all layers are found, none is far off."""
    reference, path = classifier_of(name), tmp_path / "q.onnx"
    inputs = reference.spec.to_input(calibration_images.pixels).numpy()
    reader = Reader(reference.input_name, iter(np.split(inputs, 4)))
    quantize_static(zoo.model_path(name), path, reader, quant_format=QuantFormat.QDQ, per_channel=per_channel)
    layers = layers_of(reference, load_classifier(path), calibration_images)
    count = sum(node.op_type in ("Conv", "Gemm", "MatMul") for node in onnx.load(path).graph.node)
    products = 6 if name == "attention" else 0  # of two activations, in three blocks
    assert len(layers) == count - products
    assert {(layer.bits, layer.act_bits) for layer in layers} == {(8, 8)}
    assert all(layer.compared is not None and layer.own_snr is not None for layer in layers)
    assert min(layer.own_snr for layer in layers if layer.own_snr is not None) > (10 if per_channel else 3)
    assert np.median([layer.own_snr for layer in layers if layer.own_snr is not None]) > 20


@pytest.mark.parametrize("count", [7, 2])
def test_any_number_of_images_for_any_fixed_batch(tmp_path: Path, images: ImageSet, count: int) -> None:
    """Batches of four, of three, and any."""
    files = {
        batch: named(tmp_path / f"{batch}.onnx", models.conv(image=(batch, *models.IMAGE[1:])))
        for batch in ("batch", 4, 3)
    }
    for reference in files.values():
        for candidate in files.values():
            layers = layers_of(reference, candidate, images.take(count))
            assert all(layer.snr > 100 and layer.own_snr > 100 for layer in layers)  # type: ignore[operator]


@pytest.mark.parametrize(
    "case", ["bytes_in", "float16_weight", "quantized", "softmax", "conv_transpose", "local_function"]
)
def test_a_file_is_equal_to_itself(tmp_path: Path, images: ImageSet, case: str) -> None:
    model = load_classifier(models.write(hard_cases.CASES[case](), tmp_path / "m.onnx"))
    layers = layers_of(model, model, images)
    assert layers
    assert {(layer.snr, layer.own_snr, layer.reason) for layer in layers} == {
        (math.inf, math.inf, "equal to the reference")
    }


def test_a_file_in_float16(tmp_path: Path, images: ImageSet) -> None:
    reference = named(tmp_path / "a.onnx", models.conv())
    candidate = named(tmp_path / "b.onnx", hard_cases.in_type(TensorProto.FLOAT16))
    layers = layers_of(reference, candidate, images)
    assert [layer.container for layer in layers] == ["float16", "float16"]
    assert all(50 < layer.own_snr < 100 and 50 < layer.snr < 100 for layer in layers)  # type: ignore[operator]


def test_what_cannot_be_compared_says_why(tmp_path: Path, images: ImageSet) -> None:
    wider = models.conv()
    tensors = {tensor.name: tensor for tensor in wider.graph.initializer}
    for name, array in {
        "conv.weight": models.weights(6, models.CHANNELS, 3, 3),
        "conv.bias": models.weights(6, seed=1),
        "head.weight": models.weights(models.CLASSES, 6),
    }.items():
        tensors[name].CopyFrom(numpy_helper.from_array(array, name))
    reference = named(tmp_path / "a.onnx", models.conv())
    *_, last = layers = layers_of(reference, named(tmp_path / "b.onnx", wider), images)
    assert (last.value, last.snr, last.own_snr) == ("features", None, None)
    assert last.reason == "its shape is [4, 6, 6, 6], in the reference [4, 4, 6, 6]"
    assert layers[0].snr is not None  # the logits
    *_, last = layers_of(named(tmp_path / "c.onnx", models.matmul()), reference, images)
    assert (last.value, last.compared) == ("features", None)
    assert "no value of its name" in str(last.reason)


def test_a_layer_that_overflows_comes_first(tmp_path: Path, images: ImageSet) -> None:
    broken = models.conv()
    weight = next(tensor for tensor in broken.graph.initializer if tensor.name == "head.weight")
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1e37), weight.name))
    reference, candidate = named(tmp_path / "a.onnx", models.conv()), named(tmp_path / "b.onnx", broken)
    layer = layers_of(reference, candidate, ImageSet(100 * images.pixels))[0]
    assert (layer.value, layer.snr, layer.reason) == ("logits", -math.inf, "infinite or no numbers")
