"""A path becomes a checked, normalised ONNX classifier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from converters.classifier import Classifier, build, constants
from converters.detect import detect
from converters.errors import MixMixError, ModelError
from converters.files import check_skeleton, read_model
from converters.graphs import constant_behind, to_numpy
from converters.input_spec import PIXEL_KEYS, resolve, stated_keys
from converters.passes import LAYERS
from converters.precision import FLOATS, IMAGE_TYPES


def load_classifier(
    path: Path | str, options: Mapping[str, Any] | None = None, *, open_size: tuple[int, int] | None = None
) -> Classifier:
    """Read, check and normalise the classifier at `path`; `options` are input-spec keys that the user gave.

    Where nobody says how the model takes pixels, that is judged from the model (`detect`), and sides that it leaves
    open are those of `open_size`. Raises ModelError when the file is missing, damaged, not ONNX or not an image
    classifier, and SpecError when its input spec cannot be used.
    """
    path = Path(path)
    try:
        return _load(path, options, open_size)
    except MixMixError:
        raise
    except Exception as error:  # a damaged field can lead anywhere
        raise ModelError(f"{path} is damaged ({type(error).__name__}): fetch or export it again") from error


def _load(path: Path, options: Mapping[str, Any] | None, open_size: tuple[int, int] | None) -> Classifier:
    file = read_model(path)
    check_skeleton(file.skeleton, path)
    original = file.model
    _finite(original, path)
    image = _image_input(original, path)
    common.InlinePass()(original)
    _not_training(original, path)
    remarks = _in_inference_form(original, path)
    shape = [dim if isinstance(dim, int) and dim > 0 else None for dim in image.shape or []]
    properties = dict(original.metadata_props)
    spec = resolve(path, shape, properties, options, open_size=open_size)
    classifier = build(path, original, spec, file.sha256, size_bytes=file.size_bytes, is_file=not remarks)
    classifier = replace(classifier, remarks=remarks)
    stated = stated_keys(path, properties, options)
    said = [key for key in PIXEL_KEYS if key in stated]
    if len(said) == len(PIXEL_KEYS):
        return classifier
    detection = detect(classifier, stated)
    if detection is not None and all(_alike(getattr(spec, key), detection.keys[key]) for key in said):
        spec = resolve(path, shape, properties, options, detection.keys, open_size)
        remarks = (*remarks, f"{' and '.join(said)} said, and what was found goes with that") if said else remarks
        return replace(classifier, spec=spec, detection=detection, remarks=remarks)
    sure = detection is not None and detection.confidence == 1
    if not said or ({"mean", "std"} <= set(said) and not sure):  # numbers that a scale of 1 goes with
        return classifier
    return replace(classifier, remarks=(*remarks, _partly(said)))


def _alike(said: float | tuple[float, ...], found: float | tuple[float, ...]) -> bool:
    """Whether what is said of pixels is what was found of them, about: 127 is 127.5."""
    return bool(np.allclose(np.atleast_1d(said), np.atleast_1d(found), rtol=0.03, atol=0.01))


def _partly(said: Sequence[str]) -> str:
    """A remark where only some of the keys that belong together are said, and nothing fits them of what was found."""
    others = " and ".join(key for key in PIXEL_KEYS if key not in said)
    return f"warning: {' and '.join(said)} said, {others} assumed: set all three if that is wrong"


def _image_input(model: ir.Model, path: Path) -> ir.Value:
    inputs = [value for value in model.graph.inputs if not value.is_initializer()]
    if len(inputs) != 1:
        names = ", ".join(str(value.name) for value in inputs) or "none"
        fixed = [value for value in inputs if value.shape is not None and value.shape.is_static()]
        hint = ""
        if fixed and len(fixed) == len(inputs) - 1:  # such as mean and variance of Keras's Normalization
            constants = " and ".join(f"{value.name} {list(value.shape or ())}" for value in fixed)
            hint = f"; {constants} may be constants that the exporter left without values: export it with them inside"
        raise ModelError(f"{path} has {len(inputs)} inputs ({names}): an image classifier takes exactly one{hint}")
    image = inputs[0]
    if image.shape is None or len(image.shape) != 4:
        raise ModelError(f"{path}: input {image.name} has shape {image.shape}: an image batch has 4 dimensions")
    if image.dtype not in IMAGE_TYPES:
        raise ModelError(f"{path}: input {image.name} is {image.dtype}: export it with a float or uint8 input")
    return image


def _finite(model: ir.Model, path: Path) -> None:
    """Refuse NaN anywhere, and infinity in weights; masks and what pads a MaxPool are infinite by right."""
    for value in constants(model):
        tensor = ir.convenience.get_const_tensor(value)
        if tensor is None or tensor.dtype not in FLOATS:
            continue
        array = tensor.numpy()
        array = array.astype(np.float32) if array.dtype.itemsize < 4 else array
        if np.isfinite(array).all():
            continue
        weighs = any(node.op_type in (*LAYERS, "BatchNormalization") for node, _ in value.uses())
        if weighs or np.isnan(array).any():
            raise ModelError(f"{path}: weight {value.name} contains NaN or infinity: export the model again")


def _not_training(model: ir.Model, path: Path) -> None:
    """Refuse a Dropout that drops: the model answers otherwise at every run."""
    for node in model.graph:
        if node.op_type != "Dropout" or len(node.inputs) < 3:
            continue
        training, ratio = (constant_behind(node.inputs[index]) for index in (2, 1))
        dropping = ratio is None or to_numpy(ratio).item() > 0
        if training is not None and bool(to_numpy(training)) and dropping:
            raise ModelError(
                f"{path}: node {node.name or node.op_type} drops at random, as in training: export the model in"
                " evaluation mode (TrainingMode.PRESERVE keeps its BatchNorm)"
            )


def _in_inference_form(model: ir.Model, path: Path) -> tuple[str, ...]:
    """Let every BatchNormalization that takes the statistics of its batch take the stored ones; what to say of it."""
    found = 0
    for node in model.graph:
        mode = node.attributes.get("training_mode")
        if node.op_type != "BatchNormalization" or not (len(node.outputs) > 1 or (mode and mode.as_int())):
            continue
        if any(value.uses() or value.is_graph_output() for value in node.outputs[1:]):
            raise ModelError(
                f"{path}: node {node.name or node.op_type} hands out the statistics of its batch, as in training:"
                " export the model in evaluation mode (TrainingMode.PRESERVE keeps its BatchNorm)"
            )
        node.attributes.pop("training_mode", None)
        node.resize_outputs(1)
        found += 1
    if not found:
        return ()
    return (f"written in training mode: {found} BatchNormalization take their stored statistics, not the batch's",)
