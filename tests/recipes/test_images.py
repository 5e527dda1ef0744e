"""Image sets from every layout on disk, and one sentence for everything that cannot be read."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from PIL import Image

from converters.classifier import Classifier
from converters.errors import SpecError
from converters.torch_module import TorchClassifier
from recipes.images import (
    ImageSet,
    contact_sheet,
    encode_image,
    from_bytes,
    gaussian_noise,
    load_images,
    to_bytes,
)
from recipes.refusals import DataError
from recipes.validate import validate
from recipes.workpiece import model_inputs

Bytes = NDArray[np.uint8]
checked = settings(max_examples=50, derandomize=True)


def random_bytes(count: int, height: int, width: int, channels: int, seed: int = 0) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, channels), np.uint8)


def save_npz(path: Path, **arrays: NDArray[np.generic]) -> Path:
    np.savez(path, **arrays)  # type: ignore[arg-type]  # the stub takes a name for allow_pickle
    return path


def save_image(path: Path, pixels: Bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(path)


@checked
@given(hnp.arrays(np.uint8, hnp.array_shapes(min_dims=4, max_dims=4, max_side=5)))
def test_bytes_survive_the_round_trip(pixels: Bytes) -> None:
    images = from_bytes(pixels)
    assert images.dtype == torch.float32
    assert images.shape == (len(pixels), pixels.shape[3], *pixels.shape[1:3])
    assert float(images.min()) >= 0
    assert float(images.max()) <= 1
    np.testing.assert_array_equal(to_bytes(images), pixels)


@checked
@given(hnp.arrays(np.float32, (1, 2, 3, 3), elements=st.floats(-0.5, 1.5, width=32)))
def test_pixels_are_rounded_to_nearest_and_clipped(pixels: NDArray[np.float32]) -> None:
    clipped = np.clip(pixels, 0, 1).transpose(0, 2, 3, 1)
    assert float(np.abs(to_bytes(torch.from_numpy(pixels)) - clipped * 255.0).max()) <= 0.5 + 1e-4


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("first", [False, True], ids=["NHWC", "NCHW"])
@pytest.mark.parametrize("kind", ["uint8", "float16", "float32", "float64"])
def test_npz_in_every_layout_and_type(tmp_path: Path, channels: int, first: bool, kind: str) -> None:
    pixels = random_bytes(5, 6, 7, channels)
    stored = pixels if kind == "uint8" else (pixels / 255).astype(kind)
    stored = stored.transpose(0, 3, 1, 2) if first else stored
    labels = np.array([3, 1, 4, 1, 5], np.uint8)
    images = load_images(save_npz(tmp_path / "set.npz", images=stored, labels=labels))
    assert images.pixels.dtype == torch.float32
    torch.testing.assert_close(images.pixels, from_bytes(pixels), rtol=0, atol=1e-3 if kind == "float16" else 1e-6)
    assert images.labels is not None
    assert images.labels.dtype == torch.int64
    assert images.labels.tolist() == [3, 1, 4, 1, 5]
    assert images.label_kind == "real"


@pytest.mark.parametrize("first", [False, True], ids=["NHWC", "NCHW"])
def test_npz_of_four_channels_in_both_layouts(tmp_path: Path, first: bool) -> None:
    pixels = random_bytes(2, 12, 12, 4)
    stored = pixels.transpose(0, 3, 1, 2) if first else pixels
    assert torch.equal(load_images(save_npz(tmp_path / "set.npz", images=stored)).pixels, from_bytes(pixels))


def test_npz_without_labels_is_unlabelled(tmp_path: Path) -> None:
    images = load_images(save_npz(tmp_path / "set.npz", images=random_bytes(5, 6, 7, 1)), 3)
    assert (len(images), images.labels, images.label_kind) == (3, None, "none")


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".PNG"])
@pytest.mark.parametrize("channels", [1, 3])
def test_folder_with_classes_in_the_order_of_their_names(tmp_path: Path, channels: int, suffix: str) -> None:
    pixels = random_bytes(6, 8, 9, channels)
    for index, name in enumerate(["cat", "ant", "bee", "ant", "cat", "ant"]):
        save_image(tmp_path / name / f"{index}{suffix}", pixels[index])
    (tmp_path / ".cache").mkdir()
    (tmp_path / "ant" / "notes.txt").write_text("not an image")
    images = load_images(tmp_path)
    assert images.labels is not None
    assert images.labels.tolist() == [0, 0, 0, 1, 2, 2]
    assert images.label_kind == "real"
    assert torch.equal(images.pixels, from_bytes(pixels[[1, 3, 5, 2, 0, 4]]))


def test_a_limit_on_a_folder_takes_from_all_classes(tmp_path: Path) -> None:
    for label in range(4):
        for index in range(5):
            save_image(tmp_path / str(label) / f"{index}.png", random_bytes(1, 4, 4, 1)[0])
    images = load_images(tmp_path, 8)
    assert images.labels is not None
    assert images.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_flat_folder_is_unlabelled(tmp_path: Path) -> None:
    pixels = random_bytes(3, 8, 9, 3)
    for index in range(3):
        save_image(tmp_path / f"{index}.png", pixels[index])
    images = load_images(tmp_path)
    assert (images.labels, images.label_kind) == (None, "none")
    assert torch.equal(images.pixels, from_bytes(pixels))
    assert len(load_images(tmp_path, 2)) == 2


@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_other_sizes_are_brought_to_one_size(tmp_path: Path, channels: int) -> None:
    ramp = np.linspace(0, 255, 60).astype(np.uint8)[None, :, None]
    save_image(tmp_path / "wide.png", np.broadcast_to(ramp, (20, 60, channels)))
    save_image(tmp_path / "tall.png", np.broadcast_to(ramp.transpose(1, 0, 2), (60, 20, channels)))
    right = random_bytes(1, 10, 10, channels)
    save_image(tmp_path / "right.png", right[0])
    images = load_images(tmp_path, size=(10, 10))
    assert images.pixels.shape == (3, channels, 10, 10)
    assert torch.equal(images.pixels[:1], from_bytes(right))
    tall, wide = images.pixels[1], images.pixels[2]  # the centre third of the ramp, shorter side halved
    middle = torch.linspace(20.5, 38.5, 10) / 59
    torch.testing.assert_close(wide, middle.expand_as(wide), rtol=0, atol=0.01)
    torch.testing.assert_close(tall, wide.transpose(1, 2), rtol=0, atol=0.005)


def test_folders_named_by_number_are_those_classes(tmp_path: Path) -> None:
    for name in ("3", "007", "12"):
        (tmp_path / name).mkdir()
        save_image(tmp_path / name / "a.png", random_bytes(1, 8, 8, 3)[0])
    images = load_images(tmp_path)
    assert images.labels is not None
    assert sorted(images.labels.tolist()) == [3, 7, 12]
    assert images.classes is None


def test_folders_named_by_word_are_numbered_in_order_and_counted(tmp_path: Path) -> None:
    """An empty one counts: it is a class without images."""
    for name in ("boot", "bag", "coat"):
        (tmp_path / name).mkdir()
    for name in ("boot", "coat"):
        save_image(tmp_path / name / "a.png", random_bytes(1, 8, 8, 3)[0])
    images = load_images(tmp_path)
    assert images.labels is not None
    assert images.labels.tolist() == [1, 2]
    assert images.classes == 3


def test_images_one_level_down_are_pointed_at(tmp_path: Path) -> None:
    (tmp_path / "val" / "boot").mkdir(parents=True)
    save_image(tmp_path / "val" / "boot" / "a.png", random_bytes(1, 8, 8, 3)[0])
    with pytest.raises(DataError, match=f"holds no images .*: name {tmp_path / 'val'}$"):
        load_images(tmp_path)


def test_an_archive_of_no_images_says_so(tmp_path: Path) -> None:
    np.savez(tmp_path / "none.npz", images=np.zeros((0, 28, 28, 1), np.uint8))
    with pytest.raises(DataError, match=r"none\.npz holds no images"):
        load_images(tmp_path / "none.npz")


def test_images_that_do_not_fit_a_model_are_named(
    classifier_of: Callable[[str], Classifier], module_of: Callable[[str], TorchClassifier]
) -> None:
    images = ImageSet(torch.zeros(2, 5, 28, 28), source="mine.npz")
    with pytest.raises(SpecError, match=r"^mine\.npz: images have 5 channels"):
        model_inputs(module_of("plain"), images)
    with pytest.raises(SpecError, match=r"^mine\.npz: images have 5 channels"):
        validate(classifier_of("plain"), [classifier_of("plain")], images)


def test_gray_photographs_among_coloured_ones(tmp_path: Path) -> None:
    """ImageNet's validation set has some."""
    colours = np.arange(75, dtype=np.uint8).reshape(5, 5, 3)
    Image.fromarray(colours).save(tmp_path / "a.png")
    Image.fromarray(colours[:, :, 0]).save(tmp_path / "b.png")
    pixels = to_bytes(load_images(tmp_path).pixels)
    assert (pixels[0] == colours).all()
    assert (pixels[1] == colours[:, :, :1]).all()


def test_sixteen_bit_gray_keeps_its_brightness(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    expected = torch.from_numpy(ramp.astype(np.float32) / 65535)
    torch.testing.assert_close(load_images(tmp_path).pixels[0, 0], expected, rtol=0, atol=1 / 255)


def test_synthesized_folder_has_targets_and_only_what_the_metadata_lists(tmp_path: Path) -> None:
    pixels = random_bytes(3, 8, 8, 1)
    rows = []
    for index, label in enumerate([7, 0, 2]):
        name = f"images/{label:05d}/00000-{index:05d}.png"
        save_image(tmp_path / name, pixels[index])
        rows.append(json.dumps({"file_name": name, "label": label}))
    save_image(tmp_path / "images/00001/unlisted.png", pixels[0])
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    images = load_images(tmp_path)
    assert images.labels is not None
    assert images.labels.tolist() == [7, 0, 2]
    assert images.label_kind == "targets"
    assert torch.equal(images.pixels, from_bytes(pixels))
    assert torch.equal(load_images(tmp_path, 2).pixels, from_bytes(pixels[:2]))


def test_a_data_set_may_have_metadata_of_its_own(tmp_path: Path) -> None:
    """As image folders of other tools have, under the same name."""
    for index, name in enumerate(("cat", "dog", "images")):
        save_image(tmp_path / name / "a.png", random_bytes(1, 8, 8, 3, seed=index)[0])
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "cat/a.png", "text": "a cat", "label": 3}\n')
    images = load_images(tmp_path)
    assert images.labels is not None
    assert (images.labels.tolist(), images.label_kind) == ([0, 1, 2], "real")


@pytest.mark.parametrize(
    ("shape", "channels"),
    [
        ((3, 6, 5), 3),
        ((6, 5, 3), 3),
        ((1, 3, 9), 1),
        ((12, 8, 8), 12),
        ((8, 8, 12), 12),
        ((2, 7, 6), 2),
        ((3, 2, 2), 3),
    ],
)
def test_the_layout_of_arrays_is_told_by_channels_then_by_square_sides(
    shape: tuple[int, ...], channels: int, tmp_path: Path
) -> None:
    pixels = np.zeros((2, *shape), np.uint8)
    assert load_images(save_npz(tmp_path / "set.npz", images=pixels)).pixels.shape[1] == channels


def test_arrays_that_nobody_asks_for_are_not_read(tmp_path: Path) -> None:
    path = save_npz(tmp_path / "set.npz", images=GRAY, names=np.array(["a", None], dtype=object))
    assert len(load_images(path)) == len(GRAY)


@pytest.mark.parametrize("suffix", ["tif", "GIF", "bmp"])
def test_other_lossless_images_count_too(suffix: str, tmp_path: Path) -> None:
    save_image(tmp_path / "a.png", GRAY[0])
    save_image(tmp_path / f"b.{suffix}", GRAY[1])
    pixels = load_images(tmp_path).pixels  # a palette is colour to who reads it
    assert torch.equal(pixels, from_bytes(GRAY[:2]).expand_as(pixels))


def test_take_keeps_labels_beside_their_images() -> None:
    images = ImageSet(torch.rand(5, 1, 2, 2), torch.arange(5), "real", "here")
    few = images.take(2)
    assert few.labels is not None
    assert (len(few), few.labels.tolist(), few.label_kind, few.source) == (2, [0, 1], "real", "here")
    assert len(images.take(None)) == len(images.take(99)) == 5


@pytest.mark.parametrize(("channels", "suffix"), [(1, ".png"), (3, ".png"), (2, ".npy"), (4, ".npy")])
def test_encoded_images_read_back_the_same(tmp_path: Path, channels: int, suffix: str) -> None:
    pixels = random_bytes(1, 5, 7, channels)
    actual, content = encode_image(pixels[0])
    assert actual == suffix
    (tmp_path / f"a{suffix}").write_bytes(content)
    assert torch.equal(load_images(tmp_path).pixels, from_bytes(pixels))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_contact_sheet_shows_every_image_enlarged(tmp_path: Path, channels: int) -> None:
    (tmp_path / "sheet.png").write_bytes(contact_sheet(random_bytes(10, 28, 28, channels)))
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (8 * (84 + 2) + 2, 2 * (84 + 2) + 2)


def test_noise_is_seeded_and_fills_the_range() -> None:
    first, again, other = (gaussian_noise(8, 3, (16, 16), seed).pixels for seed in (1, 1, 2))
    assert first.shape == (8, 3, 16, 16)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert float(first.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(first.std()) == pytest.approx(0.24, abs=0.02)


def rows(*labels_and_names: object) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        save_image(folder / "images/00001/00000-00000.png", random_bytes(1, 4, 4, 1)[0])
        (folder / "metadata.jsonl").write_text("".join(f"{row}\n" for row in labels_and_names))
        return folder

    return make


def npz(**arrays: NDArray[np.generic]) -> Callable[[Path], Path]:
    return lambda folder: save_npz(folder / "set.npz", **arrays)


def file(name: str, content: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name if name.endswith((".npz", ".txt")) else folder

    return make


def stray(folder: Path) -> Path:
    (folder / "1").mkdir()
    save_image(folder / "1" / "a.png", random_bytes(1, 8, 8, 3)[0])
    save_image(folder / "stray.png", random_bytes(1, 8, 8, 3)[0])
    return folder


def mixed_sizes(folder: Path) -> Path:
    save_image(folder / "a.png", random_bytes(1, 8, 8, 3)[0])
    save_image(folder / "b.png", random_bytes(1, 9, 8, 3)[0])
    return folder


def mixed_channels(folder: Path) -> Path:
    save_image(folder / "a.png", random_bytes(1, 8, 8, 3)[0])
    np.save(folder / "b.npy", random_bytes(1, 8, 8, 4)[0])
    return folder


def cut_npz(folder: Path) -> Path:
    whole = save_npz(folder / "set.npz", images=random_bytes(4, 8, 8, 1)).read_bytes()
    (folder / "set.npz").write_bytes(whole[: len(whole) // 2])
    return folder / "set.npz"


def npy_as_npz(folder: Path) -> Path:
    with (folder / "set.npz").open("wb") as opened:
        np.save(opened, random_bytes(4, 8, 8, 1))
    return folder / "set.npz"


def npz_as_npy(folder: Path) -> Path:
    save_npz(folder / "set.npz", images=random_bytes(4, 8, 8, 1)).rename(folder / "a.npy")
    return folder


def enormous(folder: Path) -> Path:
    Image.new("1", (20_000, 20_000)).save(folder / "a.png")
    return folder


def float_tif(folder: Path) -> Path:
    Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)).save(folder / "a.tif")
    return folder


def beyond_64_bits(folder: Path) -> Path:
    save_image(folder / "20240101123000123456789" / "a.png", random_bytes(1, 4, 4, 1)[0])
    return folder


PNG = encode_image(random_bytes(1, 9, 9, 3)[0])[1]
NPY = encode_image(random_bytes(1, 9, 9, 4)[0])[1]
GRAY = random_bytes(4, 8, 8, 1)
BAD = {
    "missing": lambda folder: folder / "nowhere",
    "empty folder": lambda folder: folder,
    "another file": file("set.txt", b"hello"),
    "text as npz": file("set.npz", b"hello"),
    "empty npz": file("set.npz", b""),
    "cut npz": cut_npz,
    "npy as npz": npy_as_npz,
    "no images": npz(pictures=GRAY),
    "no arrays": npz(),
    "no entries": npz(images=GRAY[:0]),
    "three axes": npz(images=GRAY[..., 0]),
    "no pixels": npz(images=np.zeros((2, 0, 4, 1), np.float32)),
    "int64": npz(images=GRAY.astype(np.int64)),
    "text": npz(images=GRAY.astype("U")),
    "objects": npz(images=GRAY.astype(object)),
    "above one": npz(images=GRAY.astype(np.float32)),
    "below zero": npz(images=GRAY.astype(np.float32) / 255 - 0.5),
    "not a number": npz(images=np.full((2, 4, 4, 1), np.nan)),
    "few labels": npz(images=GRAY, labels=np.arange(3)),
    "label matrix": npz(images=GRAY, labels=np.zeros((4, 10), np.int64)),
    "float labels": npz(images=GRAY, labels=np.arange(4.0)),
    "broken png": file("a.png", b"\x89PNG\r\n\x1a\n nothing of the kind"),
    "cut png": file("a.png", PNG[: len(PNG) // 2]),
    "empty png": file("a.png", b""),
    "cut npy": file("a.npy", NPY[: len(NPY) // 2]),
    "empty npy": file("a.npy", b""),
    "npz as npy": npz_as_npy,
    "npy with half a header": file("a.npy", NPY[:10] + b"{'descr': (" + NPY[21:]),
    "enormous": enormous,
    "class beyond 64 bits": beyond_64_bits,
    "float tif": float_tif,
    "mixed sizes": mixed_sizes,
    "mixed channels": mixed_channels,
    "beside classes": stray,
    "metadata empty": rows(),
    "metadata not json": rows("{oops"),
    "metadata a list": rows("[1]"),
    "metadata no name": rows('{"label": 1}'),
    "metadata no label": rows('{"file_name": "images/00001/00000-00000.png"}'),
    "metadata bad label": rows('{"file_name": "images/00001/00000-00000.png", "label": "shoe"}'),
    "metadata huge label": rows('{"file_name": "images/00001/00000-00000.png", "label": Infinity}'),
    "metadata label beyond 64 bits": rows(
        '{"file_name": "images/00001/00000-00000.png", "label": 36893488147419103232}'
    ),
    "metadata lost image": rows('{"file_name": "images/00001/b.png", "label": 1}'),
    "metadata binary": file("metadata.jsonl", b"\xff\xfe\x00"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_is_named_in_one_sentence(name: str, tmp_path: Path) -> None:
    path = BAD[name](tmp_path)
    with pytest.raises(DataError) as caught:
        load_images(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    assert not re.search(r"[.!?]\)? +[A-Z]", message)  # one sentence
    assert ": " in message  # what to do instead
