"""Which channels go where they go in groups: heads, groups of a convolution, parts of a split."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from converters.channels import find_channels
from converters.classifier import Classifier
from converters.conversion import to_torch
from converters.load import load_classifier
from converters.writeback import prepare_for_pruning
from recipes.images import ImageSet
from recipes.inspect import inspect_model
from recipes.prune.channels import Limits, channel_harm, choose_channels
from recipes.prune.engine import prune
from recipes.prune.goal import make_goal
from recipes.prune.settings import PACKAGE, PruneSettings
from recipes.settings import load_recipe
from tests import models
from tests.models import assemble, head, head_tensors, node, weights

Load = Callable[[onnx.ModelProto], Classifier]


def test_heads_are_chosen_by_their_harm(classifier_of: Callable[[str], Classifier], tmp_path: Path) -> None:
    """A head that the output projection does not read is the first to go, and one of each layer is left."""
    model = onnx.load(classifier_of("attention").path)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for block in (4, 5, 6):
        weight = onnx.numpy_helper.to_array(tensors[f"{block}.mixed.weight"]).copy()
        weight[:, 16:32] = 0
        tensors[f"{block}.mixed.weight"].CopyFrom(onnx.numpy_helper.from_array(weight, f"{block}.mixed.weight"))
    classifier = load_classifier(models.write(model, tmp_path / "model.onnx"))
    module = to_torch(prepare_for_pruning(classifier))
    channels = find_channels(module)
    pixels = torch.rand(8, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    harm = channel_harm(module, channels, module.spec.to_input(pixels), 8)
    for share in (0.9, 0.3):
        removed = choose_channels(module, channels, harm, "macs", share, Limits(0.1, 4))
        for entry in channels.layers:
            if entry.layer.shape != (64, 192):
                continue
            gone = np.isin(entry.outputs[:64], removed).reshape(4, 16)
            assert (gone.all(1) == gone.any(1)).all()
            assert gone[1].all()
            assert not gone.all()


def test_a_transformer_comes_to_its_budget(
    classifier_of: Callable[[str], Classifier], calibration_images: ImageSet, tmp_path: Path
) -> None:
    settings, output = load_recipe(PruneSettings, PACKAGE, "one-shot"), tmp_path / "o.onnx"
    goal = make_goal("channel", None, 0.4)
    result = prune(classifier_of("attention"), calibration_images, output, settings, goal)
    before, after = inspect_model(classifier_of("attention")).macs, inspect_model(load_classifier(output)).macs
    assert result.written_difference < 1e-4
    assert before is not None
    assert after is not None
    assert 0.3 < after / before <= 0.4


@pytest.mark.parametrize(("multiple", "left"), [(1, 3), (2, 3), (4, 2), (8, 2)])
def test_multiples_are_of_channels(multiple: int, left: int, load: Load) -> None:
    """Four groups of two channels: twos are single groups, fours pairs; and so eights, as there are just eight."""
    nodes = [
        node("Conv", "image a.weight", "a", pads=[1, 1, 1, 1]),
        node("Conv", "a b.weight", "b", pads=[1, 1, 1, 1], group=4),
    ]
    tensors = {"a.weight": weights(8, models.CHANNELS, 3, 3), "b.weight": weights(8, 2, 3, 3, seed=1)}
    module = to_torch(prepare_for_pruning(load(assemble(nodes + head("b"), tensors | head_tensors(8)))))
    channels = find_channels(module)
    harm = np.arange(1.0 + channels.numbers().max())
    removed = choose_channels(module, channels, harm, "weights", 0.9, Limits(0.1, multiple))
    assert 4 - len(removed) == left
    assert set(removed) == set(channels.numbers()[: len(removed)])


def test_no_part_of_a_split_is_lost(load: Load) -> None:
    """All that does least harm lies in one part, of which one channel has to stay."""
    nodes = [
        node("Conv", "image a.weight", "a"),
        node("Split", "a sizes", "left right", axis=1),
        node("Conv", "left b.weight", "b"),
        node("Conv", "right c.weight", "c"),
        node("Concat", "b c", "joined", axis=1),
    ]
    tensors = {
        "a.weight": weights(12, models.CHANNELS, 3, 3),
        "sizes": np.array([6, 6]),
        "b.weight": weights(4, 6, 3, 3, seed=1),
        "c.weight": weights(4, 6, 3, 3, seed=2),
    }
    module = to_torch(prepare_for_pruning(load(assemble(nodes + head("joined"), tensors | head_tensors(8)))))
    channels = find_channels(module)
    harm = np.arange(1.0 + channels.numbers().max())
    removed = choose_channels(module, channels, harm, "weights", 0.3, Limits(0.1, 1))
    (first, *_) = channels.layers
    assert np.isin(first.outputs, removed)[:6].sum() == 5
    assert (~np.isin(first.outputs, removed))[6:].any()
