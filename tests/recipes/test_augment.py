"""Augmentation sample by sample: what may change does, and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from recipes.synth.augment import augment
from recipes.synth.settings import Stage, SynthSettings

NO_JITTER = (0.0, 0.0, 0.0, 0.0)


def settings(
    *, flip: bool = False, shift: float = 0.0, jitter: tuple[float, float, float, float] = NO_JITTER
) -> SynthSettings:
    return SynthSettings(stages=(Stage(scale=1, steps=1),), flip=flip, shift=shift, jitter=jitter)


def pixels(count: int = 16, channels: int = 3, height: int = 12, width: int = 20) -> Tensor:
    shape = (count, channels, height, width)
    return 0.2 + 0.6 * torch.rand(shape, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_zero_amounts_change_nothing(channels: int, generator: torch.Generator) -> None:
    x = pixels(channels=channels)
    assert torch.equal(augment(x, settings(), generator), x)


def test_flip_mirrors_a_sample_or_leaves_it(generator: torch.Generator) -> None:
    x = pixels(64)
    out = augment(x, settings(flip=True), generator)
    flipped = [torch.equal(sample, mirrored) for sample, mirrored in zip(out, x.flip(3), strict=True)]
    left = [torch.equal(sample, original) for sample, original in zip(out, x, strict=True)]
    assert all(a != b for a, b in zip(flipped, left, strict=True))
    assert 16 < sum(flipped) < 48


def test_shift_rolls_the_whole_batch_by_one_amount_within_the_limit() -> None:
    x = pixels(4)
    seen: set[tuple[int, int]] = set()
    for seed in range(60):
        out = augment(x, settings(shift=0.25), torch.Generator().manual_seed(seed))
        amounts = [(dy, dx) for dy in range(-3, 4) for dx in range(-5, 6) if torch.equal(out, x.roll((dy, dx), (2, 3)))]
        assert len(amounts) == 1
        seen.add(amounts[0])
    assert {dy for dy, _ in seen} == set(range(-3, 4))
    assert {dx for _, dx in seen} == set(range(-5, 6))


@pytest.mark.parametrize("channels", [1, 3])
def test_brightness_scales_each_sample_by_its_own_factor(channels: int, generator: torch.Generator) -> None:
    x = pixels(channels=channels)
    out = augment(x, settings(jitter=(0.4, 0, 0, 0)), generator)
    factors = (out / x).flatten(1)
    torch.testing.assert_close(factors, factors[:, :1].expand_as(factors), rtol=1e-4, atol=1e-5)
    assert len(factors[:, 0].unique()) == len(x)
    assert bool(((factors > 0.6 - 1e-4) & (factors < 1.4 + 1e-4)).all())
    assert float(factors[:, 0].max() - factors[:, 0].min()) > 0.3


@pytest.mark.parametrize("channels", [1, 3])
def test_contrast_scales_the_distance_from_each_samples_mean(channels: int, generator: torch.Generator) -> None:
    x = pixels(channels=channels)
    out = augment(x, settings(jitter=(0, 0.4, 0, 0)), generator)
    torch.testing.assert_close(out.mean((1, 2, 3)), x.mean((1, 2, 3)))
    factors = out.std((1, 2, 3)) / x.std((1, 2, 3))
    expected = x.mean((1, 2, 3), keepdim=True) + factors.view(-1, 1, 1, 1) * (x - x.mean((1, 2, 3), keepdim=True))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert len(factors.unique()) == len(x)
    assert bool(((factors > 0.6 - 1e-4) & (factors < 1.4 + 1e-4)).all())


@pytest.mark.parametrize("jitter", [(0, 0, 0.5, 0), (0, 0, 0, 0.2)])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_saturation_and_hue_touch_three_channels_only(
    jitter: tuple[float, float, float, float], channels: int, generator: torch.Generator
) -> None:
    x = pixels(channels=channels)
    changed = (augment(x, settings(jitter=jitter), generator) - x).abs().amax((1, 2, 3)) > 1e-3
    assert bool(changed.all()) if channels == 3 else not bool(changed.any())


def test_saturation_leaves_gray_and_hue_leaves_brightness(generator: torch.Generator) -> None:
    gray = pixels(channels=1).expand(-1, 3, -1, -1)
    torch.testing.assert_close(augment(gray, settings(jitter=(0, 0, 0.5, 0)), generator), gray, rtol=0, atol=1e-3)
    x = pixels()
    turned = augment(x, settings(jitter=(0, 0, 0, 0.2)), generator)
    torch.testing.assert_close(turned.amax(1), x.amax(1), rtol=0, atol=1e-3)  # value and saturation of HSV stay
    torch.testing.assert_close(turned.amin(1), x.amin(1), rtol=0, atol=1e-3)


@pytest.mark.parametrize("index", [2, 3])
def test_colour_factors_differ_between_samples(index: int, generator: torch.Generator) -> None:
    x = pixels(1).expand(16, -1, -1, -1)
    jitter = tuple(0.2 if position == index else 0.0 for position in range(4))
    out = augment(x, settings(jitter=jitter), generator)  # type: ignore[arg-type]
    distances = (out[:, None] - out[None]).abs().amax((2, 3, 4)) + torch.eye(16)
    assert float(distances.min()) > 1e-5


@pytest.mark.parametrize("channels", [1, 3])
def test_gradient_reaches_every_pixel(channels: int, generator: torch.Generator) -> None:
    x = pixels(4, channels).requires_grad_(True)
    out = augment(x, settings(flip=True, shift=0.2, jitter=(0.2, 0.2, 0.2, 0.1)), generator)
    (out * torch.rand(out.shape, generator=generator)).sum().backward()
    assert x.grad is not None
    assert bool(torch.isfinite(x.grad).all())
    assert float((x.grad != 0).float().mean()) > 0.999


@pytest.mark.parametrize("value", [0.0, 0.4, 1.0])
def test_gradient_is_finite_for_gray_and_saturated_pixels(value: float, generator: torch.Generator) -> None:
    x = torch.full((4, 3, 5, 5), value, requires_grad=True)
    augment(x, settings(jitter=(0.2, 0.2, 0.2, 0.1)), generator).square().sum().backward()
    assert x.grad is not None
    assert bool(torch.isfinite(x.grad).all())


@pytest.mark.parametrize("channels", [1, 3])
def test_the_generator_decides(channels: int) -> None:
    x = pixels(channels=channels)
    how = settings(flip=True, shift=0.2, jitter=(0.2, 0.2, 0.2, 0.1))
    first, again, other = (augment(x, how, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
