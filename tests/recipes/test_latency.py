"""A budget of time: which removal is taken, and that the file is as fast as was asked."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from converters.channels import find_channels
from converters.classifier import Classifier
from converters.errors import MixMixError
from converters.runtime import Session, time_in_turn
from converters.torch_module import TorchClassifier, to_torch
from converters.writeback import apply, prepare_for_pruning
from recipes.progress import Silent
from recipes.prune.channels import Limits, Removed, no_harm, removals
from recipes.prune.latency import choose_by_latency, first_within
from tests import models
from tests.models import assemble, head, head_tensors, node, weights

Load = Callable[[onnx.ModelProto], Classifier]
SIDE = 64


def wide_model() -> onnx.ModelProto:
    """Two convolutions of some milliseconds, whose inner channels can go."""
    nodes = [
        node("Conv", "image a.weight", "a", pads=[1, 1, 1, 1]),
        node("Relu", "a", "active"),
        node("Conv", "active b.weight", "b", pads=[1, 1, 1, 1]),
    ]
    tensors = {"a.weight": weights(96, models.CHANNELS, 3, 3), "b.weight": weights(96, 96, 3, 3, seed=1)}
    inputs = {"image": ("batch", models.CHANNELS, SIDE, SIDE)}
    return assemble(nodes + head("b"), tensors | head_tensors(96), inputs=inputs)


def image(module: TorchClassifier) -> Tensor:
    return torch.rand(1, module.spec.channel_count, *module.spec.size, generator=torch.Generator().manual_seed(0))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40), st.floats(0, 1))
def test_halving_finds_the_first_that_is_fast_enough(shares: list[float], limit: float) -> None:
    """The one that going through all of them finds, or the last, with no more trials than halving takes."""
    shares = sorted(shares, reverse=True)
    steps, tried = [Removed(np.arange(index), share) for index, share in enumerate(shares)], []

    def share(removed: Removed) -> float:
        tried.append(len(removed.numbers))
        return removed.left

    found = first_within(steps, limit, share)
    assert len(found.numbers) == next((i for i, share in enumerate(shares) if share <= limit), len(steps) - 1)
    assert len(tried) <= np.ceil(np.log2(len(steps))) + 1


def test_removals_leave_less_and_less(load: Load) -> None:
    module = to_torch(prepare_for_pruning(load(wide_model())))
    channels = find_channels(module)
    steps = list(removals(channels, no_harm(channels), "macs", Limits(0.1, 4)))
    assert (len(steps[0].numbers), steps[0].left) == (0, 1.0)
    for before, after in itertools.pairwise(steps):
        assert set(before.numbers) < set(after.numbers)
        assert after.left < before.left


def test_a_file_takes_the_time_that_was_asked_for(load: Load) -> None:
    """Convolutions of some milliseconds, timed beside the whole model."""
    module = to_torch(prepare_for_pruning(load(wide_model())))
    channels, inputs = find_channels(module), image(module)
    removed = choose_by_latency(module, channels, no_harm(channels), inputs, 0.5, Limits(0.1, 4), Silent())
    prepared = module.classifier.original
    narrower = apply(prepared, channels.edits(removed, {}, module.constant))
    whole, left = time_in_turn((Session(prepared), Session(narrower)), inputs.numpy())
    assert 0.2 < left / whole < 0.7


def test_a_time_that_cannot_be_had(load: Load) -> None:
    module = to_torch(prepare_for_pruning(load(wide_model())))
    channels, inputs = find_channels(module), image(module)
    with pytest.raises(MixMixError, match=r"takes \d+% of its time here where 90% of each layer is kept"):
        choose_by_latency(module, channels, no_harm(channels), inputs, 0.1, Limits(0.9, 4), Silent())
