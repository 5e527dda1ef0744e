"""A batch that the file fixes is followed through the graph, wherever exporters put it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx
import pytest
import torch

from converters.batch import Place, reshaped
from converters.classifier import Classifier
from converters.conversion import to_torch
from converters.errors import ConversionError
from converters.ops import registry
from tests import models
from tests.converters import oracle

Load = Callable[[onnx.ModelProto], Classifier]


@pytest.mark.parametrize(
    ("place", "source", "target", "batch", "expected"),
    [
        (Place(0), [1, 768, 14, 14], [1, 768, 196], 1, Place(0)),
        (Place(0), [1, 8, 8, 7, 7, 96], [64, 49, 96], 1, Place(0, 64)),  # windows into the batch
        (Place(0, 64), [64, 49, 96], [1, 8, 8, 7, 7, 96], 1, Place(0)),  # and back
        (Place(1), [197, 1, 768], [197, 12, 64], 1, Place(1, 12)),  # heads into the batch
        (Place(1), [197, 1, 768], [197, 768], 1, Place(0)),  # tokens and batch together
        (Place(1), [197, 1, 12, 64], [197, 768], 1, Place(0)),  # heads joined, tokens and batch together
        (Place(1), [768, 1], [1, 768, 1], 1, Place(2)),
        (Place(0, 12), [12, 197, 64], [1, 12, 197, 64], 1, Place(0)),
        (Place(0), [4, 6, 6], [4, 36], 4, Place(0)),
        (Place(0), [4, 6, 6], [24, 6], 4, Place(0, 6)),
        (Place(0), [4, 6, 6], [2, 72], 4, None),  # no dimension holds the whole batch
    ],
)
def test_place_behind_a_reshape(
    place: Place, source: Sequence[int], target: Sequence[int], batch: int, expected: Place | None
) -> None:
    assert reshaped(place, source, target, batch) == expected


def attention(batch: int, **how: int) -> onnx.ModelProto:
    """Rows of the image as tokens, a class token in front, one attention with two heads in the batch's dimension."""
    width, tokens, heads = models.CHANNELS * models.SIDE, models.SIDE + 1, 2
    inner = width // heads
    shapes = {
        "rows.shape": [batch, models.SIDE, width],
        "split.shape": [tokens, batch * heads, inner],
        "joined.shape": [tokens, batch, width],
    }
    nodes = [
        models.node("Transpose", "image", "upright", perm=[0, 2, 1, 3]),
        models.node("Reshape", "upright rows.shape", "rows", **how),
        models.node("Concat", "class rows", "tokens", axis=1),
        models.node("Transpose", "tokens", "first", perm=[1, 0, 2]),
        models.node("Reshape", "first split.shape", "split", **how),
        models.node("Transpose", "split", "heads", perm=[1, 0, 2]),
        models.node("Transpose", "heads", "turned", perm=[0, 2, 1]),
        models.node("MatMul", "heads turned", "scores"),
        models.node("Softmax", "scores", "shares", axis=-1),
        models.node("MatMul", "shares heads", "mixed"),
        models.node("Transpose", "mixed", "back", perm=[1, 0, 2]),
        models.node("Reshape", "back joined.shape", "joined", **how),
        models.node("Gather", "joined zero", "class.out", axis=0),
        models.node("Gemm", "class.out fc.weight", "logits", transB=1),
    ]
    tensors = {name: np.array(shape, np.int64) for name, shape in shapes.items()}
    token = np.repeat(models.random(1, 1, width, seed=3), batch, 0)
    weights = {"class": token, "fc.weight": models.weights(models.CLASSES, width), "zero": np.array(0, np.int64)}
    image, logits = (batch, *models.IMAGE[1:]), (batch, models.CLASSES)
    return models.assemble(nodes, {**tensors, **weights}, inputs={"image": image}, outputs={"logits": logits})


def strided(batch: int, places: np.ndarray) -> onnx.ModelProto:
    """All pixels of all images in one row, and some taken from it: so `as_strided` is exported."""
    nodes = [
        models.node("Reshape", "image all", "row"),
        models.node("Gather", "row places", "taken", axis=0),
        models.node("Flatten", "taken", "flat"),
        models.node("Gemm", "flat fc.weight", "logits", transB=1),
    ]
    tensors = {
        "all": np.array([-1], np.int64),
        "places": places,
        "fc.weight": models.weights(models.CLASSES, places[0].size),
    }
    ends = {"inputs": {"image": (batch, *models.IMAGE[1:])}, "outputs": {"logits": (batch, models.CLASSES)}}
    return models.assemble(nodes, tensors, **ends)


@pytest.mark.parametrize("batch", [1, 2])
def test_places_that_every_image_has_in_its_own_part(load: Load, batch: int) -> None:
    """Of each image, some pixels in any order."""
    own = np.random.default_rng(0).permutation(models.PIXELS)[:60].reshape(1, 3, 20)
    places = own + np.arange(batch).reshape(-1, 1, 1) * models.PIXELS
    model, x = strided(batch, places), models.images(4)
    expected = np.concatenate([oracle.run(model, part) for part in np.split(x, 4 // batch)])
    oracle.assert_close(to_torch(load(model))(torch.from_numpy(x)).numpy(), expected, 1e-5)


def test_batch_that_cannot_be_opened_is_a_sentence(load: Load) -> None:
    """Each of two images is taken from the other."""
    places = np.arange(2 * models.PIXELS).reshape(2, -1)[::-1].copy()
    with pytest.raises(ConversionError, match=r"computes 2 of 4 images: export it with an open batch size"):
        to_torch(load(strided(2, places)))


def with_class_token(token: np.ndarray, *expand: int) -> onnx.ModelProto:
    """Four images at once, as many class tokens before their patches."""
    nodes = [
        models.node("Conv", "image patch.weight", "patches", strides=[2, 2]),
        models.node("Reshape", "patches rows", "columns"),
        models.node("Transpose", "columns", "tokens", perm=[0, 2, 1]),
        *([models.node("Expand", "token shape", "own")] if expand else []),
        models.node("Concat", "own tokens" if expand else "token tokens", "all", axis=1),
        models.node("Mul", "all factors", "scaled"),
        models.node("MatMul", "scaled mix.weight", "mixed"),
        models.node("Gather", "mixed first", "chosen", axis=1),
        models.node("Gemm", "chosen head.weight", "logits", transB=1),
    ]
    tensors = {
        "patch.weight": models.weights(8, models.CHANNELS, 2, 2),
        "rows": np.array([4, 8, -1], np.int64),
        "token": token,
        "shape": np.array(expand or [1], np.int64),
        "factors": np.repeat(models.random(1, 17, 1), 4, 0),
        "mix.weight": models.weights(8, 8, seed=1),
        "first": np.array(0, np.int64),
        "head.weight": models.weights(models.CLASSES, 8),
    }
    ends = {"inputs": {"image": (4, *models.IMAGE[1:])}, "outputs": {"logits": (4, models.CLASSES)}}
    return models.assemble(nodes, tensors, **ends)


@pytest.mark.parametrize(("stored", "expand"), [(1, (4, 1, 8)), (4, ())], ids=["expanded", "stored four times"])
def test_a_constant_that_every_image_has_alike_is_taken_once(load: Load, stored: int, expand: tuple[int, ...]) -> None:
    model, x = with_class_token(np.repeat(models.random(1, 1, 8), stored, 0), *expand), models.images(8)
    expected = np.concatenate([oracle.run(model, part) for part in (x[:4], x[4:])])
    oracle.assert_close(to_torch(load(model))(torch.from_numpy(x[:5])).numpy(), expected[:5], 1e-5)


@pytest.mark.parametrize("op", ["MatMul", "Gemm"])
def test_weights_with_as_many_rows_as_images_stay_whole(load: Load, op: str) -> None:
    """Alike in each row, as an untrained head's may be, and yet a weight."""
    nodes = [
        models.node("GlobalAveragePool", "image", "pooled"),
        models.node("Flatten", "pooled", "flat"),
        models.node("MatMul", "flat mix.weight", "mixed"),
        models.node(op, "mixed head.weight", "logits"),
    ]
    width = models.CHANNELS  # as many as there are images
    tensors = {"mix.weight": models.weights(width, width), "head.weight": np.ones((width, 5), np.float32)}
    ends = {"inputs": {"image": (width, *models.IMAGE[1:])}, "outputs": {"logits": (width, 5)}}
    model, x = models.assemble(nodes, tensors, **ends), models.images(width)
    module = to_torch(load(model))
    assert [layer.shape for layer in module.layers()] == [(width, width), (width, 5)]
    oracle.assert_close(module(torch.from_numpy(x)).numpy(), oracle.run(model, x), 1e-5)


def test_a_wrong_operator_is_found_beside_a_constant_taken_once(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where onnxruntime cannot run the graph that torch computes, the difference is told without its place."""
    classifier = load(with_class_token(np.repeat(models.random(1, 1, 8), 4, 0)))
    right = registry._TABLE["", "Gemm", 13]
    monkeypatch.setitem(registry._TABLE, ("", "Gemm", 13), lambda a: lambda *x: right(a)(*x) * 1.1)
    with pytest.raises(ConversionError, match=r"differs from onnxruntime by [0-9.e-]+: please report it"):
        to_torch(classifier)


def test_a_constant_of_its_own_for_each_image_is_a_sentence(load: Load) -> None:
    with pytest.raises(ConversionError, match=r"does not run on 8 images \(.*\): export it with an open batch size"):
        to_torch(load(with_class_token(models.random(4, 1, 8))))


@pytest.mark.parametrize("how", [{}, {"allowzero": 1}], ids=["plain", "allowzero"])
def test_attention_with_a_fixed_batch_takes_any(load: Load, how: dict[str, int]) -> None:
    model, x = attention(1, **how), models.images(3)
    expected = np.concatenate([oracle.run(model, row[None]) for row in x])
    oracle.assert_close(to_torch(load(model))(torch.from_numpy(x)).numpy(), expected, 1e-5)


def test_expand_to_a_shape_with_the_batch_in_it(load: Load) -> None:
    """Rows of the image normalised: their sums expanded to [N * 3, 8, 8], the batch multiplied into the first."""
    nodes = [
        models.node("Reshape", "image windows", "rows"),
        models.node("ReduceL2", "rows", "norms", axes=[-1], keepdims=1),
        models.node("Expand", "norms shape", "wide"),
        models.node("Div", "rows wide", "unit"),
        models.node("Reshape", "unit flat", "line"),
        models.node("Gemm", "line fc.weight", "logits", transB=1),
    ]
    tensors = {
        "windows": np.array([3, 8, 8], np.int64),
        "shape": np.array([3, 8, 8], np.int64),
        "flat": np.array([1, models.PIXELS], np.int64),
        "fc.weight": models.weights(models.CLASSES, models.PIXELS),
    }
    ends = {"inputs": {"image": (1, *models.IMAGE[1:])}, "outputs": {"logits": (1, models.CLASSES)}}
    model, x = models.assemble(nodes, tensors, **ends), models.images(3)
    expected = np.concatenate([oracle.run(model, row[None]) for row in x])
    oracle.assert_close(to_torch(load(model))(torch.from_numpy(x)).numpy(), expected, 1e-5)


OPEN = {"inputs": {"image": ("n", *models.IMAGE[1:])}, "outputs": {"logits": ("n", models.CLASSES)}}


def runs_past_nothing(load: Load, model: onnx.ModelProto, value: str = "image") -> None:
    """No size is taken from the value, and the answer for some images is onnxruntime's."""
    module, x = to_torch(load(model)), models.images(3)
    assert not [step for step in module.whole.steps if step.op == "Shape" and value in step.inputs]
    oracle.assert_close(module(torch.from_numpy(x)).numpy(), oracle.run(model, x), 1e-5)


def taken_from_one_row(
    own: np.ndarray | Sequence[onnx.NodeProto], stride: int = models.PIXELS, count: int = 1
) -> onnx.ModelProto:
    """`strided` for any number of images: `count` places each, from `stride` times its number on.

    `own` are the places in an image's part, or nodes that write a column of them, one an image.
    """
    computed = [] if isinstance(own, np.ndarray) else list(own)
    nodes = [
        models.node("Shape", "image", "shape", start=0, end=1),
        models.node("Squeeze", "shape", "count"),
        models.node("Reshape", "image all", "row"),
        models.node("Range", "zero count one", "order"),
        models.node("Mul", "order stride", "firsts"),
        models.node("Unsqueeze", "firsts last", "column"),
        *computed,
        models.node("Add", "column own", "places"),
        models.node("Gather", "row places", "taken", axis=0),
        models.node("Gemm", "taken fc.weight", "logits", transB=1),
    ]
    numbers = {"zero": 0, "one": 1, "stride": stride, "all": [-1], "last": [1]}
    tensors = {name: np.array(number, np.int64) for name, number in numbers.items()}
    given = {} if computed else {"own": np.asarray(own)}
    weights = {"much": np.float32(100), "fc.weight": models.weights(models.CLASSES, count)}
    return models.assemble(nodes, tensors | given | weights, **OPEN)


@pytest.mark.parametrize("stride", [models.PIXELS, models.PIXELS - 1])
def test_places_that_are_computed_for_any_number_of_images(load: Load, stride: int) -> None:
    """The Range of an open batch, times the pixels of an image; of other strides, images overlap, and it stays."""
    places = np.random.default_rng(0).permutation(models.PIXELS - 5)[:60].reshape(1, 60)
    model = taken_from_one_row(places, stride, 60)
    if stride == models.PIXELS:
        runs_past_nothing(load, model)
    else:
        x = models.images(3)
        oracle.assert_close(to_torch(load(model))(torch.from_numpy(x)).numpy(), oracle.run(model, x), 1e-5)


def test_expand_of_what_every_image_has(load: Load) -> None:
    """To a shape that begins with the size of the image's batch: [N, 4, 1, 1] to [N, 4, 8, 8]."""
    nodes = [
        models.node("Shape", "image", "shape", start=0, end=1),
        models.node("Conv", "image w", "features", pads=[1, 1, 1, 1]),
        models.node("GlobalAveragePool", "features", "means"),
        models.node("Concat", "shape sizes", "wide.shape", axis=0),
        models.node("Expand", "means wide.shape", "wide"),
        models.node("Mul", "features wide", "scaled"),
        *models.head("scaled"),
    ]
    tensors = {"w": models.weights(4, models.CHANNELS, 3, 3), "sizes": np.array([4, models.SIDE, models.SIDE])}
    runs_past_nothing(load, models.assemble(nodes, tensors | models.head_tensors(4), **OPEN))


def with_a_late_side(first: onnx.NodeProto, index: int = 2, **how: int) -> onnx.ModelProto:
    """A side of what the first node writes goes into the target of a Reshape behind it."""
    nodes = [
        first,
        models.node("Shape", "features", "shape"),
        models.node("Gather", "shape index", "side", **how),
        models.node("Relu", "features", "active"),
        models.node("Reshape", "side all", "sides"),
        models.node("Concat", "rest sides last", "wanted", axis=0),
        models.node("Reshape", "active wanted", "apart"),
        models.node("ReduceMean", "apart", "pooled", axes=[2, 3], keepdims=0),
        models.node("Gemm", "pooled fc.weight", "logits", transB=1),
    ]
    numbers = {"index": index, "all": [-1], "rest": [0, models.CHANNELS], "last": [-1]}
    tensors = {name: np.array(number, np.int64) for name, number in numbers.items()}
    weights = {
        "w": models.weights(models.CHANNELS, models.CHANNELS, 3, 3),
        "fc.weight": models.weights(models.CLASSES, models.CHANNELS),
    }
    return models.assemble(nodes, tensors | weights, **OPEN)


def convolution(source: str = "image", **how: list[int]) -> onnx.NodeProto:
    return models.node("Conv", f"{source} w", "features", **how)


@pytest.mark.parametrize("how", [{}, {"axis": 0}])
@pytest.mark.parametrize("index", [2, -1])
def test_sides_that_are_known_are_constants(load: Load, index: int, how: dict[str, int]) -> None:
    """Of an early layer's output, which a late Reshape takes."""
    runs_past_nothing(load, with_a_late_side(convolution(), index, **how), "features")


@pytest.mark.parametrize("op", ["MaxPool", "AveragePool"])
def test_sides_of_pools_that_round_up_are_those_that_they_write(load: Load, op: str) -> None:
    """Of 9, 2 at a time and one place padded, onnxruntime makes 5, and shape inference 6."""
    shape = models.node(op, "image", "features", kernel_shape=[2, 2], strides=[2, 2], pads=[1] * 4, ceil_mode=1)
    model = with_a_late_side(shape)
    for end in (2, 3):
        model.graph.input[0].type.tensor_type.shape.dim[end].dim_value = 9
    x = models.images(3, (3, models.CHANNELS, 9, 9))
    oracle.assert_close(to_torch(load(model))(torch.from_numpy(x)).numpy(), oracle.run(model, x), 1e-5)


def test_sides_are_those_of_the_model_and_not_of_stale_shapes(load: Load) -> None:
    """Which a file has that was made dynamic by changing its input alone."""
    model = with_a_late_side(convolution(strides=[2, 2]))
    stale = onnx.helper.make_tensor_value_info("features", onnx.TensorProto.FLOAT, ["n", models.CHANNELS, 16, 16])
    model.graph.value_info.append(stale)
    runs_past_nothing(load, model, "features")


@pytest.mark.parametrize("kind", [onnx.TensorProto.UINT8, onnx.TensorProto.FLOAT16])
def test_what_makes_floats_of_the_image_stays_before_a_side(load: Load, kind: int) -> None:
    """Its output is what the first layer reads that can be quantized."""
    model = with_a_late_side(convolution("floats"))
    model.graph.node.insert(0, models.node("Cast", "image", "floats", to=onnx.TensorProto.FLOAT))
    model.graph.input[0].type.tensor_type.elem_type = kind
    module = to_torch(load(model))
    assert next(layer.input for layer in module.layers()) == "floats"
    assert not [step for step in module.whole.steps if step.op == "Shape"]


def test_places_that_hang_on_the_image_are_computed(load: Load) -> None:
    """In each image's own part, and alike for any two dark ones; in a bright one another."""
    which = [
        models.node("ReduceMax", "image", "top", axes=[1, 2, 3], keepdims=0),
        models.node("Greater", "top much", "bright"),
        models.node("Cast", "bright", "place", to=onnx.TensorProto.INT64),
        models.node("Unsqueeze", "place last", "own"),
    ]
    model, x = taken_from_one_row(which), models.images(3)
    x[1] *= 1000
    oracle.assert_close(to_torch(load(model))(torch.from_numpy(x)).numpy(), oracle.run(model, x), 1e-5)
