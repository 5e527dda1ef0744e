"""The embedded zoo: small Fashion-MNIST classifiers of six families, and labelled images to judge by.

Trained and exported by `benchmarks/train_zoo.py`. Fashion-MNIST is (c) 2017 Zalando SE, MIT licence.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

EMBEDDED = Path(str(resources.files("recipes"))) / "embedded"
FAMILIES = ("plain", "residual", "inverted", "shuffle", "dense", "excite")


def model_path(name: str) -> Path:
    """The ONNX file of one family (BatchNorm kept), or of `inverted_folded`."""
    return EMBEDDED / f"{name}.onnx"


def test_images_path() -> Path:
    """1,000 labelled test images: only to judge by."""
    return EMBEDDED / "test.npz"


def calibration_images_path() -> Path:
    """256 labelled training images: the bound that real data set."""
    return EMBEDDED / "calibration.npz"
