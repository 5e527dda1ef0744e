"""Which images are made, and what cannot work on any of them is refused before."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from converters.classifier import Classifier
from converters.errors import MixMixError
from converters.load import load_classifier
from recipes import pipeline, zoo
from recipes.budget import Budget
from recipes.distill.settings import DistillSettings
from recipes.pipeline import (
    Request,
    Write,
    compress,
    distilling,
    load_suitable_recipe,
    pruning,
    pruning_then_quantizing,
    quantizing,
)
from recipes.progress import Silent
from recipes.prune.goal import Goal, make_goal
from recipes.prune.settings import PruneSettings
from recipes.quantize.settings import QuantizeSettings
from recipes.settings import load_recipe
from recipes.synth.settings import load_synth_recipe
from recipes.validate import Gates
from tests import models

HALF = make_goal("unstructured", 0.5)
QUANTIZE = load_recipe(QuantizeSettings, "recipes.quantize", "nearest")
DISTILL = DistillSettings(steps=1)


@pytest.mark.parametrize(
    ("names", "size", "recipe"),
    [
        (["inverted"], (28, 28), "small"),
        (["inverted"], (64, 64), "small"),
        (["inverted"], (64, 65), "default"),
        (["attention"], (28, 28), "small-labels"),
        (["attention"], (64, 65), "labels"),
        (["attention", "inverted"], (28, 28), "small"),
    ],
)
def test_the_recipe_fits_the_models(names: list[str], size: tuple[int, int], recipe: str) -> None:
    """Images have the size of the largest model's."""
    given = [load_classifier(zoo.model_path(name)) for name in names]
    given[-1] = replace(given[-1], spec=given[-1].spec.model_copy(update={"size": size}))
    name, settings = load_suitable_recipe(None, given, "default", (), None, {}, Silent())
    assert name == recipe
    assert settings == load_synth_recipe(recipe, "default", (), None, {})


class ImagesMadeError(Exception):
    """Raised where images would be made."""


@pytest.fixture(autouse=True)
def no_images(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(*_: object) -> None:
        raise ImagesMadeError

    monkeypatch.setattr(pipeline, "calibration_images", make)


@pytest.fixture
def plain(tmp_path: Path) -> Classifier:
    """Two layers: a convolution of 108 weights and a head of 20."""
    return load_classifier(models.write(models.conv(), tmp_path / "plain.onnx"))


@pytest.fixture
def quantized(tmp_path: Path) -> Classifier:
    """A Conv whose weight is stored in 8 bits."""
    tensors = {"stored": np.ones((4, models.CHANNELS, 3, 3), np.int8), "scale": np.float32(0.1)}
    nodes = [
        models.node("DequantizeLinear", "stored scale", "weight"),
        models.node("Conv", "image weight", "features"),
        *models.head("features"),
    ]
    model = models.assemble(nodes, tensors | models.head_tensors(4))
    return load_classifier(models.write(model, tmp_path / "quantized.onnx"))


def ask(write: Write, classifier: Classifier, student: Classifier | None = None, images: int | None = None) -> None:
    request = Request(
        classifier=classifier,
        zoo=[],
        data=None,
        output=classifier.path.parent / "output.onnx",
        recipe="default",
        synth_recipe=None,
        effort="fast",
        images=images,
        gates=Gates(),
        seed=0,
        device=torch.device("cpu"),
        overwrite=False,
        version="0",
        student=student,
    )
    compress(request, write, Silent())


def test_what_can_work_comes_to_the_images(plain: Classifier) -> None:
    for write, student in (
        (quantizing(QUANTIZE, 4, 8), None),
        (pruning(PruneSettings(), HALF), None),
        (pruning(PruneSettings(), make_goal("channel", 0.3)), None),
        (pruning(PruneSettings(), make_goal("2:4", None)), None),
        (pruning_then_quantizing(PruneSettings(), HALF, QUANTIZE, 4), None),
        (distilling(DISTILL), plain),
    ):
        with pytest.raises(ImagesMadeError):
            ask(write, plain, student)


@pytest.mark.parametrize(
    "write",
    [
        quantizing(QUANTIZE, 4, None),
        pruning(PruneSettings(), HALF),
        pruning_then_quantizing(PruneSettings(), HALF, QUANTIZE, 4),
    ],
    ids=["quantize", "prune", "both"],
)
def test_a_quantized_model(write: Write, quantized: Classifier) -> None:
    with pytest.raises(MixMixError, match="quantized already"):
        ask(write, quantized)


def test_a_quantized_student(plain: Classifier, quantized: Classifier) -> None:
    with pytest.raises(MixMixError, match=r"quantized\.onnx is quantized already"):
        ask(distilling(DISTILL), plain, quantized)


def test_a_student_of_other_classes(plain: Classifier, tmp_path: Path) -> None:
    model = models.assemble(
        [models.node("Flatten", "image", "flat"), models.node("Gemm", "flat w", "logits", transB=1)],
        {"w": models.weights(7, models.PIXELS)},
        outputs={"logits": ("batch", 7)},
    )
    student = load_classifier(models.write(model, tmp_path / "student.onnx"))
    with pytest.raises(MixMixError, match=r"has 5 classes and .* has 7"):
        ask(distilling(DISTILL), plain, student)


def test_one_image_for_a_student(plain: Classifier) -> None:
    with pytest.raises(MixMixError, match="--images 1 comes to one image"):
        ask(distilling(DISTILL), plain, plain, images=1)


@pytest.mark.parametrize(
    ("settings", "goal", "said"),
    [
        ({}, make_goal("1:7", None), "pattern 1:7 fits"),
        ({}, make_goal("unstructured", 0.99), "cannot be reached"),
        ({"allocation": "global"}, make_goal("unstructured", 0.99), "cannot be reached"),
        ({"allocation": "uniform"}, HALF, "dense_first=false"),
        ({}, make_goal("channel", None, 0.01), "give --macs 0.5 or more"),
    ],
    ids=["pattern", "most", "global", "uniform", "channels"],
)
@pytest.mark.parametrize("bits", [None, 4])
def test_a_goal_that_cannot_be_reached(
    bits: int | None, settings: dict[str, object], goal: Goal, said: str, plain: Classifier
) -> None:
    prune = PruneSettings.model_validate(settings)
    write = pruning(prune, goal) if bits is None else pruning_then_quantizing(prune, goal, QUANTIZE, bits)
    with pytest.raises(MixMixError, match=said):
        ask(write, plain)


@pytest.mark.parametrize("budget", ["size=1kB", "bops=1k"])
def test_a_budget_that_cannot_be_kept(budget: str, plain: Classifier) -> None:
    with pytest.raises(MixMixError, match=f"--mixed {budget[:4]}.* cannot be reached"):
        ask(quantizing(QUANTIZE, Budget.parse(budget)), plain)


def test_the_bytes_that_a_refusal_names_are_enough(plain: Classifier) -> None:
    """But for the number of images, which the file says too."""
    with pytest.raises(MixMixError, match="cannot be reached") as refused:
        ask(quantizing(QUANTIZE, Budget.parse("size=1kB")), plain)
    (named,) = re.findall(r"it is size=(\d+)B", str(refused.value))
    with pytest.raises(ImagesMadeError):
        ask(quantizing(QUANTIZE, Budget.parse(f"size={named}B")), plain)
    with pytest.raises(MixMixError, match="cannot be reached"):
        ask(quantizing(QUANTIZE, Budget.parse(f"size={int(named) - 1}B")), plain)


def test_a_model_without_channels_to_remove(tmp_path: Path) -> None:
    model = load_classifier(models.write(models.gemm(trans_b=1), tmp_path / "gemm.onnx"))
    with pytest.raises(MixMixError, match="no channels that can be removed"):
        ask(pruning(PruneSettings(), make_goal("channel", 0.5)), model)
