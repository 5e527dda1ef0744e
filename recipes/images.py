"""Image sets: the one format in which images travel between recipes, and on disk.

In memory: pixels float32 [N, C, H, W] in [0, 1] and, where there are any, labels [N]. On disk: what `synth` writes
(`images/NNNNN/*.png`, `metadata.jsonl`, `manifest.json`), any ImageFolder, or an `.npz`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from converters.errors import SpecError
from converters.outputs import PICTURES
from recipes.refusals import MANIFEST, RECORDS, DataError, check_source, is_set
from recipes.shards import image_files, metadata_rows, read_records

LabelKind = Literal["real", "targets", "none"]
METADATA, PREVIEW = "metadata.jsonl", "preview.png"
MOST_LABEL = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class ImageSet:
    """`pixels` float32 [N, C, H, W] in [0, 1]; `labels` int64 [N] or None.

    `label_kind` says what labels are worth: `real` is ground truth, `targets` is what a synthesized image was made
    for, which is never ground truth.
    """

    pixels: Tensor
    labels: Tensor | None = None
    label_kind: LabelKind = "none"
    source: str = "memory"
    classes: int | None = None
    """How many classes there are, where labels are places in the sorted list of them."""

    def __len__(self) -> int:
        return len(self.pixels)

    def take(self, count: int | None) -> ImageSet:
        """The first `count` images (all, for None)."""
        labels = self.labels[:count] if self.labels is not None else None
        return replace(self, pixels=self.pixels[:count], labels=labels)


@contextmanager
def named_in_errors(images: ImageSet) -> Iterator[None]:
    """A SpecError from within, of images that do not fit a model, says which they are."""
    try:
        yield
    except SpecError as error:
        raise SpecError(f"{images.source}: {error}") from error


def to_bytes(pixels: Tensor) -> NDArray[np.uint8]:
    """Pixels in [0, 1] to 8 bits, [N, H, W, C]: rounded and clipped."""
    return (pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def from_bytes(pixels: NDArray[np.uint8]) -> Tensor:
    """8-bit pixels [N, H, W, C] to float32 [N, C, H, W] in [0, 1]."""
    return torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2).contiguous().float().div_(255)


def gaussian_noise(count: int, channels: int, size: tuple[int, int], seed: int) -> ImageSet:
    """Pixels drawn from N(0.5, 0.25^2) and clipped: the reference that any synthesis has to beat."""
    generator = torch.Generator().manual_seed(seed)
    pixels = (0.5 + 0.25 * torch.randn(count, channels, *size, generator=generator)).clamp(0, 1)
    return ImageSet(from_bytes(to_bytes(pixels)), source=f"gaussian noise, seed {seed}")


def load_images(path: Path, limit: int | None = None, *, size: tuple[int, int] | None = None) -> ImageSet:
    """Read an image set, or `limit` images of it: spread evenly over folders of classes, and else the first.

    In a folder of folders, one a class, the label is a folder's name where all of them are numbers, and otherwise its
    place in their sorted list. With `size` (height, width), image files of other sizes are brought to it: shorter side
    resized, centre cropped.
    Raises DataError with what is wrong, where, and what to do instead.
    """
    check_source(path)
    if path.is_file():
        return _load_npz(path).take(limit)
    if _is_synthesized(path):
        return _load_synthesized(path, limit)
    return _load_folder(path, limit, size)


def _load_npz(path: Path) -> ImageSet:
    try:
        with np.load(path, allow_pickle=False) as archive:  # an .npy under this name has no context: TypeError
            names = archive.files
            arrays = {key: archive[key] for key in ("images", "labels") if key in names}
    except MemoryError:
        raise
    except Exception as error:  # a damaged file can lead a reader anywhere
        raise DataError(f"{path} is not a readable .npz of plain arrays: write it with numpy.savez") from error
    images = arrays.get("images")
    if images is None:
        raise DataError(f"{path} has no array 'images' (it has {', '.join(names) or 'none'}): add one")
    if images.ndim == 4 and not len(images):
        raise DataError(f"{path} holds no images: give one that does")
    if images.ndim != 4 or not images.size:
        raise DataError(
            f"{path}: images have shape {list(images.shape)}, not [N, H, W, C] or [N, C, H, W]: reshape them"
        )
    if _channels_first(images.shape[1:]):
        images = images.transpose(0, 2, 3, 1)
    if images.dtype == np.uint8:
        pixels = from_bytes(images)
    elif np.issubdtype(images.dtype, np.floating):
        pixels = torch.from_numpy(images.astype(np.float32)).permute(0, 3, 1, 2).contiguous()
        if not bool(torch.isfinite(pixels).all()) or float(pixels.min()) < 0 or float(pixels.max()) > 1:
            raise DataError(f"{path}: float images must lie in [0, 1]: scale them, or store uint8")
    else:
        raise DataError(f"{path}: images are {images.dtype}, not uint8 or float in [0, 1]: convert them")
    labels = arrays.get("labels")
    if labels is None:
        return ImageSet(pixels, source=str(path))
    if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(
            f"{path}: labels are {labels.dtype} {list(labels.shape)}, not integers [{len(images)}]: correct them"
        )
    return ImageSet(pixels, torch.from_numpy(labels.astype(np.int64)), "real", str(path))


def _channels_first(shape: tuple[int, ...]) -> bool:
    """Whether an image's shape is [C, H, W] and not [H, W, C]: by gray and colour, then by square sides, then size."""
    first, middle, last = shape
    usual = (first in (1, 3), last in (1, 3))
    if usual[0] != usual[1]:
        return usual[0]
    square = (middle == last, middle == first)
    return square[0] if square[0] != square[1] else first < last


def _load_synthesized(path: Path, limit: int | None) -> ImageSet:
    finished = _is_finished(path)
    try:
        if finished or not (path / RECORDS).is_dir():
            rows = [json.loads(line) for line in (path / METADATA).read_text().splitlines() if line.strip()]
        else:  # the metadata are as they were when the run began: it may have been killed since, or be running
            rows = metadata_rows(read_records(path))
        files = [path / row["file_name"] for row in rows[:limit]]
        labels = torch.tensor([int(row["label"]) for row in rows[:limit]])
    except (OSError, KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise DataError(f"{path / METADATA} is damaged ({error}): synthesize the set again") from error
    if not files:
        raise DataError(f"{path} holds no images yet: finish it with synth --resume")
    lost = next((file for file in files if not file.is_file()), None)
    if lost is not None:
        raise DataError(f"{lost} is missing, which {path / METADATA} lists: synthesize the set again")
    unfinished = "" if finished else " (unfinished: synth --resume completes it)"
    return ImageSet(_stack(files), labels, "targets", f"{path}{unfinished}")


def _is_finished(path: Path) -> bool:
    """Whether the manifest of a synthesized set says so; a set without one was put together by hand."""
    try:
        return bool(json.loads((path / MANIFEST).read_text())["finished"])
    except (OSError, ValueError, KeyError, TypeError):
        return True


def _load_folder(path: Path, limit: int | None, size: tuple[int, int] | None) -> ImageSet:
    folders = sorted(child for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))
    _not_of_a_set(path, folders)
    flat, within = _image_files(path), {folder: _image_files(folder) for folder in folders}
    within = {folder: files for folder, files in within.items() if files}
    if flat and within:
        raise DataError(f"{flat[0]} lies beside folders of classes: move it into one, or away")
    if flat:
        return ImageSet(_stack(flat[:limit], size), source=str(path))
    if not within:
        deeper = next(
            (f for folder in folders for f in sorted(folder.iterdir()) if f.is_dir() and _image_files(f)), None
        )
        hint = f"name {deeper.parent}" if deeper is not None else "name a folder with images in it"
        raise DataError(f"{path} holds no images ({', '.join(PICTURES)}): {hint}")
    numbered = all(folder.name.isdecimal() for folder in within)
    odd = next((folder for folder in within if numbered and int(folder.name) > MOST_LABEL), None)
    if odd is not None:
        raise DataError(f"{odd} is no class ({odd.name} is beyond 64 bits): name folders by class")
    labels = {folder: int(folder.name) if numbered else folders.index(folder) for folder in within}
    found = [(file, labels[folder]) for folder, files in within.items() for file in files]
    if limit is not None and limit < len(found):  # evenly over the classes, not the first class alone
        found = [found[position * len(found) // limit] for position in range(limit)]
    pixels = _stack([file for file, _ in found], size)
    classes = None if numbered else len(folders)
    return ImageSet(pixels, torch.tensor([label for _, label in found]), "real", str(path), classes)


def _not_of_a_set(path: Path, folders: Sequence[Path]) -> None:
    """Raise DataError for a part of a set that `synth` wrote, whose labels are targets, and for a folder of sets."""
    whole = next((above for above in path.resolve().parents[:2] if _is_synthesized(above)), None)
    if whole is not None:
        raise DataError(f"{path} is a part of what synth wrote to {whole}: name that folder")
    inner = [folder.name for folder in folders if _is_synthesized(folder)]
    if inner:
        raise DataError(f"{path} holds what synth wrote ({', '.join(inner)}): name one of these folders")


def _is_synthesized(folder: Path) -> bool:
    """Whether synth wrote what is in the folder, though its manifest is gone: others have metadata of this name too."""
    if not (folder / METADATA).is_file():
        return False
    return is_set(folder) or next(image_files(folder), None) is not None


def _image_files(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.is_file() and f.suffix.lower() in PICTURES)


def _stack(files: Sequence[Path], size: tuple[int, int] | None = None) -> Tensor:
    images = [_read_image(file) for file in files]
    if size is not None:
        images = [_fit(image, size) for image in images]
    if {image.shape[2] for image in images} == {1, 3}:  # photographs, some of them gray
        images = [image if image.shape[2] == 3 else image.repeat(3, axis=2) for image in images]
    shapes = {image.shape for image in images}
    if len(shapes) > 1:
        odd = next(file for file, image in zip(files, images, strict=True) if image.shape != images[0].shape)
        raise DataError(
            f"{odd} has another size than {files[0]}: bring all images of a set to one height, width and channel count"
        )
    return from_bytes(np.stack(images))


def _read_image(file: Path) -> NDArray[np.uint8]:
    try:
        if file.suffix.lower() == ".npy":
            array = np.load(file, allow_pickle=False)
            if not isinstance(array, np.ndarray):
                raise DataError(f"{file} holds several arrays: write one uint8 array [H, W, C] with numpy.save")
            if array.ndim != 3 or array.dtype != np.uint8:
                raise DataError(
                    f"{file}: expected uint8 [H, W, C], found {array.dtype} {list(array.shape)}: convert it"
                )
            return array
        with Image.open(file) as image:
            if image.mode in ("F", "I"):
                raise DataError(f"{file} has 32 bits a pixel: store 8 or 16")
            if image.mode.startswith("I;16"):  # convert() would clip 16 bits to 8 instead of scaling them
                array = (np.asarray(image).astype(np.float32) / 257).round().astype(np.uint8)
            else:
                array = np.asarray(image.convert("L" if image.mode in ("L", "1") else "RGB"))
        return array[:, :, None] if array.ndim == 2 else array
    except (DataError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise DataError(f"{file} has more pixels than an image should: make it smaller, or remove it") from error
    except Exception as error:  # a damaged file can lead a reader anywhere
        raise DataError(f"{file} cannot be read as an image: remove or replace it") from error


def _fit(image: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Shorter side resized (bilinear, antialiased) and the centre cropped to `size`."""
    if image.shape[:2] == size or image.shape[2] not in (1, 3):
        return image
    picture = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
    fitted = np.asarray(ImageOps.fit(picture, (size[1], size[0]), Image.Resampling.BILINEAR))
    return fitted[:, :, None] if fitted.ndim == 2 else fitted


def encode_image(pixels: NDArray[np.uint8]) -> tuple[str, bytes]:
    """(suffix, file content) of one image [H, W, C]: PNG for 1 and 3 channels, `.npy` otherwise."""
    buffer = io.BytesIO()
    if pixels.shape[2] not in (1, 3):
        np.save(buffer, pixels)
        return ".npy", buffer.getvalue()
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(buffer, "PNG")
    return ".png", buffer.getvalue()


def contact_sheet(images: NDArray[np.uint8], columns: int = 8, least: int = 64) -> bytes:
    """PNG of a grid of images [N, H, W, C]; small ones are enlarged to at least `least` pixels, by whole numbers."""
    count, height, width, channels = images.shape
    if channels not in (1, 3):
        images = images[:, :, :, :1]
    factor = max(1, -(-least // max(height, width)))
    images = images.repeat(factor, 1).repeat(factor, 2)
    height, width, gap = height * factor, width * factor, 2
    columns = min(columns, count)
    rows = -(-count // columns)
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, images.shape[3]), 255, np.uint8)
    for index, image in enumerate(images):
        top, left = gap + index // columns * (height + gap), gap + index % columns * (width + gap)
        sheet[top : top + height, left : left + width] = image
    return encode_image(sheet)[1]
