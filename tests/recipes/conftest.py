"""Fixtures of the recipe tests: the embedded images."""

from __future__ import annotations

import pytest
import torch

from recipes import zoo
from recipes.images import ImageSet, load_images
from tests import models

torch.set_num_threads(1)  # small tensors run faster, and bit for bit alike, on one thread


@pytest.fixture(scope="session")
def calibration_images() -> ImageSet:
    """16 real training images."""
    return load_images(zoo.calibration_images_path(), 16)


@pytest.fixture
def small_images(calibration_images: ImageSet) -> ImageSet:
    """Images for the models built by hand."""
    return ImageSet(calibration_images.pixels[:, :, : models.SIDE, : models.SIDE].expand(-1, models.CHANNELS, -1, -1))


@pytest.fixture(scope="session")
def judging_images() -> ImageSet:
    """500 labelled images to judge by."""
    return load_images(zoo.test_images_path(), 500)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
