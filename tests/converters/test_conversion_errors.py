"""A model that cannot be converted, or is converted wrongly, is one sentence that says where."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from converters import writeback
from converters.errors import ConversionError, ModelError, UnsupportedOperatorError
from converters.load import Classifier, load_classifier
from converters.ops import registry
from converters.torch_module import relative_difference, to_torch, unsupported_operators
from tests import models

Load = Callable[[onnx.ModelProto], Classifier]


def test_unsupported_operator_is_named(load: Load) -> None:
    classifier = load(models.unknown_operator())
    with pytest.raises(UnsupportedOperatorError) as caught:
        to_torch(classifier)
    for part in (str(classifier.path), "frob/Frobnicate", "com.example.Frobnicate", "opset 1", "export the model"):
        assert part in str(caught.value)
    assert unsupported_operators(classifier) == [("Frobnicate", 1, "frob/Frobnicate")]


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


@pytest.mark.parametrize("error", [RuntimeError, KeyError, IndexError])
def test_operator_that_fails_is_a_sentence(load: Load, monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    def fail(_value: torch.Tensor) -> None:
        raise error("no such thing")

    wrong(monkeypatch, "Conv", 11, fail)
    with pytest.raises(ConversionError, match=r"model\.onnx: .*no such thing"):
        to_torch(load(models.conv()))


def test_output_that_turns_out_to_be_a_map(load: Load) -> None:
    """The file declares [batch, classes] and computes [batch, classes, 1, 1]."""
    model = models.batchnorm_last()
    del model.graph.output[0].type.tensor_type.shape.dim[2:]
    with pytest.raises(ModelError, match=r"model\.onnx: .*normed"):
        to_torch(load(model))


@pytest.mark.parametrize(("bits", "reason"), [(4, "INT4.*quantized already"), (8, "DequantizeLinear")])
def test_quantized_file_is_refused(load: Load, tmp_path: Path, bits: int, reason: str) -> None:
    """What this product writes it does not read; it says so whatever type the integers have."""
    ready = writeback.prepare_for_quantization(load(models.conv()), four_bit=bits == 4)
    ones, zeros = np.ones((4, 3, 3, 3), np.int32), np.zeros(4, np.int32)
    edit = writeback.WeightEdit("features", ones, np.ones(4, np.float32), zeros, axis=0, bits=bits)
    path = tmp_path / "quantized.onnx"
    writeback.save(writeback.apply(ready.original, [edit]), path, {})
    with pytest.raises(ModelError, match=rf"quantized\.onnx: .*{reason}"):
        to_torch(load_classifier(path))


def test_relative_difference() -> None:
    one = np.ones((2, 2), np.float32)
    assert relative_difference(one * 4, one * 5) == pytest.approx(0.2)
    assert relative_difference(one, np.ones(4, np.float32)) == np.inf
    assert np.isnan(relative_difference(one * np.nan, one))
    assert np.isnan(relative_difference(one, one * np.nan))
    assert relative_difference(one * 0, one * 0) == 0
