"""The judge of these tests: onnxruntime, on a model, on any value in it, on one operator; one measure of difference."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from converters.ops import registry
from converters.runtime import Session

Array = NDArray[np.generic]
Operands = Sequence[Array | None]


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
    """Largest difference relative to the largest magnitude expected; shapes, types and what is not finite are equal."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    finite = np.isfinite(expected)
    if not finite.all():
        np.testing.assert_array_equal(actual[~finite], expected[~finite])
        actual, expected = actual[finite], expected[finite]
    largest = float(np.abs(expected).max(initial=0)) or 1.0
    return float(np.abs(actual.astype(np.float64) - expected.astype(np.float64)).max(initial=0)) / largest


def assert_close(actual: Array, expected: Array, tolerance: float) -> None:
    """Fails when `difference` is above the tolerance, or NaN."""
    assert difference(actual, expected) <= tolerance


def single(op: str, operands: Operands, opset: int, outputs: int, attributes: dict[str, Any]) -> onnx.ModelProto:
    """A model of one operator: its first operand is the input, the others are initializers, None is left out."""
    names = ["" if operand is None else f"operand_{index}" for index, operand in enumerate(operands)]
    results = [f"result_{index}" for index in range(outputs)]
    first = operands[0]
    assert first is not None
    kind = helper.np_dtype_to_tensor_dtype(first.dtype)
    graph = helper.make_graph(
        [helper.make_node(op, names, results, name="the node", **attributes)],
        "graph",
        [helper.make_tensor_value_info(names[0], kind, first.shape)],
        [onnx.ValueInfoProto(name=name) for name in results],
        [numpy_helper.from_array(x, name) for x, name in zip(operands, names, strict=True) if x is not None][1:],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model, strict_mode=True)


def find(model: onnx.ModelProto) -> registry.Operator:
    """The operator of a model's first node."""
    return registry.find(model.graph.node[0], registry.Onnx2Torch(model.graph), model.opset_import[0].version)


def check(
    op: str, operands: Operands, *, opset: int = 17, outputs: int = 1, tolerance: float = 1e-6, **attributes: Any
) -> None:
    """The operator equals onnxruntime: values to `tolerance` of the largest, shapes and types exactly.

    Static operands are given as tensors, as if they were computed, and as the plain numbers that constants become.
    """
    model = single(op, operands, opset, outputs, attributes)
    assert operands[0] is not None
    expected = Session(model.SerializeToString(), optimise=False).run(operands[0])
    found = find(model)
    tensors = [None if x is None else torch.from_numpy(np.array(x)) for x in operands]
    numbers = [x.tolist() if x is not None and i in found.static else x for i, x in enumerate(tensors)]
    for given in (tensors, numbers):
        result = found.body(*given)
        results = result if isinstance(result, (tuple, list)) else (result,)
        assert len(results) == len(expected)
        for actual, wanted in zip(results, expected, strict=True):
            assert_close(actual.numpy(), wanted, tolerance)


def ints(*values: int) -> Array:
    return np.array(values, np.int64)
