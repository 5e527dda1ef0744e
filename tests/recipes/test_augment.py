"""Augmentation sample by sample: what may change does, and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from recipes.augment import Augmentation


def pixels(count: int = 16, channels: int = 3, height: int = 12, width: int = 20) -> Tensor:
    shape = (count, channels, height, width)
    return 0.2 + 0.6 * torch.rand(shape, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_zero_amounts_change_nothing(channels: int, generator: torch.Generator) -> None:
    x = pixels(channels=channels)
    assert torch.equal(Augmentation()(x, generator), x)


def test_flip_mirrors_a_sample_or_leaves_it(generator: torch.Generator) -> None:
    x = pixels(64)
    out = Augmentation(flip=True)(x, generator)
    flipped = [torch.equal(sample, mirrored) for sample, mirrored in zip(out, x.flip(3), strict=True)]
    left = [torch.equal(sample, original) for sample, original in zip(out, x, strict=True)]
    assert all(a != b for a, b in zip(flipped, left, strict=True))
    assert 16 < sum(flipped) < 48


def test_a_roll_moves_the_whole_batch_by_one_amount_within_the_limit() -> None:
    x = pixels(4)
    seen: set[tuple[int, int]] = set()
    for seed in range(60):
        out = Augmentation(roll=0.25)(x, torch.Generator().manual_seed(seed))
        amounts = [(dy, dx) for dy in range(-3, 4) for dx in range(-5, 6) if torch.equal(out, x.roll((dy, dx), (2, 3)))]
        assert len(amounts) == 1
        seen.add(amounts[0])
    assert {dy for dy, _ in seen} == set(range(-3, 4))
    assert {dx for _, dx in seen} == set(range(-5, 6))


@pytest.mark.parametrize("channels", [1, 3])
def test_brightness_scales_each_sample_by_its_own_factor(channels: int, generator: torch.Generator) -> None:
    x = pixels(channels=channels)
    out = Augmentation(jitter=(0.4, 0, 0, 0))(x, generator)
    factors = (out / x).flatten(1)
    torch.testing.assert_close(factors, factors[:, :1].expand_as(factors), rtol=1e-4, atol=1e-5)
    assert len(factors[:, 0].unique()) == len(x)
    assert bool(((factors > 0.6 - 1e-4) & (factors < 1.4 + 1e-4)).all())
    assert float(factors[:, 0].max() - factors[:, 0].min()) > 0.3


@pytest.mark.parametrize("channels", [1, 3])
def test_contrast_scales_the_distance_from_each_samples_mean(channels: int, generator: torch.Generator) -> None:
    x = pixels(channels=channels)
    out = Augmentation(jitter=(0, 0.4, 0, 0))(x, generator)
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
    changed = (Augmentation(jitter=jitter)(x, generator) - x).abs().amax((1, 2, 3)) > 1e-3
    assert bool(changed.all()) if channels == 3 else not bool(changed.any())


def test_saturation_leaves_gray_and_hue_leaves_brightness(generator: torch.Generator) -> None:
    gray = pixels(channels=1).expand(-1, 3, -1, -1)
    torch.testing.assert_close(Augmentation(jitter=(0, 0, 0.5, 0))(gray, generator), gray, rtol=0, atol=1e-3)
    x = pixels()
    turned = Augmentation(jitter=(0, 0, 0, 0.2))(x, generator)
    torch.testing.assert_close(turned.amax(1), x.amax(1), rtol=0, atol=1e-3)  # value and saturation of HSV stay
    torch.testing.assert_close(turned.amin(1), x.amin(1), rtol=0, atol=1e-3)


def ramps(channels: int = 1) -> Tensor:
    """200 images of 10x10 whose value is the column."""
    return torch.arange(10.0).view(1, 1, 1, 10).expand(200, channels, 10, 10)


def test_shifting_takes_every_amount_and_repeats_edges(generator: torch.Generator) -> None:
    moved = Augmentation(shift=0.2)(ramps(), generator)
    assert {float(row[0, 5, 5]) - 5 for row in moved} == {-2, -1, 0, 1, 2}
    assert float(moved.min()) == 0
    assert float(moved.max()) == 9


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_a_share_of_the_images_loses_its_colour(channels: int, generator: torch.Generator) -> None:
    x = pixels(200, channels)
    out = Augmentation(grayscale=0.2)(x, generator)
    changed = (out != x).flatten(1).any(1)
    if channels != 3:
        assert not changed.any()
        return
    assert 20 < int(changed.sum()) < 60
    gray = out[changed]
    torch.testing.assert_close(gray, gray[:, :1].expand_as(gray))
    torch.testing.assert_close(gray[:, 0], (x[changed] * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1))


def test_a_share_of_the_images_is_blurred_each_by_its_own_deviation(generator: torch.Generator) -> None:
    """Of a point, a Gaussian: what is left in the middle is about 1 / (2 pi sigma^2)."""
    x = torch.zeros(200, 2, 25, 25)
    x[:, :, 12, 12] = 1.0
    out = Augmentation(blur=0.5, sigma=(1.0, 2.0))(x, generator)
    blurred = out[(out != x).flatten(1).any(1)]
    assert 70 < len(blurred) < 130
    torch.testing.assert_close(blurred.sum((2, 3)), torch.ones(len(blurred), 2), rtol=1e-4, atol=1e-4)
    sigma = (2 * torch.pi * blurred[:, 0, 12, 12]).rsqrt()
    assert 0.99 < float(sigma.min()) < 1.1
    assert 1.9 < float(sigma.max()) < 2.01


def test_a_blur_leaves_a_flat_image_whatever_its_size(generator: torch.Generator) -> None:
    x = torch.full((4, 1, 3, 5), 0.25)
    torch.testing.assert_close(Augmentation(blur=1.0)(x, generator), x)


@pytest.mark.parametrize("index", [2, 3])
def test_colour_factors_differ_between_samples(index: int, generator: torch.Generator) -> None:
    x = pixels(1).expand(16, -1, -1, -1)
    jitter = tuple(0.2 if position == index else 0.0 for position in range(4))
    out = Augmentation(jitter=jitter)(x, generator)  # type: ignore[arg-type]
    distances = (out[:, None] - out[None]).abs().amax((2, 3, 4)) + torch.eye(16)
    assert float(distances.min()) > 1e-5


@pytest.mark.parametrize("channels", [1, 3])
def test_gradient_reaches_every_pixel(channels: int, generator: torch.Generator) -> None:
    x = pixels(4, channels).requires_grad_(True)
    out = Augmentation(flip=True, roll=0.2, jitter=(0.2, 0.2, 0.2, 0.1))(x, generator)
    (out * torch.rand(out.shape, generator=generator)).sum().backward()
    assert x.grad is not None
    assert bool(torch.isfinite(x.grad).all())
    assert float((x.grad != 0).float().mean()) > 0.999


@pytest.mark.parametrize("value", [0.0, 0.4, 1.0])
def test_gradient_is_finite_for_gray_and_saturated_pixels(value: float, generator: torch.Generator) -> None:
    x = torch.full((4, 3, 5, 5), value, requires_grad=True)
    Augmentation(jitter=(0.2, 0.2, 0.2, 0.1))(x, generator).square().sum().backward()
    assert x.grad is not None
    assert bool(torch.isfinite(x.grad).all())


@pytest.mark.parametrize("channels", [1, 3])
def test_the_generator_decides(channels: int) -> None:
    x = pixels(channels=channels)
    how = Augmentation(flip=True, roll=0.2, jitter=(0.2, 0.2, 0.2, 0.1))
    first, again, other = (how(x, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
