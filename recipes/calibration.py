"""Image sets as a model's input tensors: what calibration readers of other tools take."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from converters.classifier import Classifier
from converters.writeback import ensure_writable, write_atomically
from recipes.images import ImageSet


@dataclass(frozen=True)
class Tensors:
    """What was written: one array under the name of the model's input."""

    output: Path
    key: str
    shape: tuple[int, ...]
    dtype: str
    size_bytes: int


def export_calibration(classifier: Classifier, images: ImageSet, output: Path, *, overwrite: bool = False) -> Tensors:
    """Write `images` as the input of `classifier`, one array [N, ...] under the input's name in an `.npz`.

    float32, or what the model's own input is where that is another type. Raises MixMixError for images that do not fit
    the model, or an output that exists.
    """
    ensure_writable(output, overwrite=overwrite)
    tensors = classifier.as_stored(classifier.spec.to_input(images.pixels)).contiguous().numpy()
    tensors = tensors.astype(classifier.image_type.numpy())
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {classifier.input_name: tensors}
    np.savez(buffer, **arrays)
    content = buffer.getvalue()
    write_atomically(output, content)
    return Tensors(output, classifier.input_name, tensors.shape, str(tensors.dtype), len(content))
