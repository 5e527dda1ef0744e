"""What a smaller model is called where nobody says."""

from __future__ import annotations

from pathlib import Path

from mixmix_cli.commands import distill, quantize
from recipes.budget import Budget


def test_quantized_models_are_named_after_the_bits() -> None:
    assert quantize.output_path(Path("a/model.onnx"), 4, None) == Path("a/model.w4.onnx")
    assert quantize.output_path(Path("a/model.v2.onnx"), 2, 8) == Path("a/model.v2.w2a8.onnx")
    assert quantize.output_path(Path("a/net-1.5"), 4, None) == Path("a/net-1.5.w4.onnx")
    assert quantize.output_path(Path("a/net.ONNX"), 4, None) == Path("a/net.w4.onnx")


def test_models_within_a_budget_are_named_mixed() -> None:
    assert quantize.output_path(Path("a/model.onnx"), Budget("bits", 3), None) == Path("a/model.mixed.onnx")
    assert quantize.output_path(Path("a/model.onnx"), Budget("bits", 3), 8) == Path("a/model.mixeda8.onnx")


def test_distilled_students_are_named_so() -> None:
    assert distill.output_path(Path("m/student.onnx")) == Path("m/student.distilled.onnx")
