"""What `synth` and `demo` left in a folder, read back for a report, and the way of a report onto disk."""

from __future__ import annotations

import io
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from converters.outputs import write_atomically
from recipes.image_store import PREVIEW_IMAGES, ImageStore
from recipes.images import PREVIEW, contact_sheet, load_images, to_bytes
from recipes.refusals import MANIFEST, DataError

HEAVY = 2_000_000
"""Bytes of a contact sheet above which it is stored as JPEG: photographs compress badly as PNG."""
QUALITY = 88


@dataclass(frozen=True)
class Sheet:
    """A contact sheet: the content of an image file, and what kind of file."""

    content: bytes
    media: str
    width: int
    height: int


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class Shard(_Part):
    """One batch of a set: losses by name, as its images were read back."""

    index: int
    images: int
    seconds: float = 0.0
    attempts: int = 1
    losses: dict[str, float | None] = {}


class _Model(_Part):
    name: str
    sha256: str = ""
    batchnorms: int | None = None
    evens: int | None = None
    labels: bool | None = None


class _Settings(_Part):
    images: int
    batch: int


class _Identity(_Part):
    recipe: str
    settings: _Settings
    size: tuple[int, int]
    seed: int
    models: list[_Model] = Field(min_length=1)
    versions: dict[str, str] = {}


class _Manifest(_Part):
    finished: bool
    identity: _Identity
    shards: list[Shard] = []
    losses: dict[str, float | None] = {}


@dataclass(frozen=True)
class SetRecord:
    """A synthesized set: what it was made from and how, and what came of each shard."""

    made: _Identity
    finished: bool
    shards: list[Shard]
    losses: dict[str, float | None]
    """Means over the shards; empty where the set is not finished."""
    sheet: Sheet | None

    @property
    def images(self) -> int:
        return sum(shard.images for shard in self.shards)

    @property
    def seconds(self) -> float:
        return sum(shard.seconds for shard in self.shards)


def is_set(directory: Path) -> bool:
    """Whether `synth` wrote the folder."""
    return (directory / MANIFEST).is_file()


def read_set(directory: Path) -> SetRecord:
    """Read what `synth` wrote, finished or not. Raises DataError where the manifest cannot be used."""
    path = directory / MANIFEST
    try:
        manifest = _Manifest.model_validate(json.loads(path.read_bytes()))
        shards = manifest.shards
        if not manifest.finished:  # a killed run had no time to draw up its manifest
            shards = [Shard.model_validate(record) for record in ImageStore(directory, {}).records()]
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} {_why(error)}: it is not, or no longer, what synth wrote") from error
    sheet = read_sheet(directory) or _draw_sheet(directory)
    return SetRecord(manifest.identity, manifest.finished, shards, manifest.losses, sheet)


def _why(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"has no usable {'.'.join(map(str, first['loc'])) or 'content'} ({first['msg'].lower()})"
    if isinstance(error, OSError):
        return f"cannot be read ({error.strerror})"
    return "is not JSON"


def read_sheet(directory: Path) -> Sheet | None:
    """The folder's `preview.png`; None where there is none that can be shown."""
    try:
        content = (directory / PREVIEW).read_bytes()
    except OSError:
        return None
    return _as_sheet(content)


def _draw_sheet(directory: Path) -> Sheet | None:
    """A new contact sheet of what images there are."""
    try:
        return _as_sheet(contact_sheet(to_bytes(load_images(directory, PREVIEW_IMAGES).pixels)))
    except DataError:
        return None


def _as_sheet(content: bytes) -> Sheet | None:
    """The image if it is a whole one, as JPEG where it is heavy."""
    known: dict[str | None, str] = {"PNG": "image/png", "JPEG": "image/jpeg"}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content), formats=list[Any](known)) as image:
                image.load()
                if len(content) > HEAVY and image.format == "PNG":
                    buffer = io.BytesIO()
                    image.convert("L" if image.mode == "L" else "RGB").save(buffer, "JPEG", quality=QUALITY)
                    return Sheet(buffer.getvalue(), known["JPEG"], image.width, image.height)
                return Sheet(content, known[image.format], image.width, image.height)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning):
        return None


def write_text(path: Path, text: str) -> None:
    """Write a whole file or none. Raises OutputError where that is not possible."""
    write_atomically(path, text.encode(errors="replace"))
