"""Image sets as a model's input tensors: what calibration readers of other tools take."""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from converters.classifier import Classifier
from converters.outputs import ensure_writable, write_atomically
from recipes.images import ImageSet

OTHER_TYPES: dict[str, type[np.generic]] = {"UINT8": np.uint8, "FLOAT16": np.float16}
"""Input types that numpy has too."""


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

    float32, or uint8 or float16 where the model's own input is that. Raises MixMixError for images that do not fit
    the model, or an output that exists.
    """
    ensure_writable(output, overwrite=overwrite)
    tensors = classifier.as_stored(classifier.spec.to_input(images.pixels)).contiguous().numpy()
    tensors = tensors.astype(OTHER_TYPES.get(classifier.image_type.name, np.float32))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive, archive.open(f"{classifier.input_name}.npy", "w") as entry:
        np.lib.format.write_array(entry, tensors, allow_pickle=False)  # savez takes no array called "file"
    content = buffer.getvalue()
    write_atomically(output, content)
    return Tensors(output, classifier.input_name, tensors.shape, str(tensors.dtype), len(content))
