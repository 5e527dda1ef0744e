"""Every number type that a file can have becomes float32 for us, and stays what it was in what is written."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from converters.classifier import Classifier
from converters.conversion import FLIP_TOLERANCE, to_torch
from converters.runtime import Session, serialise
from converters.targets import PORTABLE
from converters.writeback import prepare_for_quantization
from tests import models
from tests.converters import oracle

Load = Callable[[onnx.ModelProto], Classifier]
KINDS = {TensorProto.FLOAT16: np.float16, TensorProto.DOUBLE: np.float64}


def in_type(kind: int) -> onnx.ModelProto:
    """A classifier with image, weights and logits in another float type; onnxruntime has no Conv in double."""
    model = models.gemm(trans_b=1) if kind == TensorProto.DOUBLE else models.conv()
    for tensor in model.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(KINDS[kind]), tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = kind
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_another_float_type(load: Load, kind: int) -> None:
    model, x = in_type(kind), models.images(3).astype(np.float16).astype(np.float32)
    classifier = load(model)
    module = to_torch(classifier)
    assert all(tensor.dtype in (torch.float32, torch.int64) for tensor in module.buffers())
    expected = Session(model.SerializeToString(), optimise=False).run(x)[0].astype(np.float32)
    tolerance = 5e-3 if kind == TensorProto.FLOAT16 else 1e-5  # onnxruntime computes in 16 bits, we do not
    oracle.assert_close(module(torch.from_numpy(x)).numpy(), expected, tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_keeps_the_types_outside(load: Load, kind: int) -> None:
    """Computed in float32 inside; names and types of the image and the logits are the file's own."""
    ready = prepare_for_quantization(load(in_type(kind)), PORTABLE, 4)
    proto = onnx.load_from_string(serialise(ready.original))
    for before, after in zip(
        (*in_type(kind).graph.input, *in_type(kind).graph.output),
        (*proto.graph.input, *proto.graph.output),
        strict=True,
    ):
        assert (before.name, before.type.tensor_type.elem_type) == (after.name, after.type.tensor_type.elem_type)
    assert {t.data_type for t in proto.graph.initializer} <= {TensorProto.FLOAT, TensorProto.INT64}
    x = models.images(2)
    expected = Session(in_type(kind).SerializeToString()).run(x)[0].astype(np.float32)
    oracle.assert_close(Session(proto.SerializeToString()).run(x)[0].astype(np.float32), expected, 5e-3)


def test_image_of_bytes(load: Load) -> None:
    """uint8 pixels, cast in the graph: the spec follows from the type, and whole numbers go in."""
    cast = models.node("Cast", "image", "floats", to=TensorProto.FLOAT)
    model = models.assemble([cast, *models.head("floats")], models.head_tensors(3))
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8
    classifier = load(model)
    assert (classifier.spec.scale, classifier.spec.mean, classifier.spec.source) == (255, (0, 0, 0), "detected")
    x = np.random.default_rng(0).integers(0, 256, (3, 3, 8, 8)).astype(np.float32)
    expected = Session(model.SerializeToString()).run(x.astype(np.uint8))[0]
    oracle.assert_close(to_torch(classifier)(torch.from_numpy(x)).numpy(), expected, 1e-5)
    oracle.assert_close(classifier.session().run(x)[0], expected, 0)


@pytest.mark.parametrize(("side", "tolerance"), [(4, 1e-5), (16, 1e-5), (13, FLIP_TOLERANCE)])
def test_bytes_that_are_resized_stay_whole(load: Load, side: int, tolerance: float) -> None:
    """onnxruntime cuts off what lies between two bytes; the gradient passes, so that such a model can be inverted.

    By 13 / 8, a few bytes come out on either side of a whole number: a step apart.
    """
    nodes = [
        models.node("Resize", "image - scales", "resized", mode="linear"),
        models.node("Cast", "resized", "floats", to=TensorProto.FLOAT),
        *models.head("floats"),
    ]
    scales = np.array([1, 1, side / 8, side / 8], np.float32)
    model = models.assemble(nodes, {"scales": scales, **models.head_tensors(3)}, opset=13)
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8
    x = np.random.default_rng(0).integers(0, 256, (3, 3, 8, 8)).astype(np.float32)
    image = torch.from_numpy(x).requires_grad_()
    logits = to_torch(load(model))(image)
    expected = Session(model.SerializeToString()).run(x.astype(np.uint8))[0]
    oracle.assert_close(logits.detach().numpy(), expected, tolerance)
    logits.square().sum().backward()
    assert image.grad is not None
    assert (image.grad != 0).any()


def test_activations_of_four_bits(load: Load) -> None:
    """QuantizeLinear to uint4 saturates where four bits end, with the gradient of what lies between."""
    zero = helper.make_tensor("zero", TensorProto.UINT4, [], [3])
    nodes = [
        models.node("QuantizeLinear", "image step zero", "few"),
        models.node("DequantizeLinear", "few step zero", "floats"),
        *models.head("floats"),
    ]
    model = models.assemble(nodes, {"step": np.float32(0.25), **models.head_tensors(3)}, opset=21)
    model.graph.initializer.append(zero)
    x = models.images(2)
    module = to_torch(load(model))
    oracle.assert_close(module(torch.from_numpy(x)).numpy(), oracle.run(model, x), 1e-5)
    image = torch.from_numpy(x).requires_grad_()
    module(image).square().sum().backward()
    assert image.grad is not None
    inside = (np.round(x / 0.25) + 3 >= 0) & (np.round(x / 0.25) + 3 <= 15)
    assert (image.grad.numpy()[~inside] == 0).all()
    assert (image.grad.numpy()[inside] != 0).any()
