"""Reading a model file without holding it: large tensors stay where they are until someone asks for their values.

A protobuf file is read as if its large tensors were external data in the file itself: its skeleton, the file without
their bytes, is parsed, and each of them becomes a slice of a file that is read when needed. Real external data, of any
size, goes the same way, so a model of many gigabytes is never twice in memory, nor once before it is converted.
"""

from __future__ import annotations

import hashlib
import logging
import math
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from converters.errors import ModelError
from converters.outputs import ensure_model

LARGE = 1 << 16
"""Bytes from which a tensor's values are left in the file."""

# Field numbers of onnx.proto that lead to tensors, by message.
_INSIDE: dict[str, dict[int, str]] = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor"},
    "function": {7: "node"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph"},
}
_RAW_DATA, _EXTERNAL_DATA, _DATA_LOCATION = 9, 13, 14  # fields of TensorProto
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types


NO_DAMAGE = ("No opset import", "No Op registered", "deprecated in domain_version")
"""What onnx's checker says of operators of other domains, and of old ones: the conversion names them and their node."""


class _DamagedError(ValueError):
    """Bytes that are not a protobuf message."""


@dataclass(frozen=True)
class ModelFile:
    """A file that has been read: the graph, the model proto without large tensors, and what identifies the bytes."""

    model: ir.Model
    skeleton: onnx.ModelProto
    sha256: str
    """Of the file and, where it names external data, of those files' digests in the order of their names behind it."""
    size_bytes: int
    """Bytes of the file and of the external data that it names."""


def read_model(path: Path) -> ModelFile:
    """Read the file at `path`. Raises ModelError when it is missing, unreadable, damaged or not ONNX."""
    try:
        ensure_model(path)
        size = path.stat().st_size
        file = path.open("rb")
        digest = hashlib.file_digest(file, "sha256")
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror}): check its permissions") from error
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(_skeleton_of(file, path.name))
    except (DecodeError, _DamagedError):
        raise ModelError(f"{path} is not an ONNX model, or is cut off: fetch or export it again") from None
    for entry in (*proto.opset_import, *proto.graph.node):
        if entry.domain == "ai.onnx":  # the default domain's long name
            entry.domain = ""
    if not proto.graph.node:
        raise ModelError(f"{path} is not an ONNX model (no graph in it): fetch or export it again")
    if _has_sparse(proto):
        raise ModelError(f"{path} has sparse tensors, which are not supported: store its weights dense")
    logging.getLogger("onnx_ir").setLevel(logging.ERROR)  # remarks on exporters' spelling, a line for each node
    model = ir.from_proto(proto)
    sources = {path.name: _Source(path, size, file)}
    for holder in _external_tensors(model):
        holder.replace(_in_file(holder.tensor, path, sources))
    beside = [source for name, source in sorted(sources.items()) if name != path.name]
    for source in beside:
        digest.update(source.digest())
    return ModelFile(model, proto, digest.hexdigest(), sum(source.size for source in (*beside, sources[path.name])))


@dataclass(frozen=True)
class _Source:
    """A file that tensors lie in.

    The model's own is held open, so that it may be replaced while its tensors are still to be read. Of others there may
    be one a tensor, more than a process may hold.
    """

    path: Path
    size: int
    held: BufferedReader | None = None

    @contextmanager
    def opened(self) -> Iterator[BufferedReader]:
        if self.held is not None:
            yield self.held
            return
        with self.path.open("rb") as file:
            yield file

    def digest(self) -> bytes:
        with self.opened() as file:
            return hashlib.file_digest(file, "sha256").digest()


def _skeleton_of(file: BufferedReader, name: str) -> bytes:
    if not os.fstat(file.fileno()).st_size:
        return b""
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return b"".join(_skeleton(data, 0, len(data), "model", name.encode()))


def _varint(data: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    """The number at a position, and the position behind it."""
    value = shift = 0
    while at < end and shift < 64:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise _DamagedError


def _skeleton(data: mmap.mmap, start: int, end: int, message: str, name: bytes) -> Iterator[bytes]:
    """The bytes of a message without large raw data, for which a reference to the file `name` is put."""
    at = start
    while at < end:
        begin = at
        tag, at = _varint(data, at, end)
        field, wire = tag >> 3, tag & 7
        if wire == _BYTES:
            length, at = _varint(data, at, end)
            body, at = at, at + length
        elif wire == _VARINT:
            _, at = _varint(data, at, end)
        elif wire in (_FIXED64, _FIXED32):
            at += 8 if wire == _FIXED64 else 4
        else:
            raise _DamagedError
        if at > end:
            raise _DamagedError
        if wire != _BYTES or length < LARGE:
            yield data[begin:at]
        elif message == "tensor" and field == _RAW_DATA:
            for key, value in ((b"location", name), (b"offset", b"%d" % body), (b"length", b"%d" % length)):
                yield _field(_EXTERNAL_DATA, _field(1, key) + _field(2, value))
            yield _encoded(_DATA_LOCATION << 3 | _VARINT) + _encoded(onnx.TensorProto.EXTERNAL)
        elif field in _INSIDE.get(message, ()):
            yield _field(field, b"".join(_skeleton(data, body, at, _INSIDE[message][field], name)))
        else:
            yield data[begin:at]


def _encoded(number: int) -> bytes:
    """A varint."""
    found = bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*found, number])


def _field(number: int, content: bytes) -> bytes:
    """A length-delimited field."""
    return _encoded(number << 3 | _BYTES) + _encoded(len(content)) + content


@dataclass(frozen=True)
class _Holder:
    """Where a model has a tensor: an initializer or a node's attribute."""

    tensor: ir.ExternalTensor
    place: ir.Value | tuple[ir.Node, str]

    def replace(self, tensor: ir.TensorProtocol) -> None:
        if isinstance(self.place, ir.Value):
            self.place.const_value = tensor
        else:
            node, name = self.place
            node.attributes[name] = ir.AttrTensor(name, tensor)


def _external_tensors(model: ir.Model) -> list[_Holder]:
    found: list[_Holder] = []
    for graph in model.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                found.append(_Holder(value.const_value, value))
    for node in (node for graph in (*model.graphs(), *model.functions.values()) for node in graph):
        for name, attribute in node.attributes.items():
            if attribute.type == ir.AttributeType.TENSOR and isinstance(attribute.value, ir.ExternalTensor):
                found.append(_Holder(attribute.value, (node, name)))
    return found


def _in_file(tensor: ir.ExternalTensor, path: Path, sources: dict[str, _Source]) -> ir.TensorProtocol:
    """The tensor as a slice of its file. Raises ModelError when the file is not there, or too short."""
    location = str(tensor.location)
    where = f"{path}: the external data of {tensor.name}"
    if Path(location).is_absolute() or ".." in Path(location).parts:
        raise ModelError(f"{where} lies outside the model's folder ({location}): keep the data file beside the model")
    if location not in sources:
        try:
            with (path.parent / location).open("rb") as file:
                sources[location] = _Source(path.parent / location, os.fstat(file.fileno()).st_size)
        except OSError as error:
            raise ModelError(
                f"{where} cannot be read ({location}: {error.strerror}): keep the data file beside the model"
            ) from error
    source, dtype, shape = sources[location], ir.DataType(tensor.dtype), tuple(tensor.shape.numpy())
    size, offset = math.ceil(math.prod(shape) * dtype.bitwidth / 8), tensor.offset or 0
    if size != (size if tensor.length is None else tensor.length):
        raise ModelError(
            f"{where} has {tensor.length} bytes, its shape {list(shape)} needs {size}: fetch or export the model again"
        )
    if offset + size > source.size:
        raise ModelError(f"{where} is cut off ({location} is too short): fetch or export the model again")

    def read() -> ir.TensorProtocol:
        with source.opened() as file:
            return _read(file, offset, size, dtype, shape)

    return ir.LazyTensor(read, dtype=dtype, shape=ir.Shape(shape), name=tensor.name)


def _read(
    file: BufferedReader, offset: int, size: int, dtype: ir.DataType, shape: tuple[int, ...]
) -> ir.TensorProtocol:
    buffer = np.empty(size, np.uint8)
    file.seek(offset)
    if file.readinto(buffer.data) < size:
        raise OSError("a model file has become shorter")
    if dtype.bitwidth < 8:
        proto = onnx.TensorProto(data_type=dtype.value, dims=shape, raw_data=buffer.tobytes())
        return ir.serde.TensorProtoTensor(proto)
    return ir.Tensor(buffer.view(dtype.numpy()).reshape(shape), dtype=dtype)


def _places(model: onnx.ModelProto) -> Iterator[onnx.GraphProto | onnx.FunctionProto]:
    """The graph, its subgraphs and the functions, and theirs."""
    waiting: list[onnx.GraphProto | onnx.FunctionProto] = [model.graph, *model.functions]
    while waiting:
        place = waiting.pop()
        yield place
        for attribute in (attribute for node in place.node for attribute in node.attribute):
            waiting += [attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else attribute.graphs


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every dense tensor of a model."""
    for place in _places(model):
        if isinstance(place, onnx.GraphProto):
            yield from place.initializer
        for attribute in (attribute for node in place.node for attribute in node.attribute):
            if attribute.type == onnx.AttributeProto.TENSOR:
                yield attribute.t
            yield from attribute.tensors


def _has_sparse(model: onnx.ModelProto) -> bool:
    kinds = (onnx.AttributeProto.SPARSE_TENSOR, onnx.AttributeProto.SPARSE_TENSORS)
    return any(
        (isinstance(place, onnx.GraphProto) and len(place.sparse_initializer) > 0)
        or any(attribute.type in kinds for node in place.node for attribute in node.attribute)
        for place in _places(model)
    )


def check_skeleton(proto: onnx.ModelProto, path: Path) -> None:
    """onnx's checker on a model without its large tensors. Raises ModelError where the graph is not valid."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    copy.ir_version = max(copy.ir_version, 4)  # before, every initializer had to be an input; no runtime insists
    for tensor in _tensors(copy):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:  # its file is our business: what is left is empty
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
            tensor.dims[:] = [0]
    try:
        onnx.checker.check_model(copy)
    except UnicodeDecodeError:
        raise ModelError(f"{path} is damaged (a name in it is not text): fetch or export it again") from None
    except onnx.checker.ValidationError as error:
        if not any(words in str(error) for words in NO_DAMAGE):
            reason = " ".join(str(error).split())[:200]
            raise ModelError(f"{path} is not a valid ONNX model ({reason}): export it again") from error
