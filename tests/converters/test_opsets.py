"""Every version of every operator that a file of opset 7 to 25 can mean, against onnxruntime.

A case is one use of an operator; it runs at each version between `since` and `until`, at the least opset from 7 on at
which that version is in force. What has moved from the attributes to the operands stands in `moved` and is given in
the form of the version.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from converters.errors import ModelError
from converters.ops import registry
from converters.runtime import Session
from tests.converters.oracle import Array, Operands, assert_close, check, find, ints, single
from tests.converters.test_standard import OPERATORS
from tests.models import random

OPSETS = range(7, 26)

OPERAND_SINCE = {"Clip": 11, "Pad": 11, "Slice": 10, "Split": 13, "Squeeze": 13, "TopK": 10, "Unsqueeze": 13}
OPERAND_SINCE |= {"ReduceSum": 13, "Upsample": 9}
"""The version from which on what is `moved` is an operand; the other reductions' axes since 18."""


@dataclass(frozen=True)
class Case:
    op: str
    operands: Operands
    attributes: Mapping[str, Any] = field(default_factory=dict)
    moved: Mapping[str, Any] = field(default_factory=dict)
    since: int = 1
    until: int = 99
    outputs: int = 1
    tolerance: float = 1e-6

    def at(self, version: int) -> tuple[Operands, dict[str, Any]]:
        """Operands and attributes in the form of a version."""
        if version < OPERAND_SINCE.get(self.op, 18):
            return self.operands, {**self.attributes, **self.moved}
        more = [as_operand(value) for value in self.moved.values()]
        return [*self.operands, *more], dict(self.attributes)


def as_operand(value: Any) -> Array:
    """Integers in a row, floats as they are."""
    array = np.array(value)
    return np.atleast_1d(array.astype(np.int64)) if array.dtype.kind == "i" else array.astype(np.float32)


def floats(*values: float) -> Array:
    return np.array(values, np.float32)


def bits(*shape: int, seed: int = 0) -> Array:
    return random(*shape, seed=seed) > 0


X, ROW = random(2, 4, 6, 6), random(3, 4)
SMALL, POSITIVE = np.tanh(ROW), np.abs(ROW) + 0.1
INTS = np.arange(-6, 6).reshape(3, 4)
SPECIAL = floats(1, np.inf, -np.inf, np.nan, 0)
VECTORS = [random(4, seed=seed) for seed in range(1, 4)]
AREA = {"kernel_shape": [2, 3], "strides": [2, 1], "pads": [1, 0, 0, 1]}
GRID = np.tanh(random(2, 5, 3, 2, seed=3)) * np.float32(1.2)

EVERYWHERE = """
    Abs Asinh Atan Ceil Cos Cosh Elu Erf Exp Floor HardSigmoid HardSwish Identity LeakyRelu Mish Neg Relu Round Selu
    Sigmoid Sign Sin Sinh Softplus Softsign Celu Swish Tanh Gelu Hardmax LogSoftmax Softmax ThresholdedRelu Shrink
"""
CASES = [
    *(Case(op, [ROW]) for op in EVERYWHERE.split()),
    *(Case(op, [SMALL]) for op in ("Acos", "Asin", "Atanh", "Tan")),
    *(Case(op, [POSITIVE]) for op in ("Log", "Reciprocal", "Sqrt")),
    Case("Acosh", [POSITIVE + 1]),
    *(Case(op, [ROW, random(4, seed=1)]) for op in ("Add", "Sub", "Mul", "Div")),
    *(Case(op, [ROW, random(4, seed=1)]) for op in ("Less", "LessOrEqual", "Greater", "GreaterOrEqual")),
    *(Case(op, [INTS, ints(3, -2, 2, -3)]) for op in ("Add", "Sub", "Mul", "Div", "Equal", "Mod")),
    *(Case(op, [INTS, ints(3, -2, 2, -3)], since=since) for op, since in (("Max", 12), ("Min", 12), ("Less", 9))),
    *(Case(op, [ROW, random(3, 1, seed=1), random(4, seed=2)], since=8) for op in ("Max", "Min", "Mean", "Sum")),
    *(Case(op, [ROW, random(3, 4, seed=1)]) for op in ("Max", "Min", "Mean", "Sum")),
    *(Case(op, [bits(3, 4), bits(4, seed=1)]) for op in ("And", "Or", "Xor", "Equal")),
    *(Case(f"Bitwise{op}", [INTS, ints(1, 2, 3, 4)]) for op in ("And", "Or", "Xor")),
    Case("BitwiseNot", [INTS]),
    Case("Equal", [floats(0, 1, 2), floats(0, 2, 2)], since=11),
    Case("Not", [bits(3, 4)]),
    Case("Where", [bits(3, 1), ROW, random(4, seed=1)]),
    Case("Pow", [POSITIVE, random(4, seed=1)]),
    Case("Pow", [INTS, ints(2)], since=12),
    Case("Pow", [INTS, floats(2)], since=12),
    Case("Mod", [ROW, random(4, seed=1)], {"fmod": 1}),
    Case("PRelu", [X, random(4, 1, 1)]),
    Case("PRelu", [ROW, floats(0.3)]),
    Case("IsNaN", [SPECIAL]),
    Case("IsInf", [SPECIAL]),
    Case("IsInf", [SPECIAL], {"detect_negative": 0}),
    Case("LeakyRelu", [ROW], {"alpha": 0.3}),
    Case("Elu", [ROW], {"alpha": 0.3}),
    Case("Celu", [ROW], {"alpha": 0.3}),
    Case("Selu", [ROW], {"alpha": 1.2, "gamma": 0.7}),
    Case("Gelu", [ROW], {"approximate": "tanh"}),
    Case("Swish", [ROW], {"alpha": 0.7}),
    Case("HardSigmoid", [3 * ROW], {"alpha": 0.3, "beta": 0.4}),
    Case("ThresholdedRelu", [ROW], {"alpha": 0.3}),
    Case("Shrink", [ROW], {"lambd": 0.3, "bias": 0.1}),
    Case("Clip", [ROW]),
    Case("Clip", [ROW], moved={"min": -0.5, "max": 0.5}),
    Case("Clip", [ROW], moved={"min": -0.5}),
    Case("Clip", [INTS, np.array(-2), np.array(3)], since=12),
    Case("Dropout", [ROW], since=12),
    Case("Dropout", [ROW], {"ratio": 0.3}, until=10),
    Case("Cast", [ROW], {"to": TensorProto.INT32}),
    Case("Cast", [ROW], {"to": TensorProto.DOUBLE}),
    Case("Cast", [np.abs(INTS)], {"to": TensorProto.UINT16}),
    Case("Cast", [bits(4)], {"to": TensorProto.FLOAT}),
    Case("CastLike", [ROW, ints(1)]),
    *(Case(op, [X[..., :2]], {"axis": 2}) for op in ("Softmax", "LogSoftmax", "Hardmax")),
    *(Case(op, [X[..., :2]]) for op in ("Softmax", "LogSoftmax", "Hardmax")),
    *(Case(op, [X], {"axis": -1}, since=11) for op in ("Softmax", "LogSoftmax", "Hardmax")),
    *(Case(op, [X], {"axis": 1, "keepdims": 0}) for op in ("ArgMax", "ArgMin")),
    *(Case(op, [INTS % 3]) for op in ("ArgMax", "ArgMin")),
    *(Case(op, [INTS % 3], {"axis": 1, "select_last_index": 1}, since=12) for op in ("ArgMax", "ArgMin")),
    *(Case(op, [X]) for op in ("ReduceL1", "ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSumSquare")),
    *(Case(op, [X], {"keepdims": 0}, {"axes": [1, 3]}) for op in ("ReduceL1", "ReduceL2", "ReduceMax", "ReduceMean")),
    *(Case(op, [X], {"keepdims": 0}, {"axes": [2]}) for op in ("ReduceMin", "ReduceSumSquare", "ReduceSum")),
    *(Case(op, [X], {}, {"axes": [-1, 1]}, since=11) for op in ("ReduceMean", "ReduceSum", "ReduceMax")),
    *(Case(op, [POSITIVE]) for op in ("ReduceProd", "ReduceSum", "ReduceLogSum", "ReduceLogSumExp")),
    *(Case(op, [POSITIVE], {"keepdims": 0}, {"axes": [1]}) for op in ("ReduceProd", "ReduceLogSum", "ReduceLogSumExp")),
    *(Case(op, [INTS.astype(np.int32)], {}, {"axes": [0]}) for op in ("ReduceSum", "ReduceProd", "ReduceMax")),
    Case("ReduceSum", [ROW], {"noop_with_empty_axes": 1}, since=13),
    Case("TopK", [ROW], {"axis": 1}, {"k": 2}, outputs=2),
    Case("TopK", [INTS % 5, ints(2)], {"axis": 0, "largest": 0}, since=11, outputs=2),
    Case("CumSum", [ROW, np.array(1)]),
    Case("CumSum", [ROW, ints(0)], {"exclusive": 1, "reverse": 1}),
    Case("Shape", [X]),
    Case("Shape", [X], {"start": -3, "end": -1}, since=15),
    Case("Size", [X]),
    Case("Reshape", [X, ints(0, -1, 3)]),
    Case("Reshape", [X, ints(2, 8, 18)], {"allowzero": 1}, since=14),
    Case("Flatten", [X]),
    Case("Flatten", [X], {"axis": 0}),
    Case("Flatten", [X], {"axis": -1}, since=11),
    Case("Squeeze", [random(1, 3, 1, 2)]),
    Case("Squeeze", [random(1, 3, 1, 2)], moved={"axes": [2]}),
    Case("Squeeze", [random(1, 3, 1, 2)], moved={"axes": [-2, 0]}, since=11),
    Case("Unsqueeze", [ROW], moved={"axes": [3, 0]}),
    Case("Unsqueeze", [ROW], moved={"axes": [-1, 1]}, since=11),
    Case("Transpose", [X]),
    Case("Transpose", [X], {"perm": [0, 2, 3, 1]}),
    Case("Expand", [random(3, 1), ints(2, 1, 4)]),
    Case("Tile", [ROW, ints(2, 3)]),
    Case("Concat", [ROW, random(3, 2)], {"axis": 1}),
    Case("Concat", [ROW, random(1, 4), ROW], {"axis": -2}, since=11),
    Case("Split", [random(3, 6)], {"axis": 1}, {"split": [1, 3, 2]}, outputs=3),
    Case("Split", [random(6, 3)], outputs=3, until=17),
    Case("Split", [random(7, 3)], {"num_outputs": 3}, outputs=3, since=18),
    Case("Slice", [X], moved={"starts": [1, -3], "ends": [3, 9], "axes": [1, 3]}),
    Case("Slice", [X], moved={"starts": [0, 1], "ends": [-1, 2]}),
    Case("Slice", [X, ints(5, -1), ints(-9, 1), ints(2, 3), ints(-2, -1)], since=10),
    Case("Pad", [X], moved={"pads": [0, 0, 1, 2, 0, 0, 0, 3]}),
    Case("Pad", [X], moved={"pads": [0, 1, 1, -2, 0, 0, -1, 3], "value": 0.5}),
    *(Case("Pad", [X], {"mode": mode}, {"pads": [0, 0, 1, 2, 0, 0, 0, 3]}) for mode in ("edge", "reflect")),
    Case("Pad", [X, ints(1, 2), None, ints(3)], {"mode": "wrap"}, since=19),
    Case("ConstantOfShape", [ints(2, 3)]),
    Case("ConstantOfShape", [ints(2, 3)], {"value": numpy_helper.from_array(ints(7))}),
    Case("Range", [np.array(1), np.array(8), np.array(3)]),
    Case("Range", [np.array(x, np.float32) for x in (3, -1, -0.75)]),
    Case("EyeLike", [ROW]),
    Case("EyeLike", [ROW], {"k": 1, "dtype": TensorProto.INT64}),
    Case("DepthToSpace", [X], {"blocksize": 2}),
    Case("DepthToSpace", [X], {"blocksize": 2, "mode": "CRD"}, since=11),
    Case("SpaceToDepth", [X], {"blocksize": 3}),
    Case("Einsum", [ROW, random(4, 2)], {"equation": "ij,jk->ki"}),
    Case("Trilu", [X]),
    Case("Trilu", [X, np.array(-1)], {"upper": 0}),
    Case("Gather", [X, np.array(2)], {"axis": 1}),
    Case("Gather", [X, ints(3, 0, 1).reshape(3, 1)], {"axis": 2}),
    Case("Gather", [X, ints(-1, 0)], {"axis": -1}, since=11),
    Case("GatherElements", [ROW, ints(0, 2, 1, 0).reshape(1, 4)]),
    Case("GatherElements", [ROW, ints(-1, 2, 0, 1, 3, -4).reshape(3, 2)], {"axis": 1}),
    Case("GatherND", [X, ints(0, 1, 1, -1).reshape(2, 2)]),
    Case("GatherND", [X, ints(1, 3).reshape(2, 1)], {"batch_dims": 1}, since=12),
    *(Case(op, [ROW, ints(1, 0, 2, 1).reshape(1, 4), random(1, 4)]) for op in ("Scatter", "ScatterElements")),
    Case("ScatterElements", [ROW, ints(-1, 0, 2).reshape(3, 1), random(3, 1)], {"axis": 1}),
    *(
        Case("ScatterElements", [ROW, ints(1, 1, 2, 1).reshape(1, 4), random(1, 4)], {"reduction": r}, since=since)
        for r, since in (("add", 16), ("mul", 16), ("max", 18), ("min", 18))
    ),
    Case("ScatterND", [ROW, ints(2, 0).reshape(2, 1), random(2, 4)]),
    *(
        Case("ScatterND", [ROW, ints(2, 2).reshape(2, 1), random(2, 4)], {"reduction": r}, since=since)
        for r, since in (("add", 16), ("mul", 16), ("max", 18), ("min", 18))
    ),
    Case("NonZero", [np.round(ROW)]),
    Case("OneHot", [ints(0, 2, -1, 5), np.array(4), floats(-1, 3)]),
    Case("OneHot", [ints(0, 2, 1), ints(3), floats(0, 1)], {"axis": 0}),
    *(Case("GridSample", [X, GRID], {"padding_mode": p}) for p in ("zeros", "border", "reflection")),
    *(Case("GridSample", [X, GRID], {"mode": m}, until=16) for m in ("bilinear", "nearest", "bicubic")),
    *(Case("GridSample", [X, GRID], {"mode": m, "align_corners": 1}, since=20) for m in ("linear", "nearest", "cubic")),
    Case("Conv", [X, random(6, 2, 3, 2), random(6)], {"group": 2, "pads": [1, 0, 0, 1], "dilations": [1, 2]}),
    Case("ConvTranspose", [X, random(4, 3, 3, 2), random(6)], {"group": 2, "strides": [2, 1]}, tolerance=2e-6),
    Case("Col2Im", [random(2, 12, 20), ints(5, 6), ints(2, 2)]),
    Case("Col2Im", [random(2, 12, 15), ints(5, 6), ints(2, 2)], {"pads": [1, 0, 0, 1], "strides": [1, 2]}),
    Case("Gemm", [ROW, random(4, 5), random(3, 1)], {"alpha": 0.5, "beta": 2.0}),
    Case("Gemm", [ROW, random(5, 4), random(5)], {"transB": 1}),
    Case("Gemm", [ROW, random(5, 4)], {"transB": 1}, since=11),
    Case("MatMul", [X, random(6, 5)]),
    Case("BatchNormalization", [X, *VECTORS, POSITIVE[0]]),
    Case("BatchNormalization", [X, *[random(4, 6, 6, seed=s) for s in (1, 2, 3)], X[0] ** 2], {"spatial": 0}, until=7),
    *(Case(op, [X], AREA) for op in ("AveragePool", "MaxPool", "LpPool")),
    *(Case(op, [X], {**AREA, "ceil_mode": 1}, since=10) for op in ("AveragePool", "MaxPool")),
    Case("AveragePool", [X], {**AREA, "count_include_pad": 1}),
    Case("MaxPool", [X], {**AREA, "dilations": [2, 2]}, since=10),
    *(Case(op, [X]) for op in ("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")),
    *(Case("Upsample", [X], {"mode": mode}, {"scales": [1.0, 1.0, 2.0, 3.0]}) for mode in ("nearest", "linear")),
    *(Case("Resize", [X, floats(1, 1, 2, 3)], {"mode": mode}, until=10) for mode in ("nearest", "linear")),
    *(Case("Resize", [X, None, floats(1, 1, 2, 1.5)], {"mode": mode}, since=13) for mode in ("linear", "cubic")),
    Case("Resize", [X, floats(), floats(), ints(2, 4, 3, 12)], {"mode": "linear"}, since=11),
    Case("LayerNormalization", [X, random(6), random(6)], outputs=3),
    Case("LayerNormalization", [X, random(6, 6)], {"axis": 2, "epsilon": 0.1}),
    Case("InstanceNormalization", [X, *VECTORS[:2]], {"epsilon": 0.1}),
    Case("InstanceNormalization", [X[..., :1, :1], *VECTORS[:2]], {"epsilon": 0.1}),
    Case("GroupNormalization", [X, random(2), random(2)], {"num_groups": 2}, until=18),
    Case("GroupNormalization", [X, *VECTORS[:2]], {"num_groups": 2}, since=21),
    Case("MeanVarianceNormalization", [X], until=9),  # at 13, the onnx package cannot infer its shape without axes
    Case("MeanVarianceNormalization", [X], {"axes": [1, 3]}),
    Case("RMSNormalization", [X, random(6)]),
    *(Case("LpNormalization", [X], {"axis": 1, "p": p}) for p in (1, 2)),
    Case("LRN", [X], {"size": 3, "alpha": 0.5, "beta": 0.6, "bias": 2.0}),
    Case("Attention", [random(2, 3, 8), random(2, 5, 8), random(2, 5, 8)], {"q_num_heads": 2, "kv_num_heads": 2}),
    Case("Attention", [random(2, 2, 3, 4)] * 3, {"is_causal": 1, "scale": 0.3}),
    Case("RotaryEmbedding", [random(2, 3, 5, 8), random(2, 5, 4), random(2, 5, 4, seed=1)]),
    Case("RotaryEmbedding", [random(2, 3, 5, 8), random(2, 5, 4), random(2, 5, 4, seed=1)], {"interleaved": 1}),
    Case(
        "RotaryEmbedding",
        [random(2, 5, 24), random(9, 2), random(9, 2, seed=1), ints(*range(10)).reshape(2, 5) % 9],
        {"num_heads": 3, "rotary_embedding_dim": 4},
    ),
    *(Case("AffineGrid", [random(2, 2, 3), ints(2, 4, 3, 5)], {"align_corners": corners}) for corners in (0, 1)),
]
APART = {"Constant", "DequantizeLinear", "QuantizeLinear"}
"""Operators that need more than a case: no operand, or results in another type."""

NO_KERNEL = {("GlobalLpPool", 22): "onnxruntime has it up to version 2"}
"""Versions that onnxruntime does not run; they are held against the version before, which means the same."""


def opset_of(op: str) -> dict[int, int]:
    """Each version of an operator that is in force between opset 7 and 25, with the least such opset."""
    found: dict[int, int] = {}
    for opset in OPSETS:
        try:
            schema = onnx.defs.get_schema(op, max_inclusive_version=opset, domain="")
        except onnx.defs.SchemaError:  # not yet
            continue
        if not schema.deprecated:
            found.setdefault(schema.since_version, opset)
    return found


RUNS = {
    f"{case.op}-{version}-{index}": (case, version, opset)
    for index, case in enumerate(CASES)
    for version, opset in opset_of(case.op).items()
    if case.since <= version <= case.until
}


def test_every_version_of_every_operator_runs() -> None:
    """Of the operators in the table, and of those that the standard's cases are about."""
    operators = {name for _, name, _ in registry._TABLE} | OPERATORS
    wanted = {(op, version) for op in operators - APART for version in opset_of(op)}
    assert {(case.op, version) for case, version, _ in RUNS.values()} == wanted


@pytest.mark.parametrize("run", RUNS)
def test_a_version(run: str) -> None:
    case, version, opset = RUNS[run]
    operands, attributes = case.at(version)
    if (case.op, version) in NO_KERNEL:
        check_by_the_version_before(case, version)
    else:
        check(case.op, operands, opset=opset, outputs=case.outputs, tolerance=case.tolerance, **attributes)


def check_by_the_version_before(case: Case, version: int) -> None:
    operands, attributes = case.at(version)
    opsets = opset_of(case.op)
    model = single(case.op, operands, opsets[version], 1, attributes)
    with pytest.raises(ModelError, match="Could not find an implementation"):
        Session(model.SerializeToString())
    older = single(case.op, operands, opsets[max(v for v in opsets if v < version)], 1, attributes)
    assert operands[0] is not None
    (expected,) = Session(older.SerializeToString()).run(operands[0])
    actual = find(model).body(*[torch.from_numpy(np.array(x)) for x in operands])
    assert_close(actual.numpy(), expected, case.tolerance)


CONSTANTS: list[tuple[int, dict[str, Any]]] = [
    *((1, {"value": numpy_helper.from_array(x)}) for x in (ROW, INTS, bits(3))),
    *((12, form) for form in ({"value_float": 0.5}, {"value_floats": [0.5, 1.5]})),
    *((12, form) for form in ({"value_int": 3}, {"value_ints": [3, 4]})),
]


@pytest.mark.parametrize("version", opset_of("Constant"))
def test_constant(version: int) -> None:
    for since, form in CONSTANTS:
        if version >= since:
            model = constant(opset_of("Constant")[version], form)
            (expected,) = Session(model.SerializeToString()).run(floats(0))
            assert_close(find(model).body().numpy(), expected, 0)


def constant(opset: int, form: dict[str, Any]) -> onnx.ModelProto:
    """A model whose first node is a Constant, and its output."""
    nodes = [helper.make_node("Constant", [], ["c"], **form), helper.make_node("Relu", ["x"], ["y"])]
    inputs, outputs = [helper.make_tensor_value_info("x", 1, [1])], [onnx.ValueInfoProto(name="c")]
    graph = helper.make_graph(nodes, "graph", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    return onnx.shape_inference.infer_shapes(model)


@pytest.mark.parametrize("opset", [7, 10, 12])
def test_dropout_with_a_mask(opset: int) -> None:
    """Exporters name the mask, which nothing reads and which is not computed."""
    model = single("Dropout", [ROW], opset, 2, {})
    expected = Session(model.SerializeToString(), optimise=False).run(ROW)
    assert_close(find(model).body(torch.from_numpy(ROW)).numpy(), expected[0], 0)
