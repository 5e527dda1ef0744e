"""Quantized weights and activations: nearest first, soft while learning, and exactly the file's integers at the end."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from recipes.quantize import primitives as q
from recipes.quantize.quantizers import QuantizedActivation, QuantizedWeight
from recipes.quantize.settings import QuantizeSettings
from recipes.reconstruct import DropMasks, LearnedTensor

SIGMOID = QuantizeSettings(
    unit="block", rounding="sigmoid", range_steps=20, warmup=0.25, scale_rate=1e-3, activation_rate=1e-3
)
OFFSET = SIGMOID.model_copy(update={"rounding": "offset"})
BOTH = pytest.mark.parametrize("settings", [SIGMOID, OFFSET], ids=["sigmoid", "offset"])
LAYOUTS = [((6, 4, 3, 3), 0), ((5, 8), 0), ((8, 5), 1)]  # Conv, Gemm transB=1, MatMul


def make(
    shape: tuple[int, ...], axis: int, bits: int = 4, settings: QuantizeSettings = SIGMOID, group_size: int = 0
) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(shape, generator=generator)
    spread = torch.logspace(-1, 1, shape[axis])  # channels of very different size
    return QuantizedWeight(weight * q.broadcast(spread, len(shape), axis), axis, bits, settings, group_size=group_size)


def trained(weight: QuantizedWeight) -> Tensor:
    """What decides the rounding."""
    return weight.groups()[0].tensors[0]


def train(change: QuantizedWeight | QuantizedActivation, amount: float) -> None:
    """Move everything trainable away from where it started."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for group in change.groups():
            for tensor in group.tensors:
                tensor.add_(amount * torch.randn(tensor.shape, generator=generator))


@pytest.mark.parametrize(("shape", "axis"), LAYOUTS)
@pytest.mark.parametrize("bits", range(2, 9))
def test_before_learning_each_channel_is_rounded_to_nearest(shape: tuple[int, ...], axis: int, bits: int) -> None:
    weight = make(shape, axis, bits)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    assert weight.scale.numel() == weight.zero.numel() == shape[axis]
    for channel in range(shape[axis]):
        row = weight.weight.select(axis, channel)
        scale, zero = q.search_range(row.reshape(1, -1), low, high, norm=SIGMOID.range_norm, steps=20)
        grid = (torch.arange(low, high + 1) - zero) * scale
        error = (row[..., None] - grid).abs().amin(-1)
        actual = (weight.tensor().select(axis, channel) - row).abs()
        torch.testing.assert_close(actual, error, rtol=1e-4, atol=1e-5 * float(scale))
    assert low <= weight.integers().min()
    assert weight.integers().max() <= high
    assert weight.groups() == []
    assert weight.penalty(1.0) is None


@BOTH
@pytest.mark.parametrize(("shape", "axis"), [((6, 8, 1, 1), 0), ((5, 8), 0), ((8, 5), 1)])
def test_groups_of_inputs_are_quantized_as_weights_of_their_own(
    shape: tuple[int, ...], axis: int, settings: QuantizeSettings
) -> None:
    """Before, while and after they are trained; the last group is smaller."""
    whole, inputs = make(shape, axis, settings=settings, group_size=3), 1 - axis
    parts = [QuantizedWeight(part, axis, 4, settings) for part in whole.weight.split(3, inputs)]

    def joined() -> Tensor:
        return torch.cat([part.tensor() for part in parts], inputs)

    assert torch.equal(whole.tensor(), joined())
    for change in (whole, *parts):
        change.learn()
    torch.testing.assert_close(whole.tensor(), joined())
    for change in (whole, *parts):
        for group in change.groups():
            for tensor in group.tensors:
                tensor += 0.2
        change.harden()
    assert torch.equal(whole.tensor(), joined())
    assert torch.equal(whole.integers(), torch.cat([part.integers() for part in parts], inputs))


@pytest.mark.parametrize(("shape", "axis"), LAYOUTS)
def test_learning_starts_at_the_float_weight(shape: tuple[int, ...], axis: int) -> None:
    weight = make(shape, axis)
    low, high = (weight.low - weight.zero) * weight.scale, (weight.high - weight.zero) * weight.scale
    inside = (weight.weight >= low) & (weight.weight <= high)
    assert float(inside.float().mean()) > 0.5
    weight.learn()
    difference = ((weight.tensor() - weight.weight) / weight.scale).abs()
    assert float(difference[inside].max()) <= 1e-3 + 1e-4  # fractional parts are kept 1e-3 from 0 and 1
    outside = torch.maximum(torch.minimum(weight.weight, high), low)
    torch.testing.assert_close(weight.tensor(), outside, rtol=0, atol=float(weight.scale.max()) * 2e-3)


@BOTH
def test_learning_unchanged_gives_nearest_rounding(settings: QuantizeSettings) -> None:
    weight = make((6, 4, 3, 3), 0, 4, settings)
    nearest = weight.integers().clone()
    weight.learn()
    torch.testing.assert_close(weight.integers(), nearest, rtol=0, atol=0)  # no ties in random floats


@pytest.mark.parametrize(("shape", "axis"), LAYOUTS)
@pytest.mark.parametrize("bits", range(2, 9))
@BOTH
def test_hardened_weights_are_their_integers(
    settings: QuantizeSettings, shape: tuple[int, ...], axis: int, bits: int
) -> None:
    weight = make(shape, axis, bits, settings)
    weight.learn()
    train(weight, 3.0)
    integers = weight.integers().clone()
    scale = weight.current_scale().clone()
    weight.harden()
    torch.testing.assert_close(weight.integers(), integers, rtol=0, atol=0)
    torch.testing.assert_close(weight.tensor(), (integers - weight.zero) * scale, rtol=0, atol=0)
    torch.testing.assert_close(weight.current_scale(), scale, rtol=0, atol=0)
    assert bool((integers == integers.round()).all())
    assert -(2 ** (bits - 1)) <= integers.min()
    assert integers.max() <= 2 ** (bits - 1) - 1
    assert weight.undecided() == 0
    assert weight.groups() == []


@BOTH
def test_training_can_move_a_weight_by_at_most_one_step(settings: QuantizeSettings) -> None:
    weight = make((6, 4, 3, 3), 0, 8, settings)
    nearest = weight.integers().clone()
    weight.learn()
    train(weight, 20.0)
    moved = (weight.integers() - nearest).abs()
    assert float(moved.max()) == 1
    assert 0 < float((moved > 0).float().mean()) < 1


def test_undecided_counts_what_is_between_up_and_down() -> None:
    weight = make((5, 8), 0)
    weight.learn()
    assert weight.undecided() > 0.8
    half = torch.arange(40).view(5, 8) < 20
    trained(weight).copy_(torch.where(half, 9.0, 0.0))
    assert weight.undecided() == 0.5


def test_penalty_sets_in_after_the_warm_up_and_falls_when_roundings_settle() -> None:
    weight = make((5, 8), 0)
    weight.learn()
    assert weight.penalty(0.0) is None
    assert weight.penalty(0.24) is None
    for progress in (0.25, 0.6, 0.99):
        penalty = weight.penalty(progress)
        assert penalty is not None
        assert float(penalty) > 0
    trained(weight).copy_(torch.where(trained(weight) > 0, 9.0, -9.0))
    settled = weight.penalty(0.99)
    assert settled is not None
    assert float(settled) == 0


def test_the_penalty_is_proportional_to_its_weight_and_its_gradient_settles_roundings() -> None:
    single, double = (make((5, 8), 0, 4, SIGMOID.model_copy(update={"regulariser": r})) for r in (0.1, 0.2))
    for weight in (single, double):
        weight.learn()
    v = trained(single).requires_grad_(True)
    first, second = single.penalty(0.9), double.penalty(0.9)
    assert first is not None
    assert second is not None
    assert float(second) == pytest.approx(2 * float(first), rel=1e-5)
    first.backward()
    assert v.grad is not None
    moving = v.grad.abs() > 1e-9
    away = torch.sign(-v.grad) == torch.sign(v.detach())  # v > 0 is h > 1/2: up
    assert bool(away[moving].all())
    assert float(moving.float().mean()) > 0.5


@BOTH
def test_gradients_reach_roundings_and_scales_of_a_weight(settings: QuantizeSettings) -> None:
    weight = make((6, 4, 3, 3), 0, 4, settings)
    weight.learn()
    tensors = [tensor.requires_grad_(True) for group in weight.groups() for tensor in group.tensors]
    assert [tensor.numel() for tensor in tensors] == [6 * 4 * 9, 6]
    weight.tensor().square().sum().backward()
    for tensor in tensors:
        assert tensor.grad is not None
        assert float((tensor.grad != 0).float().mean()) > 0.5


def test_an_offset_is_rounded_from_the_first_step() -> None:
    weight = make((6, 4, 3, 3), 0, 4, OFFSET)
    nearest = weight.tensor().clone()
    weight.learn()
    torch.testing.assert_close(weight.tensor(), nearest, rtol=1e-6, atol=1e-6)
    train(weight, 0.3)
    torch.testing.assert_close(weight.tensor(), (weight.integers() - weight.zero) * weight.current_scale())
    assert weight.undecided() == 0
    assert weight.penalty(0.9) is None


def test_rates_of_zero_train_nothing_more() -> None:
    weight = make((5, 8), 0, 4, SIGMOID.model_copy(update={"scale_rate": 0.0}))
    weight.learn()
    assert [tensor.shape for group in weight.groups() for tensor in group.tensors] == [(5, 8)]
    bias = torch.tensor([1.0, 2.0])
    assert LearnedTensor(bias, 0.0).groups() == []
    learned = LearnedTensor(bias, 0.1)
    learned.groups()[0].tensors[0].add_(1)
    assert learned.tensor().tolist() == [2, 3]
    assert bias.tolist() == [1, 2]  # the model's own tensor stays


@pytest.fixture
def activation() -> QuantizedActivation:
    sample = torch.randn(4000, generator=torch.Generator().manual_seed(5)).clamp(min=0) * 3
    return QuantizedActivation(sample, 4, SIGMOID)


def test_activation_takes_at_most_two_to_the_bits_values_zero_among_them(activation: QuantizedActivation) -> None:
    x = torch.linspace(-20, 20, 5001)
    values = activation(x).unique()
    assert len(values) == 16
    assert bool((values == 0).any())
    torch.testing.assert_close(activation(activation(x)), activation(x), rtol=0, atol=0)
    torch.testing.assert_close(activation(x), q.fake_quantize(x, activation.scale, activation.zero, 0, 15))


def test_gradient_reaches_the_step_and_passes_through_inside_the_range(activation: QuantizedActivation) -> None:
    x = torch.linspace(-20, 20, 401, requires_grad=True)
    activation.log_growth.requires_grad_(True)
    activation(x).sum().backward()
    assert activation.log_growth.grad is not None
    assert float(activation.log_growth.grad.abs()) > 0
    assert x.grad is not None
    low, high = (0 - activation.zero) * activation.scale, (15 - activation.zero) * activation.scale
    well_inside = (x > low + activation.scale) & (x < high - activation.scale)
    assert bool((x.grad[well_inside] == 1).all())
    assert bool((x.grad[(x < low - activation.scale) | (x > high + activation.scale)] == 0).all())
    assert any(tensor is activation.log_growth for group in activation.groups() for tensor in group.tensors)


def test_growth_of_the_step_is_kept_when_hardened(activation: QuantizedActivation) -> None:
    before = float(activation.scale)
    activation.log_growth = torch.tensor(math.log(1.5))
    activation.drop = DropMasks(0.5, torch.Generator().manual_seed(0))
    soft_scale = before * 1.5
    activation.harden()
    assert float(activation.scale) == pytest.approx(soft_scale)
    assert activation.drop is None
    x = torch.linspace(-5, 5, 101)
    torch.testing.assert_close(activation(x), q.fake_quantize(x, activation.scale, activation.zero, 0, 15))


def test_dropping_everything_leaves_the_value_alone(activation: QuantizedActivation) -> None:
    activation.drop = DropMasks(1.0, torch.Generator().manual_seed(0))
    x = torch.linspace(-5, 5, 101)
    assert torch.equal(activation(x), x)


def test_dropping_leaves_about_that_share_alone(activation: QuantizedActivation) -> None:
    activation.drop = DropMasks(0.3, torch.Generator().manual_seed(0))
    x = torch.rand(20_000, generator=torch.Generator().manual_seed(1)) * 5 + 0.01
    out = activation(x)
    left = out == x
    torch.testing.assert_close(out[~left], q.fake_quantize(x[~left], activation.scale, activation.zero, 0, 15))
    assert float(left.float().mean()) == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize(("within", "largest"), [((0.0, 6.0), 6 / 255), ((-6.0, 6.0), 6 / 255), ((0.0, 100.0), None)])
def test_a_step_stays_within_what_a_clip_leaves(within: tuple[float, float], largest: float | None) -> None:
    """However much training wants it to grow."""
    sample = torch.rand(1000) * 6
    free = QuantizedActivation(sample, 8, SIGMOID)
    bound = QuantizedActivation(sample, 8, SIGMOID, within=within)
    for value in (free, bound):
        value.log_growth.fill_(0.5)
        value.harden()
    assert float(free.scale) > 6 / 255
    assert float(bound.scale) == pytest.approx(largest or float(free.scale))
    represented = bound(torch.linspace(-10, 200, 5000))
    assert within[0] - 1e-5 <= float(represented.min())
    assert float(represented.max()) <= max(within[1], 6.0) * (1 + 1e-6)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("within", [(-0.013, 6.0), (-0.25, 6.0), (-1.0, 6.0), (-6.0, 0.3), (-1.0, 1.0), (-6.0, 6.0)])
def test_what_a_clip_leaves_is_represented(within: tuple[float, float], bits: int, symmetric: bool) -> None:
    """To a step; beyond it only where one step cannot end at both bounds: a range on both sides of 0, or few bits."""
    sample = torch.randn(4000, generator=torch.Generator().manual_seed(0)).mul(3).clamp(*within)
    bound = QuantizedActivation(sample, bits, SIGMOID, symmetric, within)
    bound.log_growth.fill_(3.0)
    bound.harden()
    step, ends = float(bound.scale), bound(torch.tensor([-100.0, 100.0])).tolist()
    outer = max(range(2), key=lambda end: abs(within[end]))
    assert abs(ends[outer] - within[outer]) <= 1.02 * step
    if within[0] == -within[1]:
        assert within[0] * (1 + 1e-6) <= ends[0] <= ends[1] <= within[1] * (1 + 1e-6)


def test_coarser_channels_are_rounded_again_and_others_stay() -> None:
    weight = QuantizedWeight(
        torch.randn(4, 3, 3, 3) * torch.tensor([1.0, 1e-6, 1.0, 1.0]).view(-1, 1, 1, 1), 0, 4, SIGMOID
    )
    weight.harden()
    before, scale = weight.tensor(), weight.scale.clone()
    weight.coarsen(torch.tensor([0.0, 0.5, 0.5, 0.0]) * scale.flatten().max())
    assert torch.equal(weight.tensor()[[0, 2, 3]], before[[0, 2, 3]])
    assert torch.equal(weight.scale[[0, 2, 3]], scale[[0, 2, 3]])
    assert weight.scale[1] == 0.5 * scale.max()
    assert not weight.tensor()[1].any()
    again = QuantizedWeight(torch.randn(4, 3, 3, 3), 0, 4, SIGMOID)
    again.restore(weight.state())
    assert torch.equal(again.integers(), weight.integers())
    assert torch.equal(again.zero, weight.zero)


@pytest.mark.parametrize("shape", [(4,), (1, 4), (1,), (), (1, 1)])
def test_one_number_is_coarse_enough_for_all_channels(shape: tuple[int, ...]) -> None:
    """As the bias of a Gemm may be."""
    weight = QuantizedWeight(torch.randn(4, 6), 0, 4, SIGMOID)
    weight.harden()
    weight.coarsen(torch.full(shape, 2.0))
    assert (weight.scale == 2).all()


def test_a_channel_of_zeros_has_a_scale_like_the_others() -> None:
    values = torch.randn(5, 3, 3, 3)
    values[2] = 0
    scale = QuantizedWeight(values, 0, 8, SIGMOID).scale.flatten()
    assert scale[2] == scale[[0, 1, 3, 4]].median()
    assert QuantizedWeight(torch.zeros(2, 3), 0, 8, SIGMOID).scale.flatten().tolist() == [1, 1]
