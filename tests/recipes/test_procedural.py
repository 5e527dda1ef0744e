"""Dead leaves: ranges, shapes, seeds, and the spectrum that photographs have and noise has not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from recipes.synth.procedural import dead_leaves


def draw(count: int, channels: int, size: tuple[int, int], seed: int = 0) -> Tensor:
    return dead_leaves(count, channels, size, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("channels", "size"), [(3, (32, 32)), (1, (28, 28)), (5, (17, 40)), (3, (1, 1)), (3, (2, 64))])
def test_images_have_their_shape_and_stay_in_range(channels: int, size: tuple[int, int]) -> None:
    images = draw(3, channels, size)
    assert images.shape == (3, channels, *size)
    assert float(images.min()) >= 0
    assert float(images.max()) <= 1
    assert len({image.numpy().tobytes() for image in images}) == 3


def test_the_generator_decides_every_pixel() -> None:
    torch.manual_seed(1)
    first = draw(2, 3, (24, 24))
    torch.manual_seed(2)
    assert torch.equal(first, draw(2, 3, (24, 24)))
    assert not torch.equal(first, draw(2, 3, (24, 24), seed=1))


def slope(images: Tensor) -> float:
    """Exponent of the power spectrum over radial frequency: about -2 for photographs, 0 for white noise."""
    side = images.shape[-1]
    frequency = torch.fft.fftfreq(side)
    radius = (frequency[:, None].square() + frequency.square()).sqrt().flatten()
    power = torch.fft.fft2(images).abs().square().mean((0, 1)).flatten()
    band = (radius > 2 / side) & (radius < 0.4)
    x, y = radius[band].log(), power[band].log()
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / x.square().sum())


def test_the_spectrum_falls_as_that_of_photographs() -> None:
    assert -3 < slope(draw(8, 1, (64, 64))) < -1.5
    assert abs(slope(torch.rand(8, 1, 64, 64, generator=torch.Generator().manual_seed(0)))) < 0.3
