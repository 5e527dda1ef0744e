"""Every operator that classifiers use against the standard's own cases, and its gradient against finite differences.

The onnx package carries, for each operator at its newest version, models with inputs and expected outputs. Operators
that have changed since opset 25 are held against them at 25: what changed are the admitted types.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from onnx.backend.test.case.node import collect_testcases
from torch import Tensor

from converters.ops import registry
from tests.converters.oracle import Array, assert_close

NAMES = """
    Abs Acos Acosh Add AffineGrid And ArgMax ArgMin Asin Asinh Atan Atanh Attention AveragePool BatchNormalization
    BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Cast CastLike Ceil Celu Clip Col2Im Concat Constant ConstantOfShape Conv
    ConvTranspose Cos Cosh CumSum DepthToSpace Div Dropout Einsum Elu Equal Erf Exp Expand EyeLike Flatten Floor
    Gather GatherElements GatherND Gelu Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool Greater GreaterOrEqual
    GridSample GroupNormalization HardSigmoid HardSwish Hardmax Identity InstanceNormalization IsInf IsNaN LRN
    LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax LpNormalization LpPool MatMul Max MaxPool Mean
    MeanVarianceNormalization Min Mish Mod Mul Neg NonZero Not OneHot Or PRelu Pad Pow RMSNormalization Range
    Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum
    ReduceSumSquare Relu Reshape Resize RotaryEmbedding Round Scatter ScatterElements ScatterND Selu Shape Shrink
    Sigmoid Sign Sin Sinh Size Slice Softmax Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Swish Tan
    Tanh ThresholdedRelu Tile TopK Transpose Trilu Unsqueeze Upsample Where Xor
    """
OPERATORS = set(NAMES.split())
OPSET = 25
VARIADIC = {"Max", "Mean", "Min", "Sum", "Where"}
EXCLUDED = {
    "test_batchnorm_example_training_mode": "inference form by design",
    "test_batchnorm_epsilon_training_mode": "inference form by design",
    "test_col2im_5d": "an image has two dimensions",
    "test_reduce_max_empty_set": "no classifier reduces nothing",
    "test_reduce_max_empty_set_bool": "no classifier reduces nothing",
    "test_reduce_min_empty_set": "no classifier reduces nothing",
    "test_resize_downsample_scales_linear_align_corners": "onnxruntime rounds the length first, as we do",
    "test_resize_downsample_scales_cubic_align_corners": "onnxruntime rounds the length first, as we do",
    "test_reduce_log_sum_exp_empty_set": "no classifier reduces nothing",
    "test_shape_start_greater_than_end": "no classifier asks for the shape of nothing",
    "test_spacetodepth_crd_mode_example": "an attribute newer than opset 25",
}
EXCLUDED |= {
    f"test_training_dropout{end}": "inference form by design" for end in ("", "_mask", "_default", "_default_mask")
}
ATTENTION_OPERANDS = 4  # more are a cache of keys and values, which generators have and classifiers not
UNKNOWN_TYPES = {np.dtype(name) for name in ("uint16", "uint32", "uint64", "float16")}  # torch cannot compute with them
SMOOTH_NAMES = """
    Add Atan Attention AveragePool Celu Col2Im Concat Conv ConvTranspose Cosh CumSum DepthToSpace Div Einsum Elu Erf Exp
    Expand Flatten Gather GatherElements GatherND Gelu Gemm GridSample GroupNormalization HardSigmoid HardSwish
    InstanceNormalization LRN LayerNormalization LeakyRelu LogSoftmax LpNormalization LpPool MatMul MaxPool
    MeanVarianceNormalization Mish Mul PRelu Pad RMSNormalization ReduceL1 ReduceL2 ReduceLogSumExp ReduceMax
    ReduceMean ReduceProd ReduceSumSquare Relu Reshape Resize RotaryEmbedding ScatterElements ScatterND Selu Shrink
    Sigmoid Slice Softmax Softplus Softsign SpaceToDepth Split Squeeze Swish Tanh ThresholdedRelu Tile TopK
    Transpose Unsqueeze
"""
SMOOTH = SMOOTH_NAMES.split()
TOLERANCE = 2e-4  # some expected values are written with four decimals

Case = tuple[onnx.ModelProto, list[Array], list[Array]]


def _cases() -> Iterator[tuple[str, Case]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        collected = collect_testcases(None)
    for case in collected:
        nodes = case.model.graph.node
        if len(nodes) != 1 or nodes[0].domain or nodes[0].op_type not in OPERATORS or case.name in EXCLUDED:
            continue
        if nodes[0].op_type == "Attention" and (len(nodes[0].input) > ATTENTION_OPERANDS or len(nodes[0].output) > 1):
            continue
        inputs, outputs = ([np.asarray(x) if np.isscalar(x) else x for x in data] for data in case.data_sets[0])
        arrays = [*inputs, *outputs]
        if all(isinstance(x, np.ndarray) and x.dtype.kind in "biuf" and x.dtype not in UNKNOWN_TYPES for x in arrays):
            yield case.name, (case.model, inputs, outputs)


CASES = dict(_cases())


def arrange(case: Case) -> tuple[registry.Operator, dict[str, Tensor], str]:
    """The operator of a case, its operands by name, and the name of the one that is data."""
    model = onnx.ModelProto()
    model.CopyFrom(case[0])
    graph, node = model.graph, model.graph.node[0]
    names = [value.name for value in graph.input]
    values = dict(zip(names, case[1], strict=True))
    data = set(names) if node.op_type in VARIADIC else set(names[:1])
    graph.initializer.extend(numpy_helper.from_array(np.array(x), n) for n, x in values.items() if n not in data)
    kept = [value for value in graph.input if value.name in data]
    del graph.input[:]
    graph.input.extend(kept)
    opset = min(OPSET, next(entry.version for entry in model.opset_import if not entry.domain))
    operator = registry.find(graph.node[0], registry.Onnx2Torch(graph), opset)
    return operator, {name: torch.from_numpy(np.array(x)) for name, x in values.items()}, names[0] if names else ""


def call(operator: registry.Operator, operands: dict[str, Tensor], data: str) -> tuple[Any, ...]:
    """The operator's results, with constant static operands as numbers."""
    arguments: list[Any] = [operands[name] if name else None for name in operator.inputs]
    for index in operator.static:
        if index < len(arguments) and arguments[index] is not None and operator.inputs[index] != data:
            arguments[index] = arguments[index].tolist()
    result = operator.body(*arguments)
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)


@pytest.mark.parametrize("name", CASES)
def test_a_case_of_the_standard(name: str) -> None:
    results = call(*arrange(CASES[name]))
    for actual, expected in zip(results, CASES[name][2], strict=False):  # outputs that no classifier reads are not made
        assert_close(np.asarray(actual), np.asarray(expected), TOLERANCE)


def test_every_operator_has_a_case() -> None:
    assert {case[0].graph.node[0].op_type for case in CASES.values()} >= OPERATORS - {
        "Cast",
        "CastLike",
        "GlobalLpPool",
        "Upsample",
    }


def of_operator(op_type: str) -> list[str]:
    """Up to four cases of an operator with little float data, spread over what its attributes can say."""
    small = [
        name
        for name, (model, inputs, outputs) in CASES.items()
        if model.graph.node[0].op_type == op_type and inputs[0].dtype.kind == "f" and inputs[0].size <= 10_000
    ]
    return sorted(small[:: max(1, len(small) // 4)], key=len)[:4]


@pytest.mark.parametrize("op_type", SMOOTH)
def test_the_gradient_is_that_of_finite_differences(op_type: str) -> None:
    """In double precision, on inputs without ties."""
    names = of_operator(op_type)
    assert names
    for name in names:
        operator, operands, data = arrange(CASES[name])
        operands = {n: x.double() if x.is_floating_point() else x for n, x in operands.items()}
        generator = torch.Generator().manual_seed(0)
        shape = operands[data].shape
        spread = torch.randperm(shape.numel(), generator=generator).reshape(shape).double()
        x = (spread - shape.numel() / 2 + 0.3) / shape.numel() * 4

        def first(x: Tensor, operator: Any = operator, operands: Any = operands, data: str = data) -> Tensor:
            return call(operator, operands | {data: x}, data)[0]

        assert torch.autograd.gradcheck(first, (x.requires_grad_(True),), eps=1e-6, atol=1e-5, fast_mode=True), name
