"""A budget of time: which removal is taken, and that the file is as fast as was asked."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from converters.channels import find_channels
from converters.classifier import Classifier
from converters.conversion import to_torch
from converters.errors import MixMixError
from converters.torch_module import TorchClassifier
from converters.writeback import prepare_for_pruning
from recipes.progress import Silent
from recipes.prune.channels import Limits, Removed, choose_channels, no_harm, removals, share_left
from recipes.prune.goal import make_goal
from recipes.prune.latency import check_latency, choose_by_latency, clock, fast_enough
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


@pytest.fixture
def wide(load: Load) -> TorchClassifier:
    return to_torch(prepare_for_pruning(load(wide_model())))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40), st.floats(0, 1))
def test_halving_finds_the_first_that_is_fast_enough(shares: list[float], limit: float) -> None:
    """Where time falls: the one that going through all finds, or the last, and no more trials than halving takes."""
    shares = sorted(shares, reverse=True)
    steps, tried = [Removed(np.arange(index), share) for index, share in enumerate(shares)], []

    def share(removed: Removed) -> float:
        tried.append(len(removed.numbers))
        return removed.left

    found = fast_enough(steps, limit, share)
    assert len(found.numbers) == next((i for i, share in enumerate(shares) if share <= limit), len(steps) - 1)
    assert len(tried) <= np.ceil(np.log2(len(steps))) + 1  # and once more


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40), st.floats(0, 1), st.randoms())
def test_what_is_taken_was_fast_enough_when_it_was_timed_last(
    shares: list[float], limit: float, chance: random.Random
) -> None:
    """Whatever times do, and however often they change."""
    steps, times = [Removed(np.arange(index), 0.0) for index in range(len(shares))], {}

    def share(removed: Removed) -> float:
        times[len(removed.numbers)] = chance.choice(shares)
        return times[len(removed.numbers)]

    found = len(fast_enough(steps, limit, share).numbers)
    assert found == len(steps) - 1 or times[found] <= limit


def test_removals_leave_less_and_less(wide: TorchClassifier) -> None:
    channels = find_channels(wide)
    steps = list(removals(channels, no_harm(channels), "macs", Limits(0.1, 4)))
    assert (len(steps[0].numbers), steps[0].left) == (0, 1.0)
    for before, after in itertools.pairwise(steps):
        assert set(before.numbers) < set(after.numbers)
        assert after.left < before.left
        assert share_left(channels, after.numbers) == pytest.approx(after.left)


@pytest.mark.timing
def test_a_file_takes_the_time_that_was_asked_for(wide: TorchClassifier) -> None:
    """Convolutions of some milliseconds, timed beside the whole model, by the clock that chose them."""
    channels = find_channels(wide)
    removed = choose_by_latency(wide, channels, no_harm(channels), 0.5, Limits(0.1, 4), Silent())
    assert clock(wide, channels)(Removed(removed, 0.0)) < 0.8
    left = share_left(channels, removed)
    assert left < 0.8
    goal = make_goal("channel", None, left)  # what the file says of it finds the same channels
    assert list(choose_channels(wide, channels, no_harm(channels), "macs", 1 - goal.sparsity, Limits(0.1, 4))) == list(
        removed
    )


def test_a_share_that_is_given_decides(wide: TorchClassifier) -> None:
    """Time as multiplications: then the budget is theirs."""
    channels = find_channels(wide)
    limits, harm = Limits(0.1, 4), no_harm(channels)
    removed = choose_by_latency(wide, channels, harm, 0.5, limits, Silent(), lambda removed: removed.left)
    assert list(removed) == list(choose_channels(wide, channels, harm, "macs", 0.5, limits))


def test_a_batch_that_the_file_is_fixed_to(load: Load) -> None:
    model = wide_model()
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 3
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 3
    module = to_torch(prepare_for_pruning(load(model)))
    assert module.classifier.fixed_batch == 3
    assert clock(module, find_channels(module))(Removed(np.array([], np.int64), 1.0)) > 0


def test_a_file_that_gets_no_faster_is_refused(wide: TorchClassifier) -> None:
    channels = find_channels(wide)
    for share, said in ((1.2, r"120\.0"), (0.995, r"99\.5")):
        with pytest.raises(
            MixMixError, match=rf"gets no faster here.*takes {said}% of its time\): give --macs or --sparsity"
        ):
            choose_by_latency(wide, channels, no_harm(channels), 0.5, Limits(0.5, 4), Silent(), lambda _, s=share: s)


@pytest.mark.timing
def test_a_time_that_cannot_be_had(wide: TorchClassifier) -> None:
    channels = find_channels(wide)
    with pytest.raises(
        MixMixError, match=r"94\.1% of its time here at the least, as 90% of .* kept.*: give --latency 0\.95"
    ):
        choose_by_latency(wide, channels, no_harm(channels), 0.1, Limits(0.9, 4), Silent(), lambda removed: 0.941)
    with pytest.raises(MixMixError, match=r"give --latency 0\.|gets no faster here"):
        check_latency(wide, channels, 0.1, Limits(0.9, 4))
    with pytest.raises(MixMixError, match="no channels that can be removed, as 100% of each layer is kept"):
        check_latency(wide, channels, 0.1, Limits(1.0, 4))
