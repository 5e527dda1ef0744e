"""The reconstruction loop on a real block: it lowers the error, sees every image, and repeats itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from converters.ops.registry import Body
from converters.torch_module import Segment, TorchClassifier, Transform
from recipes.blocks import find_blocks
from recipes.images import ImageSet
from recipes.objective import BlockError, Objective, mean_square
from recipes.quantize.quantizers import QuantizedWeight
from recipes.quantize.settings import PACKAGE, QuantizeSettings
from recipes.reconstruct import (
    Changes,
    DropMasks,
    Group,
    LearnedTensor,
    Loop,
    Reconstruction,
    Stretch,
    Values,
    block_error,
    reconstruct,
    run_batched,
    walk_blocks,
)
from recipes.settings import load_recipe


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """mean (actual - expected)^2 / mean expected^2."""
    return float((actual - expected).square().mean() / expected.square().mean())


SETTINGS = QuantizeSettings(unit="block", rounding="sigmoid", rounding_rate=2e-2, range_steps=20)
OFFSET = SETTINGS.model_copy(update={"rounding": "offset", "rounding_rate": 5e-3})


@dataclass
class Case:
    """The second unit of the residual net: its segment, input and float output, on 10 images of the training set."""

    module: TorchClassifier
    segment: Segment
    x: Tensor
    y: Tensor
    names: list[str]
    axes: list[int]

    def weights(self, *, learn: bool = True, settings: QuantizeSettings = SETTINGS) -> dict[str, QuantizedWeight]:
        found = {}
        for name, axis in zip(self.names, self.axes, strict=True):
            found[name] = QuantizedWeight(self.module.constant(name), axis, 3, settings)
            if learn:
                found[name].learn()
        return found

    def given(self, x: Tensor | None = None) -> Values:
        """The block's input, or `x` in its place."""
        return {self.segment.inputs[0]: self.x if x is None else x}

    def error(self, weights: dict[str, QuantizedWeight], x: Tensor | None = None) -> float:
        tensors = {name: weight.tensor() for name, weight in weights.items()}
        return relative_error(run_batched(self.segment, self.given(x), 4, parameters=tensors), self.y)

    def train(
        self,
        weights: dict[str, QuantizedWeight],
        loop: Loop,
        seed: int = 0,
        segment: Segment | None = None,
        x: Tensor | None = None,
    ) -> Reconstruction:
        generator = torch.Generator().manual_seed(seed)
        changed = self.x if x is None else x
        before = self.error(self.weights(learn=False), changed)
        reconstruct(
            segment or self.segment,
            self.given(),
            self.given(changed),
            Objective(self.y),
            weights,
            {},
            loop,
            BlockError(before),
            generator,
        )
        return Reconstruction(before, self.error(weights, changed))


@pytest.fixture
def case(module_of: Callable[[str], TorchClassifier], calibration_images: ImageSet) -> Case:
    module = module_of("residual")
    block = [block for block in find_blocks(module) if block.branches][1]
    inputs = module.spec.to_input(calibration_images.pixels[:10])
    given = {module.input_name: inputs}
    x = run_batched(module.segment(given, block.inputs), given, 10)
    segment = module.segment(block.inputs, [block.output])
    names, axes = [layer.weight for layer in block.layers], [layer.axis for layer in block.layers]
    return Case(module, segment, x, run_batched(segment, {block.inputs[0]: x}, 10), names, axes)


class Recorder(Segment):
    """A segment that notes what it was trained on."""

    def __init__(self, segment: Segment) -> None:
        super().__init__(segment.owner, segment.inputs, segment.outputs)
        self.seen: list[Tensor] = []

    def __call__(
        self,
        values: Mapping[str, Tensor],
        parameters: Mapping[str, Tensor] | None = None,
        transforms: Mapping[str, Transform] | None = None,
        bodies: Mapping[str, Body] | None = None,
    ) -> dict[str, Tensor]:
        if torch.is_grad_enabled():
            self.seen.append(values[self.inputs[0]].clone())
        return super().__call__(values, parameters, transforms, bodies)


def indices(batch: Tensor, among: Tensor) -> list[int]:
    """Which rows of `among` the batch consists of."""
    found = [[index for index, row in enumerate(among) if torch.equal(row, sample)] for sample in batch]
    assert all(len(candidates) == 1 for candidates in found)
    return [candidates[0] for candidates in found]


@pytest.mark.parametrize("settings", [SETTINGS, OFFSET], ids=["sigmoid", "offset"])
def test_training_beats_nearest_rounding(settings: QuantizeSettings, case: Case) -> None:
    nearest = case.error(case.weights(learn=False))
    weights = case.weights(settings=settings)
    case.train(weights, Loop(steps=150, batch=4))
    for weight in weights.values():
        weight.harden()
    assert case.error(weights) < 0.9 * nearest


def test_a_shipped_recipe_settles_most_roundings(case: Case) -> None:
    """What is undecided when training ends is rounded blindly: the loss that was trained is not the file's."""
    settings = load_recipe(QuantizeSettings, PACKAGE, "brecq")
    weights = case.weights(settings=settings)
    case.train(weights, Loop(settings.steps, settings.batch))
    assert max(weight.undecided() for weight in weights.values()) < 0.25


def test_block_error_is_relative_to_the_float_output(case: Case) -> None:
    weights = case.weights(learn=False)
    expected = case.error(weights)
    assert expected > 0
    assert block_error(case.segment, case.given(), Objective(case.y), weights, {}, 3).output == pytest.approx(
        expected, rel=1e-5
    )
    assert block_error(case.segment, case.given(), Objective(case.y), {}, {}, 3).output < 1e-10


def test_zero_steps_change_nothing(case: Case) -> None:
    weights = case.weights()
    before = {name: weight.tensor().clone() for name, weight in weights.items()}
    case.train(weights, Loop(steps=0, batch=4))
    for name, weight in weights.items():
        assert torch.equal(weight.tensor(), before[name])


def test_nothing_to_train_is_no_error(case: Case) -> None:
    account = case.train(case.weights(learn=False), Loop(steps=5, batch=4))
    assert account.before == account.after > 0


@pytest.mark.parametrize("batch", [1, 3, 4, 10, 32])
def test_every_image_is_seen_once_an_epoch_the_last_partial_batch_included(case: Case, batch: int) -> None:
    recorder = Recorder(case.segment)
    epoch = -(-10 // batch)
    case.train(case.weights(), Loop(steps=2 * epoch, batch=batch), segment=recorder)
    seen = [indices(part, case.x) for part in recorder.seen]
    sizes = [batch] * (10 // batch) + [10 % batch] * (10 % batch > 0)
    assert [len(part) for part in seen] == 2 * sizes
    for half in (seen[:epoch], seen[epoch:]):
        assert sorted(index for part in half for index in part) == list(range(10))


def test_the_order_is_drawn_anew_each_epoch(case: Case) -> None:
    recorder = Recorder(case.segment)
    case.train(case.weights(), Loop(steps=10, batch=5), segment=recorder)
    orders = [tuple(indices(torch.cat(recorder.seen[step : step + 2]), case.x)) for step in range(0, 10, 2)]
    assert len(set(orders)) == len(orders)


def test_the_seed_decides(case: Case) -> None:
    results = []
    for seed in (0, 0, 1):
        weights = case.weights()
        account = case.train(weights, Loop(steps=10, batch=4, input_drop=0.5), seed, x=case.x + 0.1)
        results.append((account.after, torch.cat([weight.tensor().flatten() for weight in weights.values()])))
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])
    assert not torch.equal(results[0][1], results[2][1])


def test_training_reads_the_changed_input_with_a_share_of_the_float_one(case: Case) -> None:
    changed = case.x + 100  # values tell which stream they are from
    for drop, share in ((0.0, 0.0), (0.3, 0.3), (1.0, 1.0)):
        recorder = Recorder(case.segment)
        case.train(case.weights(), Loop(steps=4, batch=10, input_drop=drop), segment=recorder, x=changed)
        taken = torch.cat([part < 50 for part in recorder.seen]).float().mean()
        assert float(taken) == pytest.approx(share, abs=0.02)


def test_dropping_the_whole_input_trains_on_the_float_one(case: Case) -> None:
    recorder = Recorder(case.segment)
    loop = Loop(steps=5, batch=4, input_drop=1.0)
    case.train(case.weights(), loop, segment=recorder, x=torch.rand(case.x.shape))
    seen = [index for part in recorder.seen for index in indices(part, case.x)]  # rows of the float input, bit for bit
    assert Counter(seen) == Counter({index: 2 if index in seen[10:] else 1 for index in range(10)})


@pytest.mark.parametrize("shape", [(4, 3, 9, 11), (50, 20), (300_000,)])
@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_drop_masks_cover_their_share_anew_each_time(shape: tuple[int, ...], share: float) -> None:
    x = torch.zeros(shape)
    masks = DropMasks(share, torch.Generator().manual_seed(0))
    drawn = [masks.like(x) for _ in range(20)]
    assert all(mask.shape == x.shape and mask.dtype == x.dtype and bool((mask * mask == mask).all()) for mask in drawn)
    assert float(torch.stack(drawn).float().mean()) == pytest.approx(share, abs=0.02)
    again = DropMasks(share, torch.Generator().manual_seed(0))
    assert all(torch.equal(again.like(x), mask) for mask in drawn)
    if 0 < share < 1:
        assert not torch.equal(drawn[0], drawn[1])


def test_drop_masks_follow_the_memory_order() -> None:
    x = torch.zeros(2, 3, 5, 7).contiguous(memory_format=torch.channels_last)
    mask = DropMasks(0.5, torch.Generator().manual_seed(0)).like(x)
    assert mask.shape == x.shape
    assert mask.stride() == x.stride()


def test_a_bias_learns_to_undo_a_shift(case: Case) -> None:
    """The shortest path to a known answer: a segment's only change is a bias, which was moved."""
    segment = case.segment
    name = next(step.inputs[2] for step in segment.steps if step.op == "BatchNormalization")
    bias = LearnedTensor(case.module.constant(name) + 0.3, 0.02)
    objective = Objective(case.y)
    before = block_error(segment, case.given(), objective, {name: bias}, {}, 4)
    generator = torch.Generator().manual_seed(0)
    reconstruct(segment, case.given(), case.given(), objective, {name: bias}, {}, Loop(200, 4), before, generator)
    assert block_error(segment, case.given(), objective, {name: bias}, {}, 4).output < 1e-3 * before.output
    torch.testing.assert_close(bias.tensor(), case.module.constant(name), rtol=0, atol=0.05)


@pytest.mark.parametrize("settings", [SETTINGS, OFFSET], ids=["sigmoid", "offset"])
def test_sixteen_bits_come_close_to_thirty_two(case: Case, settings: QuantizeSettings) -> None:
    results = []
    for precision in (torch.float32, torch.bfloat16):
        weights = case.weights(settings=settings)
        results.append(case.train(weights, Loop(80, 4, input_drop=0.5, precision=precision)))
        trained = [tensor for weight in weights.values() for group in weight.groups() for tensor in group.tensors]
        assert {tensor.dtype for tensor in trained} == {torch.float32}
    whole, half = results
    assert whole.after < 0.7 * whole.before
    assert half.after == pytest.approx(whole.after, rel=0.1)
    assert half.after != whole.after


def test_decaying_rates_fall_to_zero_and_others_stay(case: Case) -> None:
    """Adam's step is about its rate while the gradient keeps its sign: the step sizes show the schedule."""

    class Penalised:
        def __init__(self, decay: bool) -> None:
            self.value, self.decay, self.path = torch.zeros(1), decay, [0.0]

        def groups(self) -> list[Group]:
            return [Group([self.value], 0.01, self.decay)]

        def penalty(self, progress: float) -> Tensor:
            self.path.append(float(self.value.detach()))
            return -1000 * self.value.sum()

        def __call__(self, x: Tensor) -> Tensor:
            return x + 0 * self.value

    for decay in (False, True):
        change = Penalised(decay)
        generator = torch.Generator().manual_seed(0)
        reconstruct(
            case.segment,
            case.given(),
            case.given(),
            Objective(case.y),
            {},
            {case.segment.inputs[0]: change},
            Loop(20, 10),
            BlockError(1.0),
            generator,
        )
        steps = torch.tensor([*change.path[1:], float(change.value)]).diff()
        assert float(steps[0]) == pytest.approx(0.01, rel=1e-2)
        assert float(steps[-1]) == pytest.approx(0.0001 if decay else 0.01, abs=0.0002)


def test_progress_is_told_every_step(case: Case) -> None:
    told: list[tuple[int, float]] = []
    generator = torch.Generator().manual_seed(0)
    weights = case.weights()
    before = block_error(case.segment, case.given(), Objective(case.y), weights, {}, 4)

    def tell(steps: int, loss: float) -> None:
        told.append((steps, loss))

    reconstruct(
        case.segment, case.given(), case.given(), Objective(case.y), weights, {}, Loop(7, 4), before, generator, tell
    )
    assert sum(steps for steps, _ in told) == 7
    assert told[0][1] == pytest.approx(1, rel=0.5)  # the loss is in units of e0, up to the minibatch


def test_batches_are_put_together_again(case: Case) -> None:
    whole = run_batched(case.segment, case.given(), 10)
    for batch in (1, 3, 64):
        torch.testing.assert_close(run_batched(case.segment, case.given(), batch), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_errors_are_those_of_the_whole_whatever_the_batch(case: Case, batch: int) -> None:
    weights = case.weights(learn=False)
    expected = case.error(weights)
    assert expected > 0
    assert block_error(case.segment, case.given(), Objective(case.y), weights, {}, batch).output == pytest.approx(
        expected, rel=1e-5
    )
    assert block_error(case.segment, case.given(), Objective(case.y), {}, {}, batch).output < 1e-10
    assert mean_square(case.y, batch) == pytest.approx(float(case.y.square().mean()), rel=1e-5)


def test_values_beyond_the_limit_lie_on_disk_and_train_alike(case: Case) -> None:
    """Bit for bit, in the memory order that they would have had."""
    here = run_batched(case.segment, case.given(), 4)
    there = run_batched(case.segment, case.given(), 4, 1e-9)
    assert torch.equal(here, there)
    assert there.is_contiguous(memory_format=torch.channels_last) == here.is_contiguous(
        memory_format=torch.channels_last
    )
    assert here.untyped_storage().filename is None
    assert there.untyped_storage().filename is not None
    learned = []
    for y in (here, there):
        weights, generator = case.weights(settings=OFFSET), torch.Generator().manual_seed(0)
        reconstruct(
            case.segment,
            case.given(),
            case.given(),
            Objective(y),
            weights,
            {},
            Loop(5, 4, 0.5),
            BlockError(1.0),
            generator,
        )
        learned.append([weight.tensor() for weight in weights.values()])
    assert all(torch.equal(a, b) for a, b in zip(*learned, strict=True))


def test_what_is_behind_is_let_go_of(module_of: Callable[[str], TorchClassifier]) -> None:
    """A loop holds the last stretch while the next is computed; its tensors are as large as the images' activations."""
    module = module_of("residual")
    x = module.spec.to_input(torch.rand(4, 1, 28, 28))
    last: Stretch | None = None
    for stretch in walk_blocks(module, x, Changes((), {}), SETTINGS):
        assert len(stretch.float_inputs) == len(stretch.changed_inputs) == 1
        assert last is None or not (last.float_inputs or last.changed_inputs or last.beside or last.target.numel())
        last = stretch
