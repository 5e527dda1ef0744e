"""The judge of these tests: onnxruntime on a model, with any value as an output, and one measure of difference."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import helper

from converters.runtime import Session

Array = NDArray[np.generic]


def proto(model: onnx.ModelProto | ir.Model) -> onnx.ModelProto:
    return model if isinstance(model, onnx.ModelProto) else ir.to_proto(model)


def run(model: onnx.ModelProto | ir.Model, x: Array) -> Array:
    """The first output of a model, graph optimisations off."""
    return Session(proto(model).SerializeToString(), optimise=False).run(x)[0]


def values(model: onnx.ModelProto | ir.Model, x: Array, names: Iterable[str]) -> dict[str, Array]:
    """The named float values of a model on `x`, made outputs of a copy; not those that are outputs already."""
    probe = onnx.ModelProto()
    probe.CopyFrom(proto(model))
    names = list(names)
    if not names:
        return {}
    probe.graph.output.extend(helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in names)
    return dict(zip(names, Session(probe.SerializeToString(), optimise=False).run(x, names), strict=True))


def difference(actual: Array, expected: Array) -> float:
    """Largest difference relative to the largest magnitude expected; shapes and types must be equal."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    largest = float(np.abs(expected).max(initial=0)) or 1.0
    return float(np.abs(actual.astype(np.float64) - expected.astype(np.float64)).max(initial=0)) / largest


def assert_close(actual: Array, expected: Array, tolerance: float) -> None:
    """Fails when `difference` is above the tolerance, or NaN."""
    assert difference(actual, expected) <= tolerance
