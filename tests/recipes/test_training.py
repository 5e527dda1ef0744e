"""The loop that trains whole networks, and quantization-aware training on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from converters.classifier import Classifier
from converters.errors import MixMixError
from recipes.augment import Augmentation
from recipes.images import ImageSet
from recipes.progress import Silent
from recipes.quantize.engine import quantize
from recipes.quantize.quantizers import QuantizedWeight
from recipes.quantize.settings import PACKAGE, QuantizeSettings
from recipes.ranks import Part
from recipes.reconstruct import Group
from recipes.settings import load_recipe, recipe_names
from recipes.training import Training, train
from recipes.validate import decibels
from tests.recipes.test_quantize import assert_the_file_is_the_simulation, run

Classifiers = Callable[[str], Classifier]
PLAIN = Training(steps=200, batch=8, warmup=0.1, mixing=0.0, rate_key="rate")


def test_the_loop_finds_a_minimum(generator: torch.Generator) -> None:
    """A mean of the pixels is learned: the mean squared difference is least there."""
    images, value = ImageSet(torch.rand(50, 1, 4, 4, generator=generator)), torch.zeros(1, 4, 4)
    with Silent().task("", 1) as task:
        groups = [Group([value], 0.1)]
        train(images, groups, lambda x, _: (x - value).square().mean(), PLAIN, generator, task)
    torch.testing.assert_close(value, images.pixels.mean(0), atol=0.03, rtol=0)
    assert not value.requires_grad


def test_every_image_is_seen_once_a_round(generator: torch.Generator) -> None:
    images, value = ImageSet(torch.arange(20.0).view(20, 1, 1, 1)), torch.zeros(1)
    seen: list[float] = []

    def loss_of(pixels: torch.Tensor, _: Part) -> torch.Tensor:
        seen.extend(pixels.flatten().tolist())
        return value.sum()

    with Silent().task("", 1) as task:
        how = Training(steps=5, batch=8, warmup=0.0, mixing=0.0, rate_key="rate")
        train(images, [Group([value], 0.1)], loss_of, how, generator, task)
    assert sorted(seen[:20]) == list(range(20))
    assert len(seen) == 8 + 8 + 4 + 8 + 8


def test_rates_rise_and_fall_to_almost_nothing() -> None:
    how = Training(steps=100, batch=8, warmup=0.1, mixing=0.0, rate_key="rate")
    rates = [how.factor(step) for step in range(100)]
    assert rates.index(max(rates)) == 10
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert min(rates) > 0
    assert rates[-1] < 0.001


def test_rates_are_a_tenth_from_each_milestone_on() -> None:
    how = Training(steps=100, batch=8, warmup=0.0, mixing=0.0, rate_key="rate", milestones=(0.2, 0.5))
    assert [how.factor(step) for step in (0, 19, 20, 49, 50, 99)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_the_papers_training_is_its_appendix() -> None:
    """Seed, B.3."""
    paper = load_recipe(QuantizeSettings, PACKAGE, "qat", "paper")
    assert paper.train_features == 300
    assert paper.train_jitter == (0.2, 0.2, 0.2, 0.1)
    assert (paper.train_grayscale, paper.train_blur, paper.train_flip) == (0.2, 0.5, True)
    assert [share * paper.train_steps for share in paper.train_milestones] == [4000, 10000, 20000]
    assert (paper.train_shift, paper.train_mixing) == (0, 0)


def test_every_setting_of_training_reaches_it(
    monkeypatch: pytest.MonkeyPatch, classifier_of: Classifiers, calibration_images: ImageSet, tmp_path: Path
) -> None:
    asked: list[Training] = []
    monkeypatch.setattr("recipes.quantize.train.train", lambda *given, **_: asked.append(given[3]))
    settings = load_recipe(QuantizeSettings, PACKAGE, "qat", "paper").model_copy(
        update={"steps": 0, "range_steps": 5, "train_batch": 9, "train_warmup": 0.3, "train_mixing": 0.6}
        | {"train_shift": 0.05}
    )
    quantize(classifier_of("plain"), calibration_images.take(8), tmp_path / "o.onnx", settings, 4)
    (how,) = asked
    assert how == Training(
        steps=25000,
        batch=9,
        warmup=0.3,
        mixing=0.6,
        rate_key="train_rate",
        augmentation=Augmentation(
            flip=True, shift=0.05, jitter=(0.2, 0.2, 0.2, 0.1), grayscale=0.2, blur=0.5, sigma=(1.0, 2.0)
        ),
        milestones=(0.16, 0.4, 0.8),
    )


def test_what_is_trained_on_is_augmented(generator: torch.Generator) -> None:
    images, value = ImageSet(torch.rand(6, 3, 8, 8, generator=generator)), torch.zeros(1)
    how = Training(steps=1, batch=6, warmup=0.0, mixing=0.0, rate_key="rate", augmentation=Augmentation(grayscale=1.0))

    def loss_of(pixels: torch.Tensor, _: Part) -> torch.Tensor:
        torch.testing.assert_close(pixels, pixels[:, :1].expand_as(pixels))
        return value.sum()

    with Silent().task("", 1) as task:
        train(images, [Group([value], 0.1)], loss_of, how, generator, task)


def test_divergence_is_said(generator: torch.Generator) -> None:
    value = torch.ones(1)
    with (
        Silent().task("", 1) as task,
        pytest.raises(MixMixError, match="training diverged: lower its rate with --set rate="),
    ):
        train(
            ImageSet(torch.ones(4, 1, 2, 2)),
            [Group([value], 1.0)],
            lambda x, _: value * torch.inf,
            PLAIN,
            generator,
            task,
        )


def test_free_training_starts_where_rounding_left_off_and_goes_any_distance() -> None:
    settings = QuantizeSettings(unit="block", rounding="offset", range_steps=10)
    weight = QuantizedWeight(torch.randn(4, 6), 0, 4, settings)
    weight.learn()
    assert weight.rounding is not None
    weight.rounding.trained.uniform_(-0.6, 0.6)
    weight.harden()
    before, integers = weight.tensor(), weight.integers()
    weight.learn_freely()
    torch.testing.assert_close(weight.tensor(), before)
    group = weight.groups()[0]
    assert group.rate == settings.rounding_rate
    (free,) = group.tensors
    free.requires_grad_(True)
    weight.tensor().sum().backward()
    assert free.grad is not None
    with torch.no_grad():
        free[0, 0] -= 3 * torch.sign(free[0, 0])
    weight.harden()
    assert abs(float(weight.integers()[0, 0] - integers[0, 0])) == 3


@pytest.mark.parametrize(("bits", "act_bits"), [(2, None), (3, 4)])
def test_training_brings_the_logits_nearer(
    bits: int, act_bits: int | None, classifier_of: Classifiers, calibration_images: ImageSet, tmp_path: Path
) -> None:
    """On the images that it learns from, and the file is what was trained."""
    classifier, noise, before = classifier_of("plain"), [], {}
    reference = run(classifier.path, classifier, calibration_images.pixels)
    for steps in (0, 25):
        settings = load_recipe(QuantizeSettings, PACKAGE, "qat").model_copy(
            update={"steps": 0, "range_steps": 20, "train_steps": steps, "train_batch": 32, "train_mixing": 0.0}
        )
        output = tmp_path / f"{steps}.onnx"
        result = quantize(classifier, calibration_images, output, settings, bits, act_bits)
        assert_the_file_is_the_simulation(result, classifier, calibration_images)
        after = dict(result.blocks)
        if steps:
            assert after.keys() == before.keys()  # measured again
            assert sum(error.after for error in after.values()) < sum(error.after for error in before.values())
        before = after
        noise.append(decibels(reference.astype("float64"), run(output, classifier, calibration_images.pixels)))
    assert noise[1] > noise[0] + 2


def test_without_steps_nothing_is_trained() -> None:
    steps = {name: load_recipe(QuantizeSettings, PACKAGE, name).train_steps for name in recipe_names(PACKAGE)}
    assert [name for name, count in steps.items() if count] == ["qat"]
