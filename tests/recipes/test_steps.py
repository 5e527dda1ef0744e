"""The proof by steps: honest files hold whatever their logits do, and one wrong value is found and named."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from converters import steps
from converters.classifier import Classifier
from converters.errors import ConversionError
from converters.steps import Floats, Quantized
from converters.targets import choose_target
from recipes.images import ImageSet
from recipes.quantize import engine
from recipes.quantize.settings import PACKAGE, QuantizeSettings
from recipes.settings import load_recipe

Classifiers = Callable[[str], Classifier]
SETTINGS = load_recipe(QuantizeSettings, PACKAGE, "nearest", overrides=["range_steps=10", "batch=16", "equalise=0.5"])


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> list[Quantized]:
    """What is held against files: no difference of logits is small enough here."""
    seen: list[Quantized] = []
    hold = steps.hold

    def spy(model: object, values: object, x: object, quantized: Quantized, path: object) -> None:
        seen.append(quantized)
        hold(model, values, x, quantized, path)  # type: ignore[arg-type]  # whatever is given

    monkeypatch.setattr(engine, "FLIP_TOLERANCE", -1.0)
    monkeypatch.setattr(steps, "hold", spy)
    return seen


@pytest.mark.parametrize(
    ("target", "bits", "act_bits"), [("portable", 4, 4), ("portable", 2, 16), ("ort-cpu", 8, 8), ("tensorrt", 8, 8)]
)
@pytest.mark.parametrize("name", ["plain", "inverted", "dense", "excite", "attention"])
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


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (
            lambda value, step: np.where(np.arange(value.size).reshape(value.shape) == 7, value + 2 * step, value),
            "2 st",
        ),
        (lambda value, step: np.where(np.arange(value.size).reshape(value.shape) % 9, value, value + step), "a step f"),
        (lambda value, step: value * np.nan, "nan steps"),
    ],
)
def test_a_wrong_value_is_found(
    damage: Callable[[Floats, float], Floats],
    said: str,
    held: list[Quantized],
    monkeypatch: pytest.MonkeyPatch,
    classifier_of: Classifiers,
    calibration_images: ImageSet,
    tmp_path: Path,
) -> None:
    def damaged(run: engine._Run) -> Quantized:
        quantized = whole(run)
        assert quantized is not None
        compute, bad = quantized.compute, list(quantized.steps)[2]

        def wrong(name: str, x: Floats, given: Mapping[str, Floats]) -> Floats:
            value = compute(name, x, given)
            return np.asarray(damage(value, quantized.steps[bad])) if name == bad else value

        return replace(quantized, compute=wrong)

    whole = engine._Run.quantized
    monkeypatch.setattr(engine._Run, "quantized", damaged)
    with pytest.raises(ConversionError, match=said):
        engine.quantize(classifier_of("plain"), calibration_images, tmp_path / "o.onnx", SETTINGS, 4, 4)
    assert not (tmp_path / "o.onnx").exists()


def test_wrong_last_layers_are_found(
    held: list[Quantized],
    monkeypatch: pytest.MonkeyPatch,
    classifier_of: Classifiers,
    calibration_images: ImageSet,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(steps, "TOLERANCE", -1.0)
    with pytest.raises(ConversionError, match="the last layers of the written model differ"):
        engine.quantize(classifier_of("plain"), calibration_images, tmp_path / "o.onnx", SETTINGS, 4, 4)
