"""A path becomes a checked classifier, or one sentence that says what is wrong and what to do."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from converters.classifier import Classifier
from converters.conversion import to_torch
from converters.errors import MixMixError, ModelError, SpecError
from converters.input_spec import IMAGENET_MEAN, IMAGENET_STD
from converters.load import load_classifier
from tests import models

Load = Callable[[onnx.ModelProto], Classifier]
Write = Callable[[onnx.ModelProto], Path]


def assert_refused(path: Path, *parts: str) -> None:
    """Loading raises a ModelError of one line that names the path, has the `parts`, and ends in what to do."""
    with pytest.raises(ModelError) as caught:
        load_classifier(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    assert re.search(r": [a-z][^:]*$", message), f"no advice at the end: {message}"
    for part in parts:
        assert part in message


def test_missing_file(tmp_path: Path) -> None:
    assert_refused(tmp_path / "absent.onnx", "does not exist", "check the path")


def test_a_path_may_be_a_string(tmp_path: Path) -> None:
    path = models.write(models.conv(), tmp_path / "model.onnx")
    assert load_classifier(str(path)).path == path


def test_folder(tmp_path: Path) -> None:
    assert_refused(tmp_path, "is a folder", "name the .onnx file")


def test_name_too_long_for_the_file_system(tmp_path: Path) -> None:
    assert_refused(tmp_path / ("n" * 300 + ".onnx"))


@pytest.mark.parametrize(
    "content",
    [b"", b"\n", b"# A text, not a model.\n" * 50, random.Random(0).randbytes(4096), b"PK\x03\x04" + bytes(200)],
    ids=["empty", "newline", "text", "random", "zip"],
)
def test_not_a_model(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    assert_refused(path, "is not an ONNX model", "fetch or export it again")


def test_no_truncation_loads(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The file ends with the opset, without which there is no model; so every shorter file is refused."""
    whole = models.conv().SerializeToString()
    path = tmp_path_factory.mktemp("cut") / "model.onnx"
    for length in [*range(0, len(whole), 41), *range(len(whole) - 12, len(whole))]:
        path.write_bytes(whole[:length])
        assert_refused(path, "export it again")


@pytest.mark.parametrize(
    ("model", "parts"),
    [
        (models.detector(), ["2 outputs", "boxes", "detector", "classifier has one"]),
        (models.feature_map(), ["output features has shape [batch,4,6,6]", "not an image classifier"]),
        (models.two_inputs(), ["2 inputs (image, other)", "exactly one"]),
        (models.two_inputs([1, 3, 1, 1]), ["other [1, 3, 1, 1] may be constants", "without values"]),
        (models.flat_input(), ["input image has shape [batch,6,7]", "4 dimensions"]),
        (models.nan_weights(), ["fc.weight", "NaN", "export the model again"]),
        (models.nan_weights(constant_node=True), ["fc.weight", "NaN", "export the model again"]),
        (models.broken_graph(), ["not a valid ONNX model", "nowhere", "export it again"]),
    ],
    ids=[
        "detector",
        "rank 4 output",
        "two inputs",
        "a constant without its value",
        "rank 3 input",
        "NaN",
        "NaN in a Constant",
        "invalid graph",
    ],
)
def test_not_a_sound_classifier(write: Write, model: onnx.ModelProto, parts: list[str]) -> None:
    assert_refused(write(model), *parts)


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16])
def test_nan_in_a_tensor_of_any_float_type(write: Write, kind: int) -> None:
    weight = np.where(np.arange(models.PIXELS) == 7, np.nan, 1.0)
    model = models.assemble([*models.linear(), models.node("Identity", "extra", "unused")], {})
    model.graph.initializer.append(onnx.helper.make_tensor("fc.weight", TensorProto.FLOAT, [5, 192], [0.0] * 960))
    model.graph.initializer.append(onnx.helper.make_tensor("extra", kind, [models.PIXELS], weight))
    assert_refused(write(model), "extra", "NaN")


def test_integer_input(write: Write) -> None:
    model = models.assemble(
        [models.node("Cast", "image", "floats", to=TensorProto.FLOAT), *models.head("floats")], models.head_tensors(3)
    )
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.INT16
    assert_refused(write(model), "INT16", "uint8")


def test_box_selection_is_a_detector(write: Write) -> None:
    tensors = {"boxes": np.zeros((1, 2, 4), np.float32), "scores": np.zeros((1, 1, 2), np.float32)}
    selection = models.node("NonMaxSuppression", "boxes scores", "chosen")
    model = models.assemble([selection, *models.linear()], {"fc.weight": models.weights(5, models.PIXELS), **tensors})
    assert_refused(write(model), "NonMaxSuppression", "detector")


def test_shape_that_contradicts_the_metadata(write: Write) -> None:
    with pytest.raises(SpecError, match="height 9, the model takes 8: correct the spec"):
        load_classifier(write(models.conv(metadata={"mixmix.input.size": "[9, 8]"})))


@given(position=st.integers(-180, 150), value=st.integers(0, 255))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_damaged_byte_is_an_error_or_nothing(
    position: int, value: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever one wrong byte does to names, types, shapes and metadata (at both ends), a person gets a sentence."""
    model = models.fixed_batch(reshape=[1, -1])
    onnx.helper.set_model_props(model, {"mixmix.input.labels": "imagenet"})
    raw = bytearray(model.SerializeToString())
    raw[position] = value
    path, message = tmp_path_factory.getbasetemp() / "damaged.onnx", ""
    path.write_bytes(raw)
    try:
        to_torch(load_classifier(path))
    except MixMixError as error:
        message = str(error)
    assert "\n" not in message


def test_facts_about_a_file(embedded_path: Path, embedded: Classifier) -> None:
    raw = embedded_path.read_bytes()
    proto = onnx.load_from_string(raw)
    assert embedded.sha256 == hashlib.sha256(raw).hexdigest()
    assert embedded.size_bytes == len(raw)
    assert embedded.opset == proto.opset_import[0].version
    assert embedded.name == embedded_path.stem
    assert (embedded.input_name, embedded.output_name) == ("image", "logits")
    assert (embedded.output_kind, embedded.logits) == ("logits", "logits")
    assert embedded.spec.source == "metadata"
    assert embedded.fixed_batch is None


@pytest.mark.parametrize("opset", [9, 13, 17, 21])
def test_opset_is_the_files_own(load: Load, opset: int) -> None:
    assert load(models.conv(opset=opset)).opset == opset


@pytest.mark.parametrize("behind_identity", [False, True])
@pytest.mark.parametrize(("op", "kind"), [("Softmax", "softmax"), ("LogSoftmax", "log-softmax")])
def test_closing_softmax_is_cut_off(load: Load, op: str, kind: str, behind_identity: bool) -> None:
    classifier = load(models.softmax(op, behind_identity=behind_identity))
    assert classifier.output_kind == kind
    assert classifier.logits == "scores"
    assert classifier.output_name == "probabilities"


def test_fixed_batch_is_known(load: Load) -> None:
    assert load(models.fixed_batch()).fixed_batch == 1
    assert load(models.conv()).fixed_batch is None


def test_original_graph_is_as_the_file_has_it(load: Load) -> None:
    """Normalisation works on a copy: the Identity, and the fixed batch, are still in the original."""
    classifier = load(models.hidden_weight())
    assert [entry.op_type for entry in classifier.original.graph][:2] == ["Identity", "Conv"]
    assert [entry.op_type for entry in classifier.normal.graph][:1] == ["Conv"]
    assert list(load(models.fixed_batch()).original.graph.inputs[0].shape or []) == [1, 3, 8, 8]


def test_size_counts_external_data(tmp_path: Path) -> None:
    path, data = tmp_path / "model.onnx", tmp_path / "model.data"
    onnx.save(models.conv(), path, save_as_external_data=True, location="model.data", size_threshold=0)
    classifier = load_classifier(path)
    assert data.stat().st_size > 0
    assert classifier.size_bytes == path.stat().st_size + data.stat().st_size
    data.unlink()
    assert_refused(path, "external data", "keep the data file beside the model")


def test_parameters_are_counted_once(load: Load) -> None:
    """A weight that two layers share is in the file once, however the private copy spells it."""
    proto = models.shared_weight()
    assert load(proto).parameter_count() == sum(numpy_helper.to_array(t).size for t in proto.graph.initializer)


def test_old_file_whose_initializers_are_no_inputs(load: Load) -> None:
    """IR version 3 wanted them to be; onnxruntime does not."""
    model = models.conv(opset=9)
    model.ir_version = 3
    to_torch(load(model))


def test_infinity_that_is_no_weight(load: Load) -> None:
    """What pads a MaxPool; in a weight it is refused."""
    nodes = [
        models.node("Pad", "image pads least", "padded"),
        models.node("MaxPool", "padded", "features", kernel_shape=[3, 3]),
        *models.head("features"),
    ]
    tensors = {"pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]), "least": np.float32(-np.inf), **models.head_tensors(3)}
    to_torch(load(models.assemble(nodes, tensors)))


def test_infinity_in_a_weight(write: Write) -> None:
    model = models.conv()
    weight = numpy_helper.to_array(model.graph.initializer[0]).copy()
    weight.flat[0] = np.inf
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "conv.weight"))
    assert_refused(write(model), "conv.weight", "NaN or infinity")


@pytest.mark.parametrize(("training", "ratio", "refused"), [(True, 0.5, True), (True, 0.0, False), (False, 0.5, False)])
def test_a_dropout_that_drops_is_refused(training: bool, ratio: float, refused: bool, tmp_path: Path) -> None:
    """As exports in training mode have it."""
    model = models.conv()
    (last,) = (node for node in model.graph.node if "logits" in node.output)
    last.output[0] = "before"
    model.graph.initializer.extend(
        [numpy_helper.from_array(np.float32(ratio), "ratio"), numpy_helper.from_array(np.bool_(training), "training")]
    )
    model.graph.node.append(helper.make_node("Dropout", ["before", "ratio", "training"], ["logits"], name="drop"))
    path = models.write(model, tmp_path / "m.onnx")
    if not refused:
        assert load_classifier(path).logits
        return
    with pytest.raises(ModelError, match=r"m\.onnx: node drop drops at random.*export the model in evaluation mode"):
        load_classifier(path)


@pytest.mark.parametrize(
    ("options", "expected", "warned"),
    [
        ({"mean": 0.0}, (255.0, 0.0, 1.0), False),
        ({"std": 1.0}, (255.0, 0.0, 1.0), False),
        ({"scale": 255.0}, (255.0, 0.0, 1.0), False),
        ({"scale": 1.0}, (1.0, 0.485, 0.229), True),
        ({"mean": 0.25}, (1.0, 0.25, 0.229), True),
        ({"mean": 0.25, "std": 0.5}, (1.0, 0.25, 0.5), True),  # the graph itself says otherwise
    ],
)
def test_one_key_of_pixels_goes_with_what_is_found_as_long_as_they_agree(
    options: dict[str, float], expected: tuple[float, float, float], warned: bool, tmp_path: Path
) -> None:
    model = models.assemble(
        [
            models.node("Sub", "image mean", "shifted"),
            models.node("Div", "shifted std", "normal"),
            *models.head("normal"),
        ],
        models.head_tensors(models.CHANNELS)
        | {
            "mean": 255 * np.array(IMAGENET_MEAN, np.float32)[:, None, None],
            "std": 255 * np.array(IMAGENET_STD, np.float32)[:, None, None],
        },
    )
    classifier = load_classifier(models.write(model, tmp_path / "model.onnx"), options)
    spec = classifier.spec
    assert (spec.scale, spec.mean[0], spec.std[0]) == expected
    assert any(note.startswith("warning: ") for note in classifier.notes) == warned


def test_what_is_assumed_is_in_the_units_of_the_scale_that_is_said(tmp_path: Path) -> None:
    path = models.write(models.conv(), tmp_path / "model.onnx")
    assert load_classifier(path, {"mean": 0.25, "std": 0.5}).notes == ()  # which go with a scale of 1
    classifier = load_classifier(path, {"scale": 255.0})
    assert classifier.spec.mean == pytest.approx([255 * value for value in IMAGENET_MEAN])
    assert classifier.spec.std == pytest.approx([255 * value for value in IMAGENET_STD])
