"""Fixtures of the recipe tests: embedded models by name, and the embedded images."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch

from converters.classifier import Classifier
from converters.load import load_classifier
from converters.torch_module import TorchClassifier, to_torch
from recipes import zoo
from recipes.images import ImageSet, load_images

torch.set_num_threads(1)  # small tensors run faster, and bit for bit alike, on one thread


@pytest.fixture(scope="session")
def classifier_of() -> Callable[[str], Classifier]:
    """Embedded classifiers by name, each loaded once."""
    return cache(lambda name: load_classifier(zoo.model_path(name)))


@pytest.fixture(scope="session")
def module_of(classifier_of: Callable[[str], Classifier]) -> Callable[[str], TorchClassifier]:
    """Embedded classifiers by name as torch modules, each converted once."""
    return cache(lambda name: to_torch(classifier_of(name)))


@pytest.fixture(scope="session")
def calibration_images() -> ImageSet:
    """32 real training images."""
    return load_images(zoo.calibration_images_path(), 32)


@pytest.fixture(scope="session")
def judging_images() -> ImageSet:
    """500 labelled images to judge by."""
    return load_images(zoo.test_images_path(), 500)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
