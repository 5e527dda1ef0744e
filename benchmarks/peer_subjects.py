"""What the quantizers of `peer_quantizers.py` are given, and what their files are judged by."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from synthesis_quality import classifier, judging, training

from converters.classifier import Classifier
from converters.conversion import to_torch
from converters.files import read_model
from converters.load import load_classifier
from converters.writeback import save
from recipes.images import ImageSet, load_images, to_bytes
from recipes.synth.engine import synthesize
from recipes.synth.settings import load_synth_recipe
from recipes.validate import decibels, top_k

Array = NDArray[Any]
LITE0 = "lite0"
IMAGES, BATCH = 128, 50


@dataclass(frozen=True)
class Subject:
    """A float model, and what judges the files that are made of it."""

    path: Path
    inputs: Array
    """Test images as the model takes them [N, C, H, W]."""
    labels: Array | None
    """Their classes; where there are none, what the float model says is held to be right."""
    rounds: int
    """Runs that latency is the median of."""

    @cached_property
    def logits(self) -> Array:
        return logits(session(self.path), self.inputs)

    def top1(self, found: Array) -> float:
        """In per cent; agreement where there are no labels."""
        return 100 * top_k(found, self.logits.argmax(1) if self.labels is None else self.labels, 1)

    def snr(self, found: Array) -> float:
        return decibels(self.logits, found)


@cache
def embedded(name: str) -> Subject:
    """A model of the embedded zoo, by true labels."""
    model, test = classifier(name), judging()
    assert test.labels is not None
    return Subject(model.path, as_taken(model, test), test.labels.numpy(), 3000)


def embedded_images(name: str, folder: Path) -> Path:
    """Real ones."""
    return written(classifier(name), training(IMAGES, 0), folder / f"{name}-images.npz")


def lite0(folder: Path) -> tuple[Subject, Path]:
    """EfficientNet-Lite0, by crops of photographs, and images made from it."""
    from efficientnet_lite0 import SPEC, export  # these two need packages that the embedded models do not
    from photographs import random_crops

    model = load_classifier(export(folder)[0], SPEC)
    path, made = folder / f"{LITE0}.onnx", folder / f"{LITE0}-images"
    if not path.exists():  # so that the file says how it takes pixels
        save(read_model(model.path).model, path, model.spec.to_metadata())
    settings = load_synth_recipe("default", "default", (), None, {"images": IMAGES})
    synthesize([to_torch(model)], made, settings, resume=made.exists())
    images = written(model, load_images(made), folder / f"{LITE0}-images.npz")
    return Subject(path, as_taken(model, random_crops()), None, 200), images


def as_taken(model: Classifier, images: ImageSet) -> Array:
    return np.ascontiguousarray(model.spec.to_input(images.pixels).numpy())


def written(model: Classifier, images: ImageSet, path: Path) -> Path:
    """An .npz of `images` in bytes and, as the model takes them, `inputs`."""
    if not path.exists():
        np.savez(path, images=to_bytes(images.pixels), inputs=as_taken(model, images))
    return path


def session(path: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def logits(loaded: Any, inputs: Array) -> Array:
    name = loaded.get_inputs()[0].name
    parts = [loaded.run(None, {name: inputs[i : i + BATCH]})[0] for i in range(0, len(inputs), BATCH)]
    return np.concatenate(parts).astype(np.float64)
