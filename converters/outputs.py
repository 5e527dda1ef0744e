"""Files that are there, or are written whole or not at all, and whether they can be.

Imports nothing heavy: the face asks first.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from converters.errors import ModelError, OutputError

TEMPORARY = ".mixmix-"
"""How names of files begin that are being written; one that is left over is from a process that was killed."""


def ensure_model(path: Path) -> None:
    """Raise ModelError where no file is."""
    if path.is_dir():
        raise ModelError(f"{path} is a folder: name the .onnx file in it")
    if not path.is_file():
        raise ModelError(f"{path} does not exist: check the path")


def ensure_writable(path: Path, *, overwrite: bool) -> None:
    """Raise OutputError, before any work is done, when the file exists or its folder cannot be written to."""
    folder = path.parent
    try:
        if path.is_dir():
            raise OutputError(f"{path} is a folder: name a file")
        if path.exists() and not overwrite:
            raise OutputError(f"{path} exists: choose another name, or pass --force to replace it")
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


def write_atomically(path: Path, content: bytes) -> None:
    """Write under a temporary name in the same folder, flush to disk, rename."""
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
