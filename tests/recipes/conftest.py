"""Fixtures of the recipe tests: the embedded models in torch, and the embedded images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch

from converters.load import Classifier, load_classifier
from converters.torch_module import TorchClassifier, to_torch
from recipes import zoo
from recipes.images import ImageSet, load_images


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors run faster, and bit for bit alike, on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def embedded() -> Callable[[str], Classifier]:
    """Embedded classifiers by name, loaded once."""
    return cache(lambda name: load_classifier(zoo.model_path(name)))


@pytest.fixture(scope="session")
def torch_model(embedded: Callable[[str], Classifier]) -> Callable[[str], TorchClassifier]:
    """Embedded classifiers by name as torch modules, converted once."""
    return cache(lambda name: to_torch(embedded(name)))


@pytest.fixture(scope="session")
def calibration_images() -> ImageSet:
    """32 real training images."""
    return load_images(zoo.calibration_images_path(), 32)


@pytest.fixture(scope="session")
def test_images() -> ImageSet:
    """500 labelled images to judge by."""
    return load_images(zoo.test_images_path(), 500)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
