"""A model that cannot be converted, or is converted wrongly, is one sentence that says where."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from converters import conversion, writeback
from converters.classifier import Classifier
from converters.conversion import Unsupported, relative_difference, to_torch, unsupported_operators
from converters.edits import WeightEdit, apply_edits
from converters.errors import ConversionError, ModelError, UnsupportedOperatorError
from converters.load import load_classifier
from converters.ops import registry
from converters.runtime import Session
from converters.targets import PORTABLE
from tests import models
from tests.converters import oracle

Load = Callable[[onnx.ModelProto], Classifier]


def test_unsupported_operator_is_named(load: Load) -> None:
    classifier = load(models.unknown_operator())
    with pytest.raises(UnsupportedOperatorError) as caught:
        to_torch(classifier)
    for part in (str(classifier.path), "frob/Frobnicate", "com.example.Frobnicate", "opset 1", "export the model"):
        assert part in str(caught.value)
    assert unsupported_operators(classifier) == [
        Unsupported("Frobnicate", 1, "frob/Frobnicate", "export the model without it")
    ]


def test_integer_kernels_are_refused_with_the_node_and_what_helps(load: Load) -> None:
    """The QOperator form of a quantized file: its weights are integers inside of fused operators."""
    nodes = [
        models.node("QuantizeLinear", "image step zero", "few"),
        models.node("QLinearConv", "few step zero weight weight.step weight.zero step zero", "sums"),
        models.node("DequantizeLinear", "sums step zero", "features"),
        *models.head("features"),
    ]
    tensors = {
        "step": np.float32(0.02),
        "zero": np.array(0, np.int8),
        "weight": np.ones((4, 3, 3, 3), np.int8),
        "weight.step": np.float32(0.01),
        "weight.zero": np.array(0, np.int8),
    }
    classifier = load(models.assemble(nodes, {**tensors, **models.head_tensors(4)}))
    with pytest.raises(UnsupportedOperatorError, match=r"sums/QLinearConv.*QLinearConv.*float model"):
        to_torch(classifier)
    (found,) = unsupported_operators(classifier)
    assert (found.op, found.node) == ("QLinearConv", "sums/QLinearConv")


def test_a_second_output_that_is_not_computed_is_a_sentence(load: Load) -> None:
    with pytest.raises(UnsupportedOperatorError, match=r"model\.onnx: node indices/Cast \(Cast\) reads 'places'"):
        to_torch(load(models.read_indices()))


def test_supported_operators_are_not_listed(embedded: Classifier) -> None:
    assert unsupported_operators(embedded) == []


def wrong(monkeypatch: pytest.MonkeyPatch, op: str, version: int, change: Callable[[torch.Tensor], Any]) -> None:
    """Let an operator's entry give something else from now on."""
    right = registry._TABLE["", op, version]
    monkeypatch.setitem(registry._TABLE, ("", op, version), lambda a: lambda *x: change(right(a)(*x)))


def test_wrong_operator_is_found(embedded: Classifier, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every Conv adds 0.1; the first one of the graph is named, in a sentence with the path."""
    wrong(monkeypatch, "Conv", 11, lambda value: value + 0.1)
    first = next(node for node in embedded.normal.graph if node.op_type == "Conv").outputs[0].name
    with pytest.raises(ConversionError, match=f"first at value '{first}' "):
        to_torch(embedded)


def test_wrong_last_operator_is_found(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong(monkeypatch, "Gemm", 13, lambda value: value * 1.001)
    with pytest.raises(ConversionError, match=r"model\.onnx: .* first at value 'logits'"):
        to_torch(load(models.conv()))


def test_float_noise_that_the_model_amplifies_is_no_error(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    classifier = load(models.chaotic())
    to_torch(classifier)
    monkeypatch.setattr(conversion, "ROUNDING", 0.0)
    with pytest.raises(ConversionError, match="first at value 'chaos'"):
        to_torch(classifier)


def test_overflow_is_no_rounding(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong(monkeypatch, "Gemm", 13, lambda value: value * 1e30 * 1e30)
    with pytest.raises(ConversionError, match="differs from onnxruntime by inf"):
        to_torch(load(models.conv()))


def test_a_damaged_weight_that_hides_is_the_files_fault(load: Load) -> None:
    model = models.hidden_weight()
    weight = onnx.numpy_helper.to_array(model.graph.initializer[0]).copy()
    weight.flat[0] = np.inf
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weight, model.graph.initializer[0].name))
    with pytest.raises(ModelError, match=r"model\.onnx: onnxruntime itself gets NaN or infinity"):
        to_torch(load(model))


def test_a_batch_of_one_that_the_file_does_not_declare_is_a_sentence(load: Load) -> None:
    model = models.fixed_batch(reshape=[1, models.PIXELS])
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    with pytest.raises(ConversionError, match="wound into the graph, so that onnxruntime does not run it on 2 images"):
        to_torch(load(model))


@pytest.mark.parametrize("error", [RuntimeError, KeyError, IndexError])
def test_operator_that_fails_is_a_sentence(load: Load, monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    def fail(_value: torch.Tensor) -> None:
        raise error("no such thing")

    wrong(monkeypatch, "Conv", 11, fail)
    with pytest.raises(ConversionError, match=r"model\.onnx: .*no such thing"):
        to_torch(load(models.conv()))


def test_output_that_turns_out_to_be_a_map(load: Load) -> None:
    """The file declares [batch, classes] and computes [batch, channels, 6, 6]."""
    model = models.feature_map()
    del model.graph.output[0].type.tensor_type.shape.dim[2:]
    with pytest.raises(ModelError, match=r"model\.onnx: output features has shape .*6, 6.*not an image classifier"):
        to_torch(load(model))


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_file_is_read_and_not_quantized_again(load: Load, tmp_path: Path, bits: int) -> None:
    ready = writeback.prepare_for_quantization(load(models.conv()), PORTABLE, bits)
    values = np.random.default_rng(0).integers(-8, 8, (4, 3, 3, 3))
    edit = WeightEdit(
        "features", values, np.full(4, 0.1, np.float32), np.arange(4) - 2, 0, bits, PORTABLE.weight_container(bits)
    )
    path, x = tmp_path / "quantized.onnx", models.images()
    writeback.save(apply_edits(ready.original, [edit]), path, {})
    classifier = load_classifier(path)
    expected = Session(path, optimise=False).run(x)[0]
    oracle.assert_close(to_torch(classifier)(torch.from_numpy(x)).numpy(), expected, 1e-5)
    with pytest.raises(ModelError, match=r"quantized\.onnx is quantized already: give the float model"):
        writeback.prepare_for_quantization(classifier, PORTABLE, 4)


def test_relative_difference() -> None:
    one = np.ones((2, 2), np.float32)
    assert relative_difference(one * 4, one * 5) == pytest.approx(0.2)
    assert relative_difference(one, np.ones(4, np.float32)) == np.inf
    assert np.isnan(relative_difference(one * np.nan, one))
    assert np.isnan(relative_difference(one, one * np.nan))
    assert relative_difference(one * 0, one * 0) == 0
