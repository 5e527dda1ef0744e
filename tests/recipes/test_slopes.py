"""What a block's error does to the logits: finite differences as the oracle, and the same whatever fits into memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

from converters.classifier import Classifier
from converters.conversion import to_torch
from converters.load import load_classifier
from converters.torch_module import TorchClassifier
from recipes import zoo
from recipes.images import ImageSet
from recipes.objective import BlockError, Objective, moved
from recipes.progress import Silent, Task
from recipes.prune.engine import prune
from recipes.prune.goal import make_goal
from recipes.prune.settings import PACKAGE as PRUNE
from recipes.prune.settings import PruneSettings
from recipes.quantize.engine import quantize
from recipes.quantize.settings import PACKAGE, QuantizeSettings
from recipes.reconstruct import Changes, Stretch, walk_blocks
from recipes.settings import LoopSettings, load_recipe
from recipes.slopes import Slopes
from recipes.validate import decibels

COUNT = 6
SETTINGS = LoopSettings(logit_share=0.25, batch=4)


def stretches(
    module: TorchClassifier, images: ImageSet, count: int = COUNT, settings: LoopSettings = SETTINGS
) -> list[Stretch]:
    inputs = module.spec.to_input(images.pixels[:count])
    return [replace(stretch) for stretch in walk_blocks(module, inputs, Changes((), {}), settings)]


def all_slopes(module: TorchClassifier, found: list[Stretch], settings: LoopSettings = SETTINGS) -> list[Tensor]:
    slopes = Slopes(module, settings)
    return [s for s in map(slopes.of, found) if s is not None]


@pytest.mark.parametrize("name", ["residual", "attention"])
def test_a_small_error_moves_the_logits_as_slopes_say(
    module_of: Callable[[str], TorchClassifier], calibration_images: ImageSet, name: str
) -> None:
    module = module_of(name)
    found = stretches(module, calibration_images)
    generator = torch.Generator().manual_seed(0)
    for stretch, slopes in zip(found[:-1], all_slopes(module, found), strict=True):
        assert slopes.shape == (COUNT, 10, *stretch.target.shape[1:])  # each of the ten classes
        rest = module.segment([stretch.block.output], [module.logits_name])
        size = 1e-3 * float(stretch.target.square().mean().sqrt())
        d = size * torch.randn(stretch.target.shape, generator=generator)
        up, down = (rest({stretch.block.output: stretch.target + s * d})[module.logits_name] for s in (1, -1))
        order = up.add(down).argsort(dim=1, descending=True)
        expected = ((up - down) / 2).gather(1, order)
        assert (
            float((moved(d, slopes, torch.arange(len(d))) - expected).square().mean() / expected.square().mean())
            < 0.03**2
        )


def test_the_largest_logits_come_first(
    module_of: Callable[[str], TorchClassifier], calibration_images: ImageSet
) -> None:
    """With fewer directions than classes, each image has those of its own largest logits."""
    module = module_of("residual")
    found = stretches(module, calibration_images)
    few = SETTINGS.model_copy(update={"logit_directions": 3 * COUNT})
    for three, ten in zip(all_slopes(module, found, few), all_slopes(module, found), strict=True):
        assert torch.equal(three, ten[:, :3])


@pytest.mark.parametrize(("name", "count", "batch"), [("residual", COUNT, 4), ("excite", 20, 32)])
def test_slopes_do_not_depend_on_where_a_pass_began(
    module_of: Callable[[str], TorchClassifier], calibration_images: ImageSet, name: str, count: int, batch: int
) -> None:
    """Little memory means a pass for each block, on disk; an interrupted run begins in the middle.

    The 1x1 convolutions on one pixel of `excite` round by how many images there are.
    """
    module, settings = module_of(name), SETTINGS.model_copy(update={"batch": batch})
    found = stretches(module, calibration_images, count, settings)
    at_once = all_slopes(module, found, settings)
    assert len(at_once) == len(found) - 1 > 2
    little = settings.model_copy(update={"cache_limit": 1e-9})
    for slopes, again in zip(at_once, all_slopes(module, found, little), strict=True):
        assert torch.equal(slopes, again)
        assert again.untyped_storage().filename is not None
    sizes = [slopes.numel() * 2 / 1e9 for slopes in at_once]  # bfloat16, in gigabytes
    some = settings.model_copy(update={"cache_limit": 1.01 * (sizes[0] + sizes[1])})  # the first two, then one by one
    assert all(torch.equal(a, b) for a, b in zip(at_once, all_slopes(module, found, some), strict=True))
    later = all_slopes(module, found[2:], settings)
    assert all(torch.equal(a, b) for a, b in zip(at_once[2:], later, strict=True))


def test_nobody_asks_for_slopes_of_the_logits_or_at_a_share_of_nothing(
    module_of: Callable[[str], TorchClassifier], calibration_images: ImageSet
) -> None:
    module = module_of("residual")
    found = stretches(module, calibration_images)
    assert Slopes(module, SETTINGS).of(found[-1]) is None
    assert all_slopes(module, found, LoopSettings()) == []


def test_the_objective_is_the_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    target, y, slopes = (torch.randn(shape, generator=generator) for shape in ((5, 3, 2), (5, 3, 2), (5, 4, 3, 2)))
    plain = BlockError(output=0.3, logits=7.0)
    rows = torch.tensor([3, 0])
    d = y[rows] - target[rows]
    local = float(d.square().mean() / target.square().mean())
    logits = float((slopes[rows] * d[:, None]).sum((2, 3)).square().mean())
    objective = Objective(target, slopes, 0.25)
    assert float(objective.loss(y[rows], rows, plain)) == pytest.approx(
        0.75 * local / 0.3 + 0.25 * logits / 7, rel=1e-5
    )
    assert float(Objective(target).loss(y[rows], rows, plain)) == pytest.approx(local / 0.3, rel=1e-5)
    error = objective.error(y.split(2), 2)
    assert error.output == pytest.approx(float((y - target).square().mean() / target.square().mean()), rel=1e-5)
    assert error.logits == pytest.approx(float((slopes * (y - target)[:, None]).sum((2, 3)).square().mean()), rel=1e-5)


def test_a_block_that_does_nothing_to_the_logits_is_held_to_its_output() -> None:
    target, slopes = torch.ones(2, 3), torch.zeros(2, 1, 3)
    objective = Objective(target, slopes, 0.25)
    plain = objective.error([target + 1], 2)
    assert plain == BlockError(1.0, 0.0)
    assert float(objective.loss(target + 1, torch.arange(2), plain)) == pytest.approx(1.0)


@pytest.mark.parametrize("move", [float("nan"), float("inf")])
def test_an_infinite_slope_leaves_the_output(move: float) -> None:
    target = torch.ones(2, 3)
    objective = Objective(target, torch.full((2, 1, 3), move), 0.25)
    plain = objective.error([target + 1], 2)
    assert float(objective.loss(target + 1, torch.arange(2), plain)) == pytest.approx(1.0)


def test_a_block_that_is_exact_is_not_held_to_the_logits_alone() -> None:
    """Both terms are let off alike below the error that makes a difference."""
    target, slopes = torch.ones(2, 3), torch.ones(2, 1, 3)
    objective = Objective(target, slopes, 0.25)
    plain = objective.error([target + 1e-4], 2)
    loss = float(objective.loss(target + 1e-4, torch.arange(2), plain))
    assert loss == pytest.approx(plain.output / 1e-6, rel=1e-3)


def test_a_network_whose_gradients_end_is_quantized(tmp_path: Path, calibration_images: ImageSet) -> None:
    """Behind the first block the logits hang on comparisons alone; the blocks after it still have slopes."""
    generator = np.random.default_rng(0)

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        return onnx.numpy_helper.from_array(generator.normal(0, 0.3, shape).astype(np.float32), name)

    nodes = [
        onnx.helper.make_node("Conv", ["image", "w0"], ["a"], pads=[1, 1, 1, 1]),
        onnx.helper.make_node("Greater", ["a", "zero"], ["more"]),
        onnx.helper.make_node("Less", ["a", "zero"], ["less"]),
        onnx.helper.make_node("Cast", ["more"], ["b"], to=onnx.TensorProto.FLOAT),
        onnx.helper.make_node("Cast", ["less"], ["c"], to=onnx.TensorProto.FLOAT),
        onnx.helper.make_node("Conv", ["b", "w1"], ["d"], pads=[1, 1, 1, 1]),
        onnx.helper.make_node("Conv", ["c", "w2"], ["e"], pads=[1, 1, 1, 1]),
        onnx.helper.make_node("Add", ["d", "e"], ["f"]),
        onnx.helper.make_node("GlobalAveragePool", ["f"], ["g"]),
        onnx.helper.make_node("Flatten", ["g"], ["h"]),
        onnx.helper.make_node("Gemm", ["h", "w3"], ["logits"]),
    ]
    weights = [weight("w0", 4, 1, 3, 3), weight("w1", 4, 4, 3, 3), weight("w2", 4, 4, 3, 3), weight("w3", 4, 10)]
    zero = onnx.numpy_helper.from_array(np.zeros((), np.float32), "zero")
    graph = onnx.helper.make_graph(
        nodes,
        "ends",
        [onnx.helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, ["n", 1, 28, 28])],
        [onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["n", 10])],
        [*weights, zero],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "ends.onnx")
    classifier = load_classifier(tmp_path / "ends.onnx")
    found = stretches(to_torch(classifier), calibration_images)
    first, second = (slopes.float().abs().sum() for slopes in all_slopes(to_torch(classifier), found))
    assert first == 0
    assert second > 0
    settings = load_recipe(QuantizeSettings, PACKAGE, "qdrop", "fast", overrides=["logit_share=0.25"])
    quantize(classifier, calibration_images, tmp_path / "o.onnx", settings, 4)
    assert (tmp_path / "o.onnx").is_file()


@pytest.fixture
def snr(calibration_images: ImageSet) -> Callable[[Classifier, Path], float]:
    """The logits' signal-to-noise ratio of a written file, on the images that it was made with, by onnxruntime."""

    def measure(classifier: Classifier, output: Path) -> float:
        x = classifier.spec.to_input(calibration_images.pixels).numpy()
        return decibels(classifier.session().run(x)[0], load_classifier(output).session().run(x)[0])

    return measure


def test_pruning_comes_nearer_to_the_logits_with_it(
    tmp_path: Path, calibration_images: ImageSet, snr: Callable[[Classifier, Path], float]
) -> None:
    classifier = load_classifier(zoo.model_path("residual"))

    def pruned(share: float) -> float:
        overrides = [f"logit_share={share}", "mask_steps=10", "steps=20", "sensitive_images=8"]
        settings = load_recipe(PruneSettings, PRUNE, "obs", "fast", overrides=overrides)
        output = tmp_path / f"{share}.onnx"
        prune(classifier, calibration_images, output, settings, make_goal("unstructured", 0.8))
        return snr(classifier, output)

    assert pruned(0.25) > pruned(0.0)


def test_quantization_comes_nearer_to_the_logits_with_it(
    tmp_path: Path, calibration_images: ImageSet, snr: Callable[[Classifier, Path], float]
) -> None:
    classifier = load_classifier(zoo.model_path("inverted"))

    def quantized(share: float) -> float:
        settings = load_recipe(
            QuantizeSettings, PACKAGE, "qdrop", "fast", overrides=[f"logit_share={share}", "steps=30"]
        )
        quantize(classifier, calibration_images, tmp_path / f"{share}.onnx", settings, 2)
        return snr(classifier, tmp_path / f"{share}.onnx")

    assert quantized(0.25) > quantized(0.0) + 0.5


class Heard(Silent):
    """What was said of progress: names of tasks, and how far each came."""

    def __init__(self) -> None:
        self.done: list[tuple[str, float, float]] = []

    @contextmanager
    def task(self, name: str, total: float) -> Iterator[Task]:
        self.done.append((name, total, 0))
        yield self

    def advance(self, steps: float = 1, note: str | None = None) -> None:
        name, total, done = self.done[-1]
        self.done[-1] = (name, total, done + steps)


def test_a_pass_says_how_far_it_is(module_of: Callable[[str], TorchClassifier], calibration_images: ImageSet) -> None:
    module, heard = module_of("plain"), Heard()
    slopes = Slopes(module, SETTINGS, heard)
    for stretch in stretches(module, calibration_images):
        slopes.of(stretch)
    assert heard.done == [("measuring what blocks do to logits", COUNT, COUNT)]
