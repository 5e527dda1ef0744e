"""Input tensors for other tools: under the input's name, in its type, and what onnxruntime takes as it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from converters.classifier import Classifier
from converters.errors import OutputError
from recipes import zoo
from recipes.calibration import export_calibration
from recipes.images import load_images
from tests import models


def test_the_tensors_are_what_the_model_takes(classifier_of: Callable[[str], Classifier], tmp_path: Path) -> None:
    classifier, images = classifier_of("plain"), load_images(zoo.test_images_path(), 40)
    written = export_calibration(classifier, images, tmp_path / "calib.npz")
    with np.load(written.output) as archive:
        assert archive.files == [classifier.input_name] == [written.key]
        tensors = archive[classifier.input_name]
    assert (str(tensors.dtype), tensors.shape) == ("float32", (40, 1, 28, 28)) == (written.dtype, written.shape)
    assert written.size_bytes == written.output.stat().st_size
    (logits, *_) = classifier.session().run(tensors)
    assert images.labels is not None
    assert (logits.argmax(1) == images.labels.numpy()).mean() > 0.85


def test_a_model_of_bytes_gets_bytes(load: Callable[[onnx.ModelProto], Classifier], tmp_path: Path) -> None:
    proto = models.conv(image=("N", 1, 28, 28))
    proto.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.UINT8
    first = proto.graph.node[0]
    proto.graph.node.insert(0, onnx.helper.make_node("Cast", ["image"], ["as_float"], to=onnx.TensorProto.FLOAT))
    first.input[0] = "as_float"
    proto.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(models.weights(4, 1, 3, 3), "conv.weight"))
    written = export_calibration(load(proto), load_images(zoo.test_images_path(), 4), tmp_path / "calib.npz")
    with np.load(written.output) as archive:
        assert archive["image"].dtype == np.uint8


def test_any_input_name_will_do(load: Callable[[onnx.ModelProto], Classifier], tmp_path: Path) -> None:
    """`file` is a parameter of numpy's savez."""
    proto = models.conv(image=("N", 1, 28, 28))
    proto.graph.input[0].name = proto.graph.node[0].input[0] = "file"
    proto.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(models.weights(4, 1, 3, 3), "conv.weight"))
    written = export_calibration(load(proto), load_images(zoo.test_images_path(), 4), tmp_path / "calib.npz")
    with np.load(written.output) as archive:
        assert archive["file"].shape == (4, 1, 28, 28)


def test_nothing_is_replaced_unasked(classifier_of: Callable[[str], Classifier], tmp_path: Path) -> None:
    path, images = tmp_path / "calib.npz", load_images(zoo.test_images_path(), 4)
    path.write_bytes(b"mine")
    with pytest.raises(OutputError, match="--force"):
        export_calibration(classifier_of("plain"), images, path)
    assert path.read_bytes() == b"mine"
    export_calibration(classifier_of("plain"), images, path, overwrite=True)
    assert path.read_bytes() != b"mine"
