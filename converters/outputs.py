"""Files that are there, or are written whole or not at all, and whether they can be.

Imports nothing heavy: the face asks first.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from converters.errors import ModelError, OutputError

SUFFIXES = (".onnx", ".ort", ".pb")
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".npy")
"""Files that are images of a set."""
PARTS = (*PICTURES, ".json", ".jsonl")
"""What image sets are made of: other files in their folders may be earlier results."""
SHORT = 127
"""Bytes of a name that one byte of a protocol buffer counts."""
TEMPORARY = ".mixmix-"
"""How names of files begin that are being written; one that is left over is from a process that was killed."""


def ensure_model(path: Path) -> None:
    """Raise ModelError where no file is, or one that onnxruntime cannot open."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ModelError(f"{path} has a name that is not UTF-8, as onnxruntime wants it: rename it") from None
    if path.is_dir():
        raise ModelError(f"{path} is a folder: name the .onnx file in it")
    if not path.is_file():
        raise ModelError(f"{path} does not exist: check the path")


def beside(model: Path, ending: str) -> Path:
    """`model.ENDING` for `model.onnx`; a model's suffix alone goes, as that of `net-1.5` is none."""
    return model.with_name(f"{model.stem if model.suffix.lower() in SUFFIXES else model.name}.{ending}")


def data_beside(path: Path) -> Path:
    """Where the weights of a model go that is too large for one file."""
    return path.with_name(f"{path.name}.data")


def ensure_writable(path: Path, *, overwrite: bool, inputs: Iterable[Path] = ()) -> None:
    """Raise OutputError, before any work is done, when no file can be written to `path`.

    That is where a file exists, where anything else does, where it is one of the `inputs`, where it or its
    `data_beside` is a part of one, and where its folder cannot be written to. What a link points to is what is written.
    """
    try:
        if path.is_dir():
            raise OutputError(f"{path} is a folder: name a file")
        inputs = list(inputs)
        if any(_target(path) == _target(given) for given in inputs):
            raise OutputError(f"{path} is one of the inputs, which are never replaced: choose another name")
        for file in (path, data_beside(path)):
            within = next((given for given in inputs if os.path.lexists(file) and _holds(given, file)), None)
            if within is not None:
                raise OutputError(f"{file} is a part of {within}, which is never replaced: choose another name")
        if path.exists() and not path.is_file():
            raise OutputError(f"{path} is no regular file: choose another output")
        if os.path.lexists(path) and not overwrite:
            raise OutputError(f"{path} exists: choose another name, or pass --force to replace it")
        folder = _target(path).parent
        if not folder.is_dir():
            raise OutputError(f"{folder} is not a folder: create it or choose another output")
        with tempfile.TemporaryFile(dir=folder):
            pass
    except ValueError:  # a NUL character
        raise OutputError(f"{path} is not a file name: choose another output") from None
    except OSError as error:
        raise OutputError(f"{path} cannot be written to ({error.strerror}): choose another output") from error


def ensure_makeable(folder: Path) -> None:
    """Raise OutputError, before any work is done, when a folder can neither be written to nor be made."""
    try:
        there = next(place for place in (folder, *folder.parents) if place.exists())
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise OutputError(f"{folder} cannot be written to ({error.strerror}): choose another output") from error


def _holds(given: Path, path: Path) -> bool:
    """Whether a file is a part of an image set that was given, or external data of a model, as its bytes name them."""
    held, file = _target(given), _target(path)
    if held.is_dir():
        return file.suffix.lower() in PARTS and held in file.parents
    name = Path(os.path.relpath(file, held.parent)).as_posix().encode()
    if held.suffix.lower() not in SUFFIXES or len(name) > SHORT:
        return False
    entry = b"\x0a\x08location\x12" + bytes([len(name)]) + name  # a StringStringEntryProto of a TensorProto
    try:
        with held.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return content.find(entry) >= 0
    except (OSError, ValueError):  # not to be read, or empty: another check says so
        return False


def _target(path: Path) -> Path:
    """Where a link points, and its links, all the way."""
    return Path(os.path.realpath(path))


def write_atomically(path: Path, content: bytes) -> None:
    """Write under a temporary name in the same folder, flush to disk, rename; what a link points to is replaced."""
    path = _target(path)
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=TEMPORARY)
    except OSError as error:
        raise OutputError(f"{path} cannot be written ({error.strerror}): choose another output") from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        Path(temporary).chmod(0o666 & ~umask)
        Path(temporary).replace(path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written ({error.strerror}): choose another output") from error
    finally:
        Path(temporary).unlink(missing_ok=True)
