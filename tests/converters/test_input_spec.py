"""Where an input spec comes from, what it refuses, and how pixels become a model's input."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from converters.errors import SpecError
from converters.input_spec import IMAGENET_MEAN, IMAGENET_STD, Channels, InputSpec, read_metadata, resolve
from converters.load import load_classifier
from tests import models

BGR = {"channels": "bgr"}
OPEN = [None, None, None, None]
QUICK = settings(max_examples=40, deadline=None, derandomize=True)


# torch 2.14 resizes to a width of one pixel wrongly (it repeats the first row), which no model asks for
SIZES = st.tuples(st.integers(1, 9), st.integers(2, 9))


@st.composite
def specs(draw: st.DrawFn) -> InputSpec:
    """Any spec that is sound."""
    channels = draw(st.sampled_from(["rgb", "bgr", "gray", 2, 4]))
    count = channels if isinstance(channels, int) else 1 if channels == "gray" else 3
    per_channel = [st.floats(*limits).map(lambda x: round(x, 6)) for limits in ((-2, 200), (0.1, 80))]
    mean, std = (draw(st.tuples(*[numbers] * count)) for numbers in per_channel)
    return InputSpec(
        size=draw(SIZES),
        channels=channels,
        layout=draw(st.sampled_from(["NCHW", "NHWC"])),
        scale=draw(st.sampled_from([1.0, 255.0])),
        mean=mean,
        std=std,
        labels=draw(st.sampled_from([None, "imagenet", "fashion-mnist"])),
        offset=draw(st.integers(0, 1)),
        source="metadata",
    )


def triangle(before: int, after: int) -> np.ndarray:
    """[after, before] weights of antialiased bilinear resizing: a triangle as wide as the coarser of the two grids."""
    step = before / after
    centres = (np.arange(after) + 0.5) * step
    distance = np.abs(np.arange(before) + 0.5 - centres[:, None]) / max(step, 1.0)
    rows = np.maximum(1 - distance, 0)
    return rows / rows.sum(1, keepdims=True)


def reference(spec: InputSpec, pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """`to_input` written again, in numpy and float64."""
    x = pixels.astype(np.float64)
    x = np.einsum("yh,nchw,xw->ncyx", triangle(x.shape[2], size[0]), x, triangle(x.shape[3], size[1]))
    if x.shape[1] == 3 and spec.channels == "gray":
        x = 0.299 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]
    if x.shape[1] == 1 and spec.channels in ("rgb", "bgr"):
        x = np.repeat(x, 3, axis=1)
    if spec.channels == "bgr":
        x = x[:, ::-1]
    x = np.stack([(x[:, c] * spec.scale - m) / s for c, (m, s) in enumerate(zip(spec.mean, spec.std, strict=True))], 1)
    return x if spec.layout == "NCHW" else np.moveaxis(x, 1, 3)


@given(data=st.data(), spec=specs(), own_size=st.booleans())
@QUICK
def test_to_input_is_the_formula(data: st.DataObject, spec: InputSpec, own_size: bool) -> None:
    """float32 against float64: 2e-6 of the terms, which a mean may all but cancel."""
    have = spec.channel_count if isinstance(spec.channels, int) else data.draw(st.sampled_from([1, 3]))
    shape = data.draw(st.tuples(st.integers(1, 2), st.just(have), st.integers(1, 12), st.integers(1, 12)))
    pixels = np.random.default_rng(0).random(shape, np.float32)
    size = None if own_size else data.draw(SIZES)
    actual = spec.to_input(torch.from_numpy(pixels), size)
    terms = (spec.scale + max(abs(mean) for mean in spec.mean)) / min(spec.std)
    expected = reference(spec, pixels, size or spec.size)
    assert actual.dtype == torch.float32
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual.numpy(), expected, rtol=0, atol=2e-6 * terms)


def test_to_input_has_a_gradient() -> None:
    spec = InputSpec(size=(4, 5), channels="bgr", layout="NHWC", scale=255, mean=(1, 2, 3), std=(4, 5, 6))
    pixels = torch.rand(1, 3, 6, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(spec.to_input, (pixels,))


@pytest.mark.parametrize(("have", "channels", "count"), [(2, "rgb", 3), (4, "gray", 1), (3, 4, 4), (1, 2, 2)])
def test_channels_that_do_not_fit(have: int, channels: Channels, count: int) -> None:
    spec = InputSpec(size=(4, 4), channels=channels, mean=(0.5,) * count, std=(0.5,) * count)
    with pytest.raises(SpecError, match=f"have {have} channels and the model takes {count}"):
        spec.to_input(torch.rand(1, have, 4, 4))


@given(spec=specs(), fixed=st.booleans())
@QUICK
def test_metadata_round_trip(spec: InputSpec, fixed: bool) -> None:
    sizes = [spec.channel_count, *spec.size] if spec.layout == "NCHW" else [*spec.size, spec.channel_count]
    shape = [None, *sizes] if fixed else OPEN
    metadata = spec.to_metadata()
    assert all(isinstance(text, str) for text in metadata.values())
    assert resolve(Path("nowhere.onnx"), shape, metadata) == spec


@pytest.mark.parametrize("labels", ["", "two words", "é", "1000", "null", "true", '"quoted"', "[1]", "NaN"])
def test_any_label_name_survives_the_metadata(labels: str) -> None:
    """Also one that reads as JSON."""
    spec = InputSpec(size=(8, 8), channels="gray", mean=(0.5,), std=(0.5,), labels=labels)
    assert resolve(Path("nowhere.onnx"), OPEN, spec.to_metadata()).labels == labels


def test_metadata_of_others_is_passed_over() -> None:
    properties = {"mixmix.input.size": "[8, 9]", "author": "someone", "mixmix.zoo.family": "plain"}
    assert read_metadata(properties) == {"size": [8, 9]}


SIDECAR = '[input]\nmean = [0.2, 0.2, 0.2]\nlayout = "NCHW"\n'
METADATA = {"mixmix.input.mean": "[0.3, 0.3, 0.3]", "mixmix.input.std": "[0.4, 0.4, 0.4]"}


@pytest.mark.parametrize(
    ("sidecar", "metadata", "options", "mean", "std", "source"),
    [
        (False, False, {}, IMAGENET_MEAN, IMAGENET_STD, "assumed"),
        (False, True, {}, (0.3,) * 3, (0.4,) * 3, "metadata"),
        (True, False, {}, (0.2,) * 3, IMAGENET_STD, "sidecar"),
        (True, True, {}, (0.2,) * 3, IMAGENET_STD, "sidecar"),
        (True, True, {"mean": (0.1,) * 3}, (0.1,) * 3, IMAGENET_STD, "options"),
        (False, True, {"mean": (0.1,) * 3, "std": None}, (0.1,) * 3, (0.4,) * 3, "options"),
        (False, True, {"mean": None}, (0.3,) * 3, (0.4,) * 3, "metadata"),
        (False, False, {"std": (0.7,) * 3}, IMAGENET_MEAN, (0.7,) * 3, "options"),
    ],
)
def test_precedence(
    tmp_path: Path, sidecar: bool, metadata: bool, options: dict[str, Any], mean: tuple, std: tuple, source: str
) -> None:
    if sidecar:
        (tmp_path / "model.toml").write_text(SIDECAR)
    spec = resolve(tmp_path / "model.onnx", [None, 3, 8, 8], METADATA if metadata else {}, options)
    assert (spec.mean, spec.std, spec.source, spec.size) == (mean, std, source, (8, 8))


def test_a_sidecar_that_says_nothing_of_pixels_leaves_them_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "model.toml").write_text('[input]\nchannels = "bgr"\nlabels = "birds"\n')
    spec = resolve(tmp_path / "model.onnx", [None, 3, 8, 8], METADATA | {"mixmix.input.scale": "255"})
    assert (spec.channels, spec.labels, spec.mean, spec.scale) == ("bgr", "birds", (0.3,) * 3, 255)
    assert spec.source == "metadata"
    (tmp_path / "model.toml").write_text("[input]\nmean = [0.2, 0.2, 0.2]\n")
    spec = resolve(tmp_path / "model.onnx", [None, 3, 8, 8], METADATA | {"mixmix.input.scale": "255"})
    assert (spec.mean, spec.std, spec.scale, spec.source) == ((0.2,) * 3, IMAGENET_STD, 1, "sidecar")


def test_precedence_through_a_file(tmp_path: Path) -> None:
    """The same order with a real model: its metadata, the file beside it, the options."""
    path = models.write(models.conv(metadata=METADATA), tmp_path / "model.onnx")
    assert load_classifier(path).spec.mean == (0.3,) * 3
    path.with_suffix(".toml").write_text(SIDECAR)
    assert load_classifier(path).spec.mean == (0.2,) * 3
    assert load_classifier(path, {"mean": (0.1,) * 3}).spec.mean == (0.1,) * 3


@pytest.mark.parametrize(
    ("shape", "layout", "channels", "size"),
    [
        ([None, 3, 8, 9], "NCHW", "rgb", (8, 9)),
        ([None, 8, 9, 3], "NHWC", "rgb", (8, 9)),
        ([1, 1, 28, 28], "NCHW", "gray", (28, 28)),
        ([None, 28, 28, 1], "NHWC", "gray", (28, 28)),
        ([None, 3, 8, 3], "NCHW", "rgb", (8, 3)),
        ([None, 4, None, None], "NCHW", 4, (224, 224)),
        (OPEN, "NCHW", "rgb", (224, 224)),
    ],
)
def test_what_is_assumed(shape: list[int | None], layout: str, channels: str | int, size: tuple[int, int]) -> None:
    spec = resolve(Path("nowhere.onnx"), shape, {})
    assert (spec.layout, spec.channels, spec.size, spec.source) == (layout, channels, size, "assumed")
    assert len(spec.mean) == len(spec.std) == spec.channel_count


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ('colour = "rgb"', "no key colour"),
        ("means = [0.5]", "no key means (the nearest is 'mean')"),
        ('source = "options"', "source"),
        ("size = [8]", "size"),
        ("size = [0, 8]", "size"),
        ('size = "large"', "size cannot be used (it is [height, width]"),
        ("size = 8", "size cannot be used (it is [height, width]"),
        ("mean = [0.5, 0.5]", "mean has 2"),
        ("std = [0.5, 0.5, 0.5, 0.5]", "std 4"),
        ("std = [0.5, 0.0, 0.5]", "std"),
        ("mean = [nan, 0, 0]", "mean"),
        ("std = [nan, 1, 1]", "std"),
        ("std = [inf, 1, 1]", "std"),
        ("scale = 0", "scale"),
        ("scale = inf", "scale"),
        ('layout = "CHWN"', "layout"),
        ('channels = "cmyk"', 'channels cannot be used (it is "rgb", "bgr", "gray", or a number from 1'),
        ("channels = 0", "channels"),
        ("channels = -1", "channels"),
        ("channels = [3]", "channels"),
        ("channels = 2.5", "channels"),
        ("channels = 9223372036854775808", "channels"),
        ('offset = "one"', "offset"),
    ],
)
def test_malformed_sidecar(tmp_path: Path, line: str, named: str) -> None:
    (tmp_path / "model.toml").write_text(f"[input]\n{line}\n")
    assert_refused(tmp_path, OPEN, {}, str(tmp_path / "model.toml"), named)


@pytest.mark.parametrize(("key", "text"), [("colour", "rgb"), ("mean", "[0.5"), ("size", "8"), ("std", "[0, 0, 0]")])
def test_malformed_metadata(tmp_path: Path, key: str, text: str) -> None:
    assert_refused(tmp_path, OPEN, {f"mixmix.input.{key}": text}, str(tmp_path / "model.onnx"), key)


def assert_refused(folder: Path, shape: list[int | None], metadata: Mapping[str, str], *parts: str) -> None:
    with pytest.raises(SpecError) as caught:
        resolve(folder / "model.onnx", shape, metadata)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("values", "shape", "message"),
    [
        ({"size": "[9, 8]"}, [None, 3, 8, 8], "height 9, the model takes 8"),
        ({"size": "[8, 9]"}, [None, 3, 8, 8], "width 9, the model takes 8"),
        ({"channels": "gray", "mean": "[0.5]", "std": "[0.5]"}, [None, 3, 8, 8], "channel count 1, the model takes 3"),
        ({"layout": "NHWC", "size": "[8, 8]"}, [None, 3, 8, 8], "height 8, the model takes 3 (read as NHWC)"),
        ({"layout": "NHWC"}, [None, 1, 28, 28], "by layout NHWC its images have 28 channels, by the other layout 1"),
        ({"layout": "NCHW"}, [1, 28, 28, 3], "by layout NCHW its images have 28 channels, by the other layout 3"),
    ],
)
def test_spec_against_the_shape(tmp_path: Path, values: dict[str, str], shape: list[int | None], message: str) -> None:
    metadata = {f"mixmix.input.{key}": value for key, value in values.items()}
    assert_refused(tmp_path, shape, metadata, str(tmp_path), message)


@pytest.mark.parametrize("shape", [[None, 8, 8, 3], [None, 3, 8, 8], [None, 8, 8, 8]])
def test_many_channels_are_taken_where_they_are_stated_or_nothing_else_is_likely(
    tmp_path: Path, shape: list[int | None]
) -> None:
    likely = shape.count(3) == 0
    metadata = {"mixmix.input.layout": "NHWC" if shape[1] == 3 else "NCHW"}
    metadata |= {} if likely else {"mixmix.input.channels": "8"}
    assert resolve(tmp_path / "model.onnx", shape, metadata).channel_count == 8


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[input\n", "not valid TOML"),
        (b"[input]\nmean = [0.5,\n", "not valid TOML"),
        (b"\xff\xfe[input]", "not valid TOML"),
        (b"[output]\nsize = [8, 8]\n", "no table [input]"),
        (b"", "no table [input]"),
        (b"input = 3\n", "must be a table"),
    ],
)
def test_bad_sidecar(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "model.toml").write_bytes(content)
    assert_refused(tmp_path, OPEN, {}, str(tmp_path / "model.toml"), message)


def test_what_is_assumed_of_bgr_is_in_its_order(tmp_path: Path) -> None:
    spec = resolve(tmp_path / "m.onnx", OPEN, {}, BGR)
    assert (spec.mean, spec.std) == (IMAGENET_MEAN[::-1], IMAGENET_STD[::-1])


def test_one_number_is_that_of_every_channel(tmp_path: Path) -> None:
    spec = resolve(tmp_path / "m.onnx", [None, 3, 8, 8], {}, {"mean": [0.4], "std": 0.2})
    assert (spec.mean, spec.std) == ((0.4,) * 3, (0.2,) * 3)


def test_what_was_assumed_stays_assumed_in_a_written_file(tmp_path: Path) -> None:
    """Nobody knew, and a file that says so is judged again."""
    spec = resolve(tmp_path / "m.onnx", [None, 1, 8, 8], {})
    assert spec.source == "assumed"
    written = spec.to_metadata()
    assert written["mixmix.input.source"] == "assumed"
    assert resolve(tmp_path / "m.onnx", [None, 1, 8, 8], written) == spec
    known = resolve(tmp_path / "m.onnx", [None, 1, 8, 8], written, {"mean": [0.2], "std": [0.3]})
    assert "mixmix.input.source" not in known.to_metadata()
    detected = {"mean": (0.0,), "std": (1.0,), "scale": 255.0}
    again = resolve(tmp_path / "m.onnx", [None, 1, 8, 8], written, detected=detected)
    assert (again.source, again.scale, again.mean) == ("detected", 255.0, (0.0,))
