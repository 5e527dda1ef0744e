"""What all recipes that write a smaller model prove of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch

from converters import conversion
from converters.classifier import Classifier
from converters.errors import ConversionError
from recipes.images import ImageSet
from recipes.prune.engine import prune
from recipes.prune.goal import make_goal
from recipes.prune.settings import PACKAGE as PRUNE
from recipes.prune.settings import PruneSettings
from recipes.quantize.engine import quantize
from recipes.quantize.settings import PACKAGE as QUANTIZE
from recipes.quantize.settings import QuantizeSettings
from recipes.settings import load_recipe
from tests import models

Make = Callable[[Classifier, ImageSet, Path], object]


def quantized(classifier: Classifier, images: ImageSet, output: Path) -> object:
    return quantize(classifier, images, output, load_recipe(QuantizeSettings, QUANTIZE, "nearest"), 4)


def pruned(classifier: Classifier, images: ImageSet, output: Path) -> object:
    settings = load_recipe(PruneSettings, PRUNE, "one-shot")
    return prune(classifier, images, output, settings, make_goal("unstructured", 0.5))


@pytest.mark.parametrize("make", [quantized, pruned])
def test_what_the_model_makes_of_the_last_digits_is_no_error(
    make: Make, load: Callable[[onnx.ModelProto], Classifier], monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier = load(models.chaotic())
    output = classifier.path.with_name("smaller.onnx")
    pixels = torch.rand(16, 3, *classifier.spec.size, generator=torch.Generator().manual_seed(0))
    make(classifier, ImageSet(pixels), output)
    assert output.is_file()
    output.unlink()
    to_torch = conversion.to_torch
    monkeypatch.setattr(conversion, "ROUNDING", 0.0)
    monkeypatch.setattr("recipes.workpiece.to_torch", lambda model, check=True: to_torch(model, check=False))
    with pytest.raises(ConversionError, match="the written model differs from the computed one"):
        make(classifier, ImageSet(pixels), output)
    assert not output.exists()
