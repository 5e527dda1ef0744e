"""A zoo whose members differ in size, normalisation, channels, layout and label space makes one set of images."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from converters.conversion import to_torch
from converters.errors import SpecError
from converters.export import write_kept
from converters.input_spec import InputSpec
from converters.load import load_classifier
from converters.torch_module import TorchClassifier
from recipes.images import load_images
from recipes.progress import Silent
from recipes.synth.engine import Batch, synthesize
from recipes.synth.objectives import batchnorm_loss
from recipes.synth.settings import Stage, SynthSettings
from recipes.synth.teachers import make_teachers
from recipes.validate import check_labels, count_classes

HOW = SynthSettings(
    images=6, batch=6, stages=(Stage(scale=0.5, steps=2), Stage(scale=1.0, steps=4)), label=0.5, mixing="label",
    jitter=(0.1, 0.1, 0.1, 0.1), shift=0.1, variation=0.01,
)  # fmt: skip


class LastAxis(nn.Module):
    """Takes [N, H, W, C]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2)


def module(folder: Path, name: str, spec: InputSpec, classes: int) -> TorchClassifier:
    """A small net with BatchNorm, random weights and random statistics, taking what `spec` says."""
    torch.manual_seed(len(name))
    channels = spec.channel_count
    norm = nn.BatchNorm2d(8)
    nn.init.normal_(norm.running_mean)
    net = nn.Sequential(
        LastAxis() if spec.layout == "NHWC" else nn.Identity(),
        nn.Conv2d(channels, 8, 3, padding=1), norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, classes),
    ).eval()  # fmt: skip
    shape = (2, channels, *spec.size) if spec.layout == "NCHW" else (2, *spec.size, channels)
    path = folder / f"{name}.onnx"
    write_kept(net, torch.rand(shape), path, spec)
    return to_torch(load_classifier(path))


@pytest.fixture
def unlike(tmp_path: Path) -> list[TorchClassifier]:
    gray = InputSpec(size=(28, 28), channels="gray", mean=(0.3,), std=(0.35,))
    rgb = InputSpec(size=(40, 32), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    bgr = InputSpec(
        size=(24, 24), channels="bgr", layout="NHWC", scale=255, mean=(127.0,) * 3, std=(128.0,) * 3, labels="other"
    )
    more = InputSpec(size=(20, 20), channels="gray", mean=(0.0,), std=(1.0,))
    return [
        module(tmp_path, "gray", gray, 10), module(tmp_path, "rgb", rgb, 10), module(tmp_path, "bgr", bgr, 10),
        module(tmp_path, "many", more, 100),
    ]  # fmt: skip


def test_one_image_serves_all(unlike: list[TorchClassifier], tmp_path: Path) -> None:
    """Of the largest size and with colours, as the one that asks for most; labels of the first model's space alone."""
    made = synthesize(unlike, tmp_path / "set", HOW)
    assert load_images(tmp_path / "set").pixels.shape == (6, 3, 40, 32)
    assert set(made.losses) == {
        "batchnorm/gray", "batchnorm/rgb", "batchnorm/bgr", "batchnorm/many", "label/gray", "label/rgb",
    }  # fmt: skip
    models = json.loads((tmp_path / "set" / "manifest.json").read_text())["identity"]["models"]
    assert [model["labels"] for model in models] == [True, True, False, False]


def test_every_member_moves_the_pixels(unlike: list[TorchClassifier]) -> None:
    """A gradient reaches the canonical images through each member's own size, colours, range and layout."""
    for member in unlike:
        teachers, _ = make_teachers(unlike, HOW)
        (only,) = [teacher for teacher in teachers if teacher.module is member]
        batch = Batch(teachers, HOW, (40, 32), torch.arange(6), 0)
        images = batch.start((40, 32)).requires_grad_(True)
        statistics, _ = only.look(images * batch.std + batch.mean)
        batchnorm_loss(statistics, only.norms).backward()
        assert images.grad is not None
        assert bool((images.grad.abs().amax((0, 2, 3)) > 0).all())  # every colour


def test_the_order_of_the_models_does_not_take_the_colours_away(unlike: list[TorchClassifier], tmp_path: Path) -> None:
    synthesize(unlike[::-1], tmp_path / "set", HOW)
    assert load_images(tmp_path / "set").pixels.shape == (6, 3, 40, 32)


def test_channels_that_cannot_be_adapted_are_named(
    unlike: list[TorchClassifier], tmp_path: Path, module_of: Callable[[str], TorchClassifier]
) -> None:
    four = InputSpec(size=(16, 16), channels=4, mean=(0.5,) * 4, std=(0.25,) * 4)
    with pytest.raises(SpecError, match=r"bands.*4 channels"):
        synthesize([*unlike, module(tmp_path, "bands", four, 10)], tmp_path / "set", HOW)
    assert not (tmp_path / "set").exists()


def test_a_batch_leaves_no_tensor_to_the_garbage_collector(unlike: list[TorchClassifier]) -> None:
    """Which comes by when it likes: memory grew with the number of images when steps left cycles behind."""
    gc.collect()
    gc.disable()
    try:
        teachers, _ = make_teachers(unlike, HOW)
        Batch(teachers, HOW, (40, 32), torch.arange(6), 0).optimise(Silent())
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        assert not [found for found in gc.garbage if isinstance(found, Tensor)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


@pytest.mark.parametrize("order", [("plain", "background"), ("background", "plain")])
def test_a_background_class_is_no_label(order: tuple[str, str], tmp_path: Path) -> None:
    """A model whose class 0 is background shares the labels of one without it, a class further up."""
    spec = InputSpec(size=(28, 28), channels="gray", mean=(0.3,), std=(0.35,))
    zoo = {
        "plain": module(tmp_path, "plain", spec, 10),
        "background": module(tmp_path, "background", spec.model_copy(update={"offset": 1}), 11),
    }
    made = synthesize([zoo[name] for name in order], tmp_path / "set", HOW)
    images = load_images(tmp_path / "set")
    assert images.labels is not None
    assert images.labels.tolist() == [0, 1, 3, 5, 6, 8]
    for name, offset in (("plain", 0), ("background", 1)):
        logits = zoo[name](zoo[name].spec.to_input(images.pixels))
        expected = float(cross_entropy(logits, images.labels + offset))
        assert made.losses[f"label/{name}"] == pytest.approx(expected, rel=1e-4)
        count = count_classes(zoo[name].classifier, images)
        check_labels(replace(images, label_kind="real"), count, zoo[name].classifier)
