"""What is written is what was asked for: onnxruntime on the edited file, and on a float model of the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from converters.classifier import Classifier
from converters.conversion import to_torch
from converters.edits import BIAS, ActivationEdit, BiasEdit, TensorEdit, WeightEdit, apply_edits
from converters.errors import ModelError
from converters.runtime import Session, serialise
from converters.targets import INT8, PORTABLE, UINT8, UINT16, Container, choose_target
from converters.writeback import difference_from, prepare_for_quantization
from tests import models
from tests.converters import oracle

Load = Callable[[onnx.ModelProto], Classifier]

ROUNDING = 1e-6  # of the largest magnitude; both sides are float32 and multiply the same numbers

CASES: dict[str, tuple[onnx.ModelProto, str, str, int]] = {
    "Conv": (models.conv(), "features", "conv.weight", 0),
    "depthwise Conv": (models.depthwise(), "features", "conv.weight", 0),
    "Gemm transB=0": (models.gemm(trans_b=0), "logits", "fc.weight", 1),
    "Gemm transB=1": (models.gemm(trans_b=1), "logits", "fc.weight", 0),
    "MatMul": (models.matmul(bias=False), "logits", "fc.weight", 1),
    "MatMul and Add": (models.matmul(), "logits", "fc.weight", 1),
    "weight behind Identity": (models.hidden_weight(), "features", "conv.weight", 0),
}
"""Model, the output of the node to edit, the initializer that it reads, its output-channel axis."""


def tensor_of(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def replaced(model: onnx.ModelProto, name: str, array: NDArray[np.float32]) -> onnx.ModelProto:
    """A copy of the model with another float initializer."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    tensor_of(copy, name).CopyFrom(numpy_helper.from_array(array, name))
    return copy


def random_edit(output: str, shape: tuple[int, ...], axis: int, bits: int) -> WeightEdit:
    """Any integers of `bits` bits, with a scale and a zero point for each channel."""
    generator = np.random.default_rng(bits)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    values = generator.integers(low, high, shape, dtype=np.int32, endpoint=True)
    values.flat[:2] = low, high
    scale = generator.uniform(0.01, 0.1, shape[axis]).astype(np.float32)
    zeros = generator.integers(low, high, shape[axis], dtype=np.int32, endpoint=True)
    return WeightEdit(output, values, scale, zeros, axis, bits, PORTABLE.weight_container(bits))


def dequantized(edit: WeightEdit) -> NDArray[np.float32]:
    shape = [-1 if axis == edit.axis else 1 for axis in range(edit.values.ndim)]
    return (edit.values - edit.zero_point.reshape(shape)).astype(np.float32) * edit.scale.reshape(shape)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("case", CASES)
def test_weight_edit(load: Load, case: str, bits: int) -> None:
    model, output, weight, axis = CASES[case]
    edit = random_edit(output, tuple(tensor_of(model, weight).dims), axis, bits)
    ready = prepare_for_quantization(load(model), PORTABLE, bits)
    edited = apply_edits(ready.original, [edit])
    onnx.checker.check_model(oracle.proto(edited), full_check=True)
    x = models.images()
    expected = oracle.run(replaced(model, weight, dequantized(edit)), x)
    oracle.assert_close(oracle.run(edited, x), expected, ROUNDING)
    assert weight not in edited.graph.initializers


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("case", ["Conv", "Gemm transB=0", "Gemm transB=1", "MatMul"])
def test_weight_edit_in_groups(load: Load, case: str, size: int, bits: int) -> None:
    """A scale and a zero point for each `size` inputs of a channel at a place of the kernel; the last may be fewer."""
    model, output, weight, axis = CASES[case]
    edit, inputs = random_edit(output, tuple(tensor_of(model, weight).dims), axis, bits), 1 - axis
    generator, group = np.random.default_rng(size), np.arange(edit.values.shape[inputs]) // size
    shape = [group[-1] + 1 if at == inputs else length for at, length in enumerate(edit.values.shape)]
    scale = generator.uniform(0.01, 0.1, shape).astype(np.float32)
    zeros = generator.integers(-2, 2, shape, dtype=np.int32)
    ready = prepare_for_quantization(load(model), PORTABLE, bits)
    grouped = replace(edit, scale=scale, zero_point=zeros, axis=inputs, group_size=size)
    edited = apply_edits(ready.original, [grouped])
    onnx.checker.check_model(oracle.proto(edited), full_check=True)
    real = (edit.values - zeros.take(group, inputs)).astype(np.float32) * scale.take(group, inputs)
    x = models.images()
    oracle.assert_close(oracle.run(edited, x), oracle.run(replaced(model, weight, real), x), ROUNDING)


@pytest.mark.parametrize("bits", range(2, 9))
def test_integers_lie_packed_in_the_file(load: Load, bits: int) -> None:
    """Up to 4 bits as INT4, two to a byte; 27 weights a channel make an odd count for the last channel."""
    model = models.conv()
    edit = random_edit("features", (4, 3, 3, 3), 0, bits)
    ready = prepare_for_quantization(load(model), PORTABLE, bits)
    tensors = {
        t.name: t for t in onnx.load_from_string(serialise(apply_edits(ready.original, [edit]))).graph.initializer
    }
    weight, zeros = tensors["conv.weight.q"], tensors["conv.weight.zero"]
    kind = TensorProto.INT4 if bits <= 4 else TensorProto.INT8
    assert (weight.data_type, zeros.data_type) == (kind, kind)
    assert (len(weight.raw_data), len(zeros.raw_data)) == ((54, 2) if bits <= 4 else (108, 4))
    np.testing.assert_array_equal(numpy_helper.to_array(weight).astype(np.int32), edit.values)
    np.testing.assert_array_equal(numpy_helper.to_array(zeros).astype(np.int32), edit.zero_point)


@pytest.mark.parametrize("edited", ["first", "second"])
def test_only_the_edited_reader_of_a_shared_weight_changes(load: Load, edited: str) -> None:
    proto, x = models.shared_weight(), models.images()
    edit = random_edit(edited, tuple(tensor_of(proto, "square").dims), 1, 8)
    expected = replaced(proto, "square", tensor_array(proto, "square"))
    expected.graph.initializer.append(numpy_helper.from_array(dequantized(edit), "new"))
    next(node for node in expected.graph.node if node.output[0] == edited).input[1] = "new"
    model = apply_edits(load(proto).original, [edit])
    oracle.assert_close(oracle.run(model, x), oracle.run(expected, x), ROUNDING)
    assert "square" in model.graph.initializers


def tensor_array(model: onnx.ModelProto, name: str) -> NDArray[np.float32]:
    return numpy_helper.to_array(tensor_of(model, name))


def test_weight_in_a_constant_node(load: Load) -> None:
    x, edit = models.images(), random_edit("features", (4, 3, 3, 3), 0, 8)
    model = apply_edits(load(models.hidden_weight("Constant")).original, [edit])
    expected = replaced(models.hidden_weight(), "conv.weight", dequantized(edit))
    oracle.assert_close(oracle.run(model, x), oracle.run(expected, x), ROUNDING)
    assert all(node.op_type != "Constant" for node in model.graph)


@pytest.mark.parametrize(
    ("model", "output", "bias"),
    [(models.conv(bias=False), "features", 4), (models.gemm(trans_b=1, bias=False), "logits", 5)],
    ids=["Conv", "Gemm"],
)
def test_bias_that_was_absent_is_added(load: Load, model: onnx.ModelProto, output: str, bias: int) -> None:
    x, values = models.images(), models.random(bias)
    expected = onnx.ModelProto()
    expected.CopyFrom(model)
    expected.graph.initializer.append(numpy_helper.from_array(values, "b"))
    next(node for node in expected.graph.node if node.output[0] == output).input.append("b")
    edited = apply_edits(load(model).original, [TensorEdit(output, BIAS, values)])
    oracle.assert_close(oracle.run(edited, x), oracle.run(expected, x), 0)


@pytest.mark.parametrize(("index", "name"), [(1, "conv.weight"), (BIAS, "conv.bias")])
def test_float_edit(load: Load, index: int, name: str) -> None:
    x, values = models.images(), models.random(*tensor_array(models.conv(), name).shape, seed=5)
    edited = apply_edits(load(models.conv()).original, [TensorEdit("features", index, values)])
    oracle.assert_close(oracle.run(edited, x), oracle.run(replaced(models.conv(), name, values), x), 0)


def test_edits_of_one_node_come_together(load: Load) -> None:
    x, edit, bias = models.images(), random_edit("features", (4, 3, 3, 3), 0, 6), models.random(4, seed=5)
    edited = apply_edits(load(models.conv(bias=False)).original, [edit, TensorEdit("features", BIAS, bias)])
    expected = replaced(replaced(models.conv(), "conv.weight", dequantized(edit)), "conv.bias", bias)
    oracle.assert_close(oracle.run(edited, x), oracle.run(expected, x), ROUNDING)


def fake_quantized(x: NDArray[np.float32], edit: ActivationEdit) -> NDArray[np.float32]:
    """Rounded half to even and cut off at what `bits` bits hold, in float32."""
    levels = np.rint(x / np.float32(edit.scale)) + edit.zero_point
    return ((np.clip(levels, 0, 2**edit.bits - 1) - edit.zero_point) * np.float32(edit.scale)).astype(np.float32)


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_reader_sees_the_quantized_value(load: Load, bits: int) -> None:
    """BatchNormalization and Add read `features`; the oracle is the rest of the model on numpy's quantized value."""
    proto, x = models.batchnorm(shared=True), models.images()
    edit = ActivationEdit("features", scale=2.0 / 2**bits, zero_point=2 ** (bits - 1), bits=bits, container=UINT8)
    rest = models.assemble(
        proto.graph.node[1:],
        {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer},
        inputs={"features": ("batch", 4, 8, 8)},
    )
    features = oracle.values(proto, x, ["features"])["features"]
    ready = prepare_for_quantization(load(proto), PORTABLE, bits)
    model = apply_edits(ready.original, [edit])
    oracle.assert_close(oracle.run(model, x), oracle.run(rest, fake_quantized(features, edit)), ROUNDING)


@pytest.mark.parametrize("value", ["image", "active"])
def test_activation_edit_of_input_and_last_map(load: Load, value: str) -> None:
    x, edit = models.images(), ActivationEdit(value, scale=0.02, zero_point=100, bits=8, container=UINT8)
    model = apply_edits(load(models.conv()).original, [edit])
    if value == "image":
        expected = oracle.run(models.conv(), fake_quantized(x, edit))
    else:
        before = oracle.values(models.conv(), x, ["active"])["active"]
        tail = models.assemble(models.head("active"), models.head_tensors(4), inputs={"active": ("batch", 4, 6, 6)})
        expected = oracle.run(tail, fake_quantized(before, edit))
    oracle.assert_close(oracle.run(model, x), expected, ROUNDING)


def test_activation_edit_of_the_output_changes_no_reader(load: Load) -> None:
    """Nobody reads the logits, so the file stays as it is."""
    x = models.images()
    model = apply_edits(load(models.conv()).original, [ActivationEdit("logits", 0.1, 0, 8, UINT8)])
    assert [node.op_type for node in model.graph] == [node.op_type for node in models.conv().graph.node]
    oracle.assert_close(oracle.run(model, x), oracle.run(models.conv(), x), 0)


@pytest.mark.parametrize(("bits", "bad"), [(2, 8), (4, 8), (4, -9), (5, 128), (8, 128), (8, -129)])
def test_values_out_of_range(load: Load, bits: int, bad: int) -> None:
    original = load(models.conv()).original
    good = WeightEdit(
        "features", np.zeros((4, 3, 3, 3), np.int32), np.ones(4, np.float32), np.zeros(4, np.int32), 0, 8, INT8
    )
    weight, zero = good.values.copy(), good.zero_point.copy()
    weight[1, 2, 0, 1] = zero[3] = bad
    for values, zeros in ((weight, good.zero_point), (good.values, zero)):
        with pytest.raises(ValueError, match=r"conv\.weight\.\w+: integers outside \[-"):
            apply_edits(
                original, [WeightEdit("features", values, good.scale, zeros, 0, bits, PORTABLE.weight_container(bits))]
            )


@pytest.mark.parametrize(("bits", "zero"), [(4, 16), (4, -1), (8, 256), (8, -1)])
def test_activation_zero_point_out_of_range(load: Load, bits: int, zero: int) -> None:
    with pytest.raises(ValueError, match=r"active\.zero: integers outside \[0, "):
        apply_edits(load(models.conv()).original, [ActivationEdit("active", 0.1, zero, bits, UINT8)])


@pytest.mark.parametrize("name", ["nowhere", "image"])
def test_edit_of_no_node(load: Load, name: str) -> None:
    with pytest.raises(KeyError, match=name):
        apply_edits(load(models.conv()).original, [TensorEdit(name, 1, models.random(1))])


def test_the_original_is_left_as_it_was(embedded: Classifier) -> None:
    before = serialise(embedded.original)
    nodes = [node for node in embedded.original.graph if node.op_type == "Conv"][:2]
    shapes = [tuple(node.inputs[1].shape.numpy()) for node in nodes]  # type: ignore[union-attr]  # or the test fails
    names = [str(node.outputs[0].name) for node in nodes]
    edits = [random_edit(name, shape, 0, 8) for name, shape in zip(names, shapes, strict=True)]
    edited = apply_edits(embedded.original, [*edits, ActivationEdit(names[0], 0.1, 3, 8, UINT8)])
    assert serialise(edited) != before
    assert serialise(embedded.original) == before


@pytest.mark.parametrize("optimise", [False, True])
def test_four_bit_file_means_the_same_when_optimised(load: Load, optimise: bool) -> None:
    """What onnxruntime fuses must not change the result beyond rounding."""
    model, output, weight, axis = CASES["Conv"]
    edit, x = random_edit(output, (4, 3, 3, 3), axis, 4), models.images()
    ready = prepare_for_quantization(load(model), PORTABLE, 4)
    actual = Session(serialise(apply_edits(ready.original, [edit])), optimise=optimise).run(x)[0]
    oracle.assert_close(actual, oracle.run(replaced(model, weight, dequantized(edit)), x), 2e-6)


def test_difference_from(load: Load) -> None:
    model, x, path = load(models.conv()).original, models.images(), Path("m")
    expected = oracle.run(models.conv(), x)
    assert difference_from(model, x, expected, path, 2) <= 1e-6
    relative = difference_from(model, x, expected * np.float32(1.1), path, 2)
    assert relative == pytest.approx(0.1 / 1.1, rel=1e-3)
    with pytest.raises(ModelError, match="m: the written model gives another shape or NaN"):
        difference_from(model, x * np.nan, expected, path, 2)


@pytest.mark.parametrize("op", ["Softmax", "LogSoftmax"])
def test_difference_is_that_of_the_logits(load: Load, op: str) -> None:
    """A file that ends in a softmax is compared before it."""
    classifier, x = load(models.softmax(op)), models.images()
    logits = to_torch(classifier)(torch.from_numpy(x)).numpy()
    assert difference_from(classifier.original, x, logits, Path("m"), 1) <= 1e-5


@pytest.mark.parametrize(
    ("container", "kind", "size"), [("int2", TensorProto.INT2, 27), ("int8", TensorProto.INT8, 108)]
)
def test_two_bits_in_the_container_that_was_asked_for(load: Load, container: str, kind: int, size: int) -> None:
    model, target = models.conv(), choose_target("portable", container)
    edit = replace(random_edit("features", (4, 3, 3, 3), 0, 2), container=target.weight_container(2))
    edited = apply_edits(prepare_for_quantization(load(model), target, 2).original, [edit])
    weight = next(t for t in onnx.load_from_string(serialise(edited)).graph.initializer if t.name == "conv.weight.q")
    assert (weight.data_type, len(weight.raw_data)) == (kind, size)
    for optimise in (True, False):
        actual = Session(edited, optimise=optimise).run(models.images())[0]
        expected = oracle.run(replaced(model, "conv.weight", dequantized(edit)), models.images())
        oracle.assert_close(np.asarray(actual, np.float32), expected, ROUNDING)


@pytest.mark.parametrize("bias", [True, False])
def test_bias_edit(load: Load, bias: bool) -> None:
    model, x = models.conv(bias=bias), models.images()
    generator = np.random.default_rng(0)
    integers = generator.integers(-1000, 1000, 4, dtype=np.int32)
    scale = generator.uniform(1e-4, 1e-3, 4).astype(np.float32)
    edited = apply_edits(load(model).original, [BiasEdit("features", integers, scale)])
    onnx.checker.check_model(oracle.proto(edited), full_check=True)
    plain = apply_edits(load(model).original, [TensorEdit("features", 2, integers.astype(np.float32) * scale)])
    oracle.assert_close(oracle.run(edited, x), oracle.run(plain, x), ROUNDING)


@pytest.mark.parametrize(("bits", "container"), [(4, INT8), (8, INT8), (16, UINT16)])
def test_other_activation_containers(load: Load, bits: int, container: Container) -> None:
    """Signed ones around zero, and 16 bits."""
    low, high = container.bounds(bits)
    edit = ActivationEdit(
        "active", scale=4.0 / 2**bits, zero_point=(low + high + 1) // 2, bits=bits, container=container
    )
    before = oracle.values(models.conv(), models.images(), ["active"])["active"]
    levels = np.clip(np.rint(before / np.float32(edit.scale)) + edit.zero_point, low, high) - edit.zero_point
    tail = models.assemble(models.head("active"), models.head_tensors(4), inputs={"active": ("batch", 4, 6, 6)})
    expected = oracle.run(tail, (levels * np.float32(edit.scale)).astype(np.float32))
    ready = prepare_for_quantization(load(models.conv()), PORTABLE, 8, bits)
    oracle.assert_close(oracle.run(apply_edits(ready.original, [edit]), models.images()), expected, ROUNDING)
