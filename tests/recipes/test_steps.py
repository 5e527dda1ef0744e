"""The proof by steps: honest files hold whatever their logits do, and one wrong value is found and named."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from converters import steps
from converters.classifier import Classifier
from converters.errors import ConversionError
from converters.steps import Floats, Quantized
from converters.targets import choose_target
from recipes.images import ImageSet
from recipes.quantize import engine
from recipes.quantize.settings import PACKAGE, QuantizeSettings
from recipes.quantize.tables import Quantizers
from recipes.settings import load_recipe
from tests import models

Classifiers = Callable[[str], Classifier]
SETTINGS = load_recipe(QuantizeSettings, PACKAGE, "nearest", overrides=["range_steps=10", "batch=16", "equalise=0.5"])


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> list[Quantized]:
    """What is held against files: no difference of logits is small enough here."""
    seen: list[Quantized] = []
    hold = steps.hold

    def spy(model: object, values: object, logits: object, x: object, quantized: Quantized, path: object) -> None:
        seen.append(quantized)
        hold(model, values, logits, x, quantized, path)  # type: ignore[arg-type]  # whatever is given

    monkeypatch.setattr(engine, "FLIP_TOLERANCE", -1.0)
    monkeypatch.setattr(steps, "hold", spy)
    return seen


@pytest.mark.parametrize(
    ("target", "bits", "act_bits", "name"),
    [
        *(("portable", 4, 4, name) for name in ("plain", "inverted", "attention")),
        *(("ort-cpu", 8, 8, name) for name in ("inverted", "excite")),
        *((*how, name) for how in (("portable", 2, 16), ("tensorrt", 8, 8)) for name in ("plain", "attention")),
    ],
)
def test_honest_files_hold(
    name: str,
    target: str,
    bits: int,
    act_bits: int,
    held: list[Quantized],
    classifier_of: Classifiers,
    calibration_images: ImageSet,
    tmp_path: Path,
) -> None:
    output, chosen = tmp_path / "o.onnx", choose_target(target, None, act_bits)
    engine.quantize(classifier_of(name), calibration_images, output, SETTINGS, bits, act_bits, chosen)
    assert output.is_file()
    assert len(held) == 1
    assert len(held[0].steps) >= 4


def damage_one(
    monkeypatch: pytest.MonkeyPatch, choose: Callable[[Quantized], str], damage: Callable[[Floats, float], Floats]
) -> None:
    """From now on, one computed value is what `damage` makes of it and of its step (0 for logits)."""
    whole = Quantizers.quantized

    def damaged(quantizers: Quantizers) -> Quantized:
        quantized = whole(quantizers)
        assert quantized is not None
        compute, bad = quantized.compute, choose(quantized)

        def wrong(name: str, x: Floats, given: Mapping[str, Floats]) -> Floats:
            value = compute(name, x, given)
            return np.asarray(damage(value, quantized.steps.get(bad, 0.0))) if name == bad else value

        return replace(quantized, compute=wrong)

    monkeypatch.setattr(Quantizers, "quantized", damaged)


@pytest.mark.parametrize(
    ("index", "damage", "said"),
    [
        (2, lambda value, step: value + 2 * step * (np.arange(value.size).reshape(value.shape) == 7), "up to 2 steps"),
        (2, lambda value, step: value + step * (np.arange(value.size).reshape(value.shape) % 9 == 0), "in 11.1%"),
        (2, lambda value, step: value * np.nan, "nan steps"),
        (-1, lambda value, step: value + step, "in 100.0%"),  # the smallest, less than one in a thousand of all
    ],
)
def test_a_wrong_value_is_found(
    index: int,
    damage: Callable[[Floats, float], Floats],
    said: str,
    held: list[Quantized],
    monkeypatch: pytest.MonkeyPatch,
    classifier_of: Classifiers,
    calibration_images: ImageSet,
    tmp_path: Path,
) -> None:
    damage_one(monkeypatch, lambda quantized: list(quantized.steps)[index], damage)
    with pytest.raises(ConversionError, match=said):
        engine.quantize(classifier_of("inverted"), calibration_images, tmp_path / "o.onnx", SETTINGS, 4, 4)
    assert not (tmp_path / "o.onnx").exists()


def test_wrong_last_layers_are_found(
    held: list[Quantized],
    monkeypatch: pytest.MonkeyPatch,
    classifier_of: Classifiers,
    calibration_images: ImageSet,
    tmp_path: Path,
) -> None:
    damage_one(monkeypatch, lambda quantized: quantized.logits, lambda logits, _: logits * np.float32(1.01))
    with pytest.raises(ConversionError, match="the last layers of the written model differ"):
        engine.quantize(classifier_of("plain"), calibration_images, tmp_path / "o.onnx", SETTINGS, 4, 4)


@pytest.mark.parametrize("method", ["qdrop", "qat", "brecq"])
def test_what_was_trained_holds(
    method: str, held: list[Quantized], classifier_of: Classifiers, calibration_images: ImageSet, tmp_path: Path
) -> None:
    settings = load_recipe(QuantizeSettings, PACKAGE, method).model_copy(
        update={"steps": 3, "train_steps": 2 * (method == "qat"), "range_steps": 10, "batch": 16}
    )
    engine.quantize(classifier_of("inverted"), calibration_images, tmp_path / "o.onnx", settings, 4, 4)
    assert len(held) == 1


HEAD_OF_MAPS = [
    models.node("Conv", "image a.weight", "a"),
    models.node("Relu", "a", "relu"),
    models.node("GlobalAveragePool", "relu", "pooled"),
    models.node("Conv", "pooled head.weight", "logits"),
]
MAPS = {"a.weight": models.weights(8, models.CHANNELS, 3, 3), "head.weight": models.weights(models.CLASSES, 8, 1, 1)}


@pytest.mark.parametrize("batch", ["batch", 8])
def test_logits_as_maps_and_fewer_images_than_a_fixed_batch(
    batch: str | int, held: list[Quantized], load: Callable[[onnx.ModelProto], Classifier], tmp_path: Path
) -> None:
    model = models.assemble(HEAD_OF_MAPS, MAPS)
    for value, shape in (
        (model.graph.input[0], (batch, *models.IMAGE[1:])),
        (model.graph.output[0], (batch, models.CLASSES, 1, 1)),
    ):
        value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, onnx.TensorProto.FLOAT, shape))
    images = ImageSet(torch.rand(5, *models.IMAGE[1:], generator=torch.Generator().manual_seed(0)))
    engine.quantize(load(model), images, tmp_path / "o.onnx", SETTINGS, 4, 4)
    assert len(held) == 1
