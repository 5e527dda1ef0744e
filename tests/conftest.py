"""What the tests of all floors share: one thread, fixed seeds, no deadlines, the embedded models, files and folders."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import settings

from converters.classifier import Classifier
from converters.conversion import to_torch
from converters.load import load_classifier
from converters.torch_module import TorchClassifier
from recipes import zoo
from tests import models

torch.set_num_threads(1)
settings.register_profile("shared machine", deadline=None)
settings.load_profile("shared machine")

EMBEDDED_MODELS = sorted(zoo.EMBEDDED.glob("*.onnx"))
assert EMBEDDED_MODELS, f"no embedded model in {zoo.EMBEDDED}: most tests would run on nothing"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture(scope="session", params=EMBEDDED_MODELS, ids=lambda path: path.stem)
def embedded_path(request: pytest.FixtureRequest) -> Path:
    """The file of each embedded model in turn."""
    return Path(request.param)


@pytest.fixture(scope="session")
def embedded(embedded_path: Path) -> Classifier:
    """Each embedded model, loaded; not to be changed."""
    return load_classifier(embedded_path)


@pytest.fixture(scope="session")
def embedded_module(embedded: Classifier) -> TorchClassifier:
    """Each embedded model as a torch module, not yet compared with onnxruntime."""
    return to_torch(embedded, check=False)


@pytest.fixture(scope="session")
def classifier_of() -> Callable[[str], Classifier]:
    """Embedded classifiers by name, each loaded once."""
    return cache(lambda name: load_classifier(zoo.model_path(name)))


@pytest.fixture(scope="session")
def module_of(classifier_of: Callable[[str], Classifier]) -> Callable[[str], TorchClassifier]:
    """Embedded classifiers by name as torch modules, each converted once."""
    return cache(lambda name: to_torch(classifier_of(name)))


@pytest.fixture
def write(tmp_path: Path) -> Callable[[onnx.ModelProto], Path]:
    """Writes a model to `model.onnx` in the test's folder."""
    return lambda model: models.write(model, tmp_path / "model.onnx")


@pytest.fixture
def load(write: Callable[[onnx.ModelProto], Path]) -> Callable[[onnx.ModelProto], Classifier]:
    """Writes a model and loads it as a classifier."""
    return lambda model: load_classifier(write(model))


@pytest.fixture
def unwritable(tmp_path: Path) -> Iterator[Path]:
    """A folder that nobody here can write into: root passes over permissions, but not over /sys."""
    if os.geteuid() == 0:
        yield Path("/sys")
        return
    folder = tmp_path / "unwritable"
    folder.mkdir()
    folder.chmod(0o555)
    yield folder
    folder.chmod(0o755)
