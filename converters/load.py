"""A path becomes a checked, normalised ONNX classifier."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from converters import passes
from converters.errors import MixMixError, ModelError
from converters.input_spec import InputSpec, resolve

SOFTMAX_KINDS = {"Softmax": "softmax", "LogSoftmax": "log-softmax"}
FLOAT_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)


@dataclass(frozen=True)
class Classifier:
    """An ONNX image classifier.

    `original` is the graph as the file has it and is never changed; `normal` is a private copy that the passes have
    brought to one spelling, in which initializers and values keep their names. `logits` names the value before a
    closing softmax, or the output itself.
    """

    path: Path
    original: ir.Model
    normal: ir.Model
    spec: InputSpec
    input_name: str
    output_name: str
    logits: str
    output_kind: str
    opset: int
    size_bytes: int
    sha256: str
    passes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.path.stem

    def parameter_count(self) -> int:
        """Elements of all float initializers and constants, as the file has them."""
        tensors = [ir.convenience.get_const_tensor(value) for value in _constants(self.original)]
        return sum(tensor.size for tensor in tensors if tensor is not None and tensor.dtype in FLOAT_TYPES)

    @property
    def fixed_batch(self) -> int | None:
        """The batch size that the file insists on, or None where it takes any."""
        image = next(value for value in self.original.graph.inputs if value.name == self.input_name)
        batch = image.shape[0] if image.shape is not None else None
        return batch if isinstance(batch, int) else None


def load_classifier(path: Path, options: Mapping[str, Any] | None = None) -> Classifier:
    """Read, check and normalise the classifier at `path`; `options` are input-spec keys that the user gave.

    Raises ModelError when the file is missing, damaged, not ONNX or not an image classifier, and SpecError when its
    input spec cannot be used.
    """
    try:
        return _load(path, options)
    except MixMixError:
        raise
    except Exception as error:  # a damaged field can lead anywhere
        raise ModelError(f"{path} is damaged ({type(error).__name__}): fetch or export it again") from error


def _load(path: Path, options: Mapping[str, Any] | None) -> Classifier:
    proto, sha256 = _read(path)
    original = ir.from_proto(proto)
    _finite(original, path)
    image = _image_input(original, path)
    _one_output(original, path)
    shape = [dim if isinstance(dim, int) and dim > 0 else None for dim in image.shape or []]
    spec = resolve(path, shape, dict(original.metadata_props), options)
    return build(path, original, spec, sha256)


def build(path: Path, original: ir.Model, spec: InputSpec, sha256: str = "") -> Classifier:
    """The classifier around a graph that has been checked already (a loaded one, or one prepared for quantization)."""
    normal = original.clone()
    image = next(value for value in normal.graph.inputs if not value.is_initializer())
    batch = image.shape[0] if image.shape is not None else None
    image.shape = ir.Shape([batch if isinstance(batch, int) else passes.BATCH, *_fixed_shape(spec)])
    applied = passes.normalise(normal)
    output = normal.graph.outputs[0]
    last = output.producer()
    kind, logits = "logits", output
    if last is not None and last.op_type in SOFTMAX_KINDS and last.inputs[0] is not None:
        kind, logits = SOFTMAX_KINDS[last.op_type], last.inputs[0]
    return Classifier(
        path=path,
        original=original,
        normal=normal,
        spec=spec,
        input_name=str(image.name),
        output_name=str(output.name),
        logits=str(logits.name),
        output_kind=kind,
        opset=original.opset_imports.get("", 1),
        size_bytes=file_size(path),
        sha256=sha256,
        passes=applied,
    )


def file_size(path: Path) -> int:
    """Bytes of the model file and of the external data files beside it that it names."""
    size = path.stat().st_size
    proto = onnx.load(path, load_external_data=False)
    names = {
        entry.value for tensor in proto.graph.initializer for entry in tensor.external_data if entry.key == "location"
    }
    return size + sum((path.parent / name).stat().st_size for name in names if (path.parent / name).is_file())


def _fixed_shape(spec: InputSpec) -> list[int]:
    height, width = spec.size
    channels = spec.channel_count
    return [channels, height, width] if spec.layout == "NCHW" else [height, width, channels]


def _read(path: Path) -> tuple[onnx.ModelProto, str]:
    try:
        if path.is_dir():
            raise ModelError(f"{path} is a folder: name the .onnx file in it")
        if not path.is_file():
            raise ModelError(f"{path} does not exist: check the path")
        raw = path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror}): check its permissions") from error
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(raw)
    except DecodeError:
        raise ModelError(f"{path} is not an ONNX model, or is cut off: fetch or export it again") from None
    for entry in (*proto.opset_import, *proto.graph.node):
        if entry.domain == "ai.onnx":  # the default domain's long name
            entry.domain = ""
    if not proto.graph.node:
        raise ModelError(f"{path} is not an ONNX model (no graph in it): fetch or export it again")
    try:
        onnx.load_external_data_for_model(proto, str(path.parent))
    except (OSError, onnx.checker.ValidationError, ValueError) as error:
        raise ModelError(f"{path}: its external data cannot be read ({error}): keep the data file beside it") from error
    try:
        onnx.checker.check_model(proto if proto.ByteSize() < 2**31 - 1 else str(path))
    except UnicodeDecodeError:
        raise ModelError(f"{path} is damaged (a name in it is not text): fetch or export it again") from None
    except onnx.checker.ValidationError as error:
        # An operator of another domain is no damage: the conversion names it, with its node.
        if "No opset import" not in str(error) and "No Op registered" not in str(error):
            reason = " ".join(str(error).split())[:200]
            raise ModelError(f"{path} is not a valid ONNX model ({reason}): export it again") from error
    return proto, hashlib.sha256(raw).hexdigest()


def _image_input(model: ir.Model, path: Path) -> ir.Value:
    inputs = [value for value in model.graph.inputs if not value.is_initializer()]
    if len(inputs) != 1:
        names = ", ".join(str(value.name) for value in inputs) or "none"
        raise ModelError(f"{path} has {len(inputs)} inputs ({names}): an image classifier takes exactly one")
    image = inputs[0]
    if image.shape is None or len(image.shape) != 4:
        raise ModelError(f"{path}: input {image.name} has shape {image.shape}: an image batch has 4 dimensions")
    if image.dtype != ir.DataType.FLOAT:
        raise ModelError(f"{path}: input {image.name} is {image.dtype}: export it with a float32 input")
    return image


def _one_output(model: ir.Model, path: Path) -> None:
    outputs = model.graph.outputs
    if len(outputs) != 1:
        names = ", ".join(str(value.name) for value in outputs)
        raise ModelError(
            f"{path} has {len(outputs)} outputs ({names}), like a detector: a classifier has one, [batch, classes]"
        )
    shape = outputs[0].shape
    if shape is not None and len(shape) != 2:
        raise ModelError(
            f"{path}: output {outputs[0].name} has shape {shape}, not [batch, classes]: it is not an image classifier"
        )
    if any(node.op_type == "NonMaxSuppression" for node in model.graph):
        raise ModelError(f"{path} selects boxes (NonMaxSuppression), so it is a detector: give an image classifier")


def _constants(model: ir.Model) -> list[ir.Value]:
    """Initializers, and the outputs of Constant nodes."""
    nodes = [node.outputs[0] for node in model.graph if node.op_type == "Constant"]
    return [*model.graph.initializers.values(), *nodes]


def _finite(model: ir.Model, path: Path) -> None:
    for value in _constants(model):
        tensor = ir.convenience.get_const_tensor(value)
        if tensor is not None and tensor.dtype in FLOAT_TYPES:
            name, array = value.name, tensor.numpy()
            if not np.isfinite(array.astype(np.float32) if array.dtype.itemsize < 4 else array).all():
                raise ModelError(f"{path}: weight {name} contains NaN or infinity: export the model again")
