"""Every operator of the own table against onnxruntime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from converters.errors import UnsupportedOperatorError
from converters.ops import registry
from converters.ops.layers import batch_normalization, conv
from converters.runtime import Session
from tests.converters.oracle import Array, assert_close, check, find, ints, single
from tests.models import random

QUICK = settings(max_examples=15, deadline=None, derandomize=True)


@given(data=st.data(), rank=st.sampled_from([1, 2, 2, 3]), pad=st.sampled_from(["pads", "none", "VALID", "NOTSET"]))
@QUICK
def test_conv(data: st.DataObject, rank: int, pad: str) -> None:
    groups = data.draw(st.sampled_from([1, 2, 4]))
    sizes = st.lists(st.integers(1, 3), min_size=rank, max_size=rank)
    kernel, strides, dilations = data.draw(sizes), data.draw(sizes), data.draw(sizes)
    attributes: dict[str, Any] = {"group": groups, "strides": strides, "dilations": dilations}
    if pad in ("pads", "NOTSET"):
        attributes["pads"] = data.draw(st.lists(st.integers(0, 3), min_size=2 * rank, max_size=2 * rank))
    if pad in ("VALID", "NOTSET"):
        attributes["auto_pad"] = pad
    bias = random(8) if data.draw(st.booleans()) else None
    x = random(2, 4, *[data.draw(st.integers(7, 9)) for _ in range(rank)])
    operands = [x, random(8, 4 // groups, *kernel, seed=1), *([bias] if bias is not None else [])]
    check("Conv", operands, opset=data.draw(st.sampled_from([10, 17, 22])), **attributes)


@given(data=st.data(), auto_pad=st.sampled_from(["SAME_UPPER", "SAME_LOWER"]))
@QUICK
def test_conv_same(data: st.DataObject, auto_pad: str) -> None:
    """Without dilations, which onnxruntime refuses here, and with strides that leave no pixel out.

    Beyond those the formula asks for negative pads, and onnxruntime follows no rule.
    """
    kernel, size = data.draw(st.tuples(*[st.integers(1, 5)] * 2)), data.draw(st.tuples(*[st.integers(1, 9)] * 2))
    strides = [data.draw(st.integers(1, side)) for side in kernel]
    check("Conv", [random(1, 2, *size), random(3, 2, *kernel, seed=1)], auto_pad=auto_pad, strides=strides)


@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER"])
@pytest.mark.parametrize("size", [7, 8])
def test_conv_same_of_a_shortcut(size: int, auto_pad: str) -> None:
    """The 1x1 Conv of stride 2 in a ResNet leaves pixels out, and pads nothing."""
    operands = [random(1, 2, size, size), random(3, 2, 1, 1, seed=1)]
    check("Conv", operands, auto_pad=auto_pad, strides=[2, 2])


@pytest.mark.parametrize("groups", [1, 4])
def test_a_grouped_convolution_stays_in_float32_where_sixteen_bits_are_slow(groups: int) -> None:
    convolve, x, weight = conv({"group": groups}), torch.rand(1, 4, 5, 5), torch.rand(4, 4 // groups, 3, 3)
    bias = torch.rand(4)
    expected = convolve(x, weight, bias)
    with torch.autocast("cpu", torch.bfloat16):
        found = convolve(x.bfloat16(), weight, bias)
    assert found.dtype == (torch.bfloat16 if groups == 1 else torch.float32)
    torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0.02)


@given(data=st.data(), trans_a=st.integers(0, 1), trans_b=st.integers(0, 1))
@QUICK
def test_gemm(data: st.DataObject, trans_a: int, trans_b: int) -> None:
    a, b = random(3, 4), random(4, 5, seed=1)
    c_shape = data.draw(st.sampled_from([None, (), (1,), (5,), (1, 5), (3, 1), (3, 5)]))
    operands = [a.T.copy() if trans_a else a, b.T.copy() if trans_b else b]
    operands += [] if c_shape is None else [np.array(random(*c_shape, seed=2))]
    factors = st.sampled_from([0.0, 0.5, 1.0, -2.0])
    attributes = {"alpha": data.draw(factors), "beta": data.draw(factors), "transA": trans_a, "transB": trans_b}
    opset = data.draw(st.sampled_from([11, 13] if c_shape is None else [7, 9, 11, 13]))
    check("Gemm", operands, opset=opset, **attributes)


@given(rank=st.integers(2, 4), epsilon=st.sampled_from([None, 1e-5, 1e-2]), opset=st.sampled_from([7, 9, 14, 15, 21]))
@QUICK
def test_batch_normalization(rank: int, epsilon: float | None, opset: int) -> None:
    vectors = [random(3, seed=seed) for seed in range(1, 4)]
    operands = [random(2, 3, *[4] * (rank - 2)), *vectors, random(3, seed=4) ** 2 + 0.01]
    check("BatchNormalization", operands, opset=opset, **({} if epsilon is None else {"epsilon": epsilon}))


@pytest.mark.parametrize("trained", [False, True])
def test_batch_normalization_follows_operands_that_change(trained: bool) -> None:
    """What it multiplies with and adds is kept between calls, and must not be that of earlier operands."""
    normalise = batch_normalization({})
    x, scale, bias, mean, variance = (torch.rand(4, 3, 2, 2), *torch.rand(4, 3).add(0.1))
    if trained:
        scale.requires_grad_(True)

    def assert_right() -> None:
        for _ in range(2):
            expected = F.batch_norm(x, mean, variance, scale, bias, eps=1e-5)
            torch.testing.assert_close(normalise(x, scale, bias, mean, variance), expected)

    assert_right()
    for operand in (scale, bias, mean, variance):
        with torch.no_grad():
            operand.mul_(2)
        assert_right()
    for replaced in range(4):
        scale, bias, mean, variance = (
            operand.detach() * 3 if index == replaced else operand
            for index, operand in enumerate((scale, bias, mean, variance))
        )
        assert_right()
    if trained:
        scale = scale.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(normalise(x, scale, bias, mean, variance).sum(), scale)
        assert bool(gradient.any())


REDUCTIONS = {
    "ReduceMean": [18],
    "ReduceMax": [18, 20],
    "ReduceMin": [18, 20],
    "ReduceSumSquare": [18],
    "ReduceL1": [1, 11, 13, 18],
    "ReduceL2": [1, 11, 13, 18],
}


@pytest.mark.parametrize("op", REDUCTIONS)
@given(
    data=st.data(),
    axes=st.sampled_from([None, [], [0], [1], [-1], [2, 3], [-1, -2], [0, 2], [0, 1, 2, 3]]),
    keep=st.sampled_from([None, 0, 1]),
)
@QUICK
def test_reduction(op: str, data: st.DataObject, axes: list[int] | None, keep: int | None) -> None:
    opset = data.draw(st.sampled_from(REDUCTIONS[op]))
    attributes: dict[str, Any] = {} if keep is None else {"keepdims": keep}
    operands: list[Array | None] = [random(2, 3, 4, 5)]
    if opset >= 18:
        operands += [] if axes is None else [ints(*axes)]
    else:
        attributes |= {"axes": axes} if axes else {}
    check(op, operands, opset=opset, **attributes)


@pytest.mark.parametrize("op", REDUCTIONS)
@pytest.mark.parametrize("noop", [0, 1])
@pytest.mark.parametrize("axes", [[], [ints()], [ints(1, 2)]], ids=["absent", "empty", "two"])
def test_reduction_without_axes(op: str, noop: int, axes: list[Array]) -> None:
    """Nothing is reduced over no axes, but what is summed is squared, or made positive, all the same."""
    check(op, [random(2, 3, 4), *axes], opset=18, noop_with_empty_axes=noop)


def check_pad(data: st.DataObject, mode: str, axes: list[int] | None, rank: int) -> None:
    """Pads of up to 2 (for a constant also -1) on sizes of 4; the axes counted from either end."""
    count = rank if axes is None else len(axes)
    pads = data.draw(st.lists(st.integers(-1 if mode == "constant" else 0, 2), min_size=2 * count, max_size=2 * count))
    value = data.draw(st.sampled_from([None, np.array(2.5, np.float32)])) if mode == "constant" else None
    listed = None if axes is None else ints(*[axis - data.draw(st.sampled_from([0, rank])) for axis in axes])
    opset = data.draw(st.sampled_from([19, 21, 23, 24, 25] if mode == "wrap" else [18, 19, 21, 23, 24, 25]))
    operands = [random(*[4] * rank), ints(*pads), value, listed]
    while operands[-1] is None:
        operands.pop()
    check("Pad", operands, opset=opset, tolerance=0, mode=mode)


@given(data=st.data(), mode=st.sampled_from(["reflect", "edge", "wrap"]))
@QUICK
def test_pad_of_an_image(data: st.DataObject, mode: str) -> None:
    check_pad(data, mode, data.draw(st.sampled_from([[2], [3], [2, 3], [3, 2]])), 4)


@given(data=st.data(), rank=st.integers(1, 4))
@QUICK
def test_pad_with_a_constant(data: st.DataObject, rank: int) -> None:
    axes = data.draw(st.none() | st.lists(st.integers(0, rank - 1), min_size=1, max_size=rank, unique=True))
    check_pad(data, "constant", axes, rank)


def test_pad_value_in_a_row_of_one() -> None:
    """onnxruntime takes that for a scalar, and so do exporters."""
    check("Pad", [random(2, 2), ints(0, 1, 1, 0), np.array([2.5], np.float32)], opset=18, tolerance=0)


@pytest.mark.parametrize("mode", ["reflect", "edge", "wrap"])
@pytest.mark.parametrize(("rank", "axis"), [(4, 1), (2, 1)])
def test_pad_of_any_axis(rank: int, axis: int, mode: str) -> None:
    """Also of channels, and of a row of features."""
    check("Pad", [random(*[4] * rank), ints(1, 2), None, ints(axis)], opset=19, tolerance=0, mode=mode)


@given(data=st.data(), opset=st.sampled_from([13, 18]), size=st.integers(1, 9), axis=st.sampled_from([0, 1, -1]))
@QUICK
def test_split_in_sizes(data: st.DataObject, opset: int, size: int, axis: int) -> None:
    shape, first = [3, 3], data.draw(st.integers(0, size))
    shape[axis] = size
    check("Split", [random(*shape), ints(first, size - first)], opset=opset, outputs=2, tolerance=0, axis=axis)


@pytest.mark.parametrize(("size", "parts"), [(4, 1), (4, 2), (5, 2), (7, 3), (7, 4), (9, 5)])
def test_split_in_parts(size: int, parts: int) -> None:
    """The last part is the smaller one; onnxruntime refuses one of nothing."""
    check("Split", [random(3, size)], opset=18, outputs=parts, tolerance=0, axis=1, num_outputs=parts)


def test_split_13_in_equal_parts() -> None:
    """Before opset 18 the number of outputs says how many."""
    check("Split", [random(3, 6)], opset=13, outputs=3, tolerance=0, axis=1)


RESHAPES = [((4, 6), 0), ((0, -1), 0), ((0, 0, 2, 2), 0), ((-1,), 0), ((2, -1, 3), 0), ((2, 12), 1), ((-1, 4), 1)]


@pytest.mark.parametrize("opset", [5, 13, 14, 19, 21, 23, 24, 25])
@pytest.mark.parametrize(("shape", "allow_zero"), RESHAPES)
def test_reshape(shape: tuple[int, ...], allow_zero: int, opset: int) -> None:
    attributes = {"allowzero": allow_zero} if opset >= 14 else {}
    check("Reshape", [random(2, 3, 4), ints(*shape)], opset=opset, tolerance=0, **attributes)


def test_reshape_to_nothing() -> None:
    check("Reshape", [random(0, 3), ints(3, 0)], opset=14, allowzero=1)
    check("Reshape", [random(0, 3), ints(0, 3)], opset=14, allowzero=0)


@pytest.mark.parametrize("opset", [11, 12, 13])
@pytest.mark.parametrize("low", [None, -0.5, 0.5])
@pytest.mark.parametrize("high", [None, -0.3, 0.7])
def test_clip(low: float | None, high: float | None, opset: int) -> None:
    """Bounds are absent or operands, also low above high, where the high one wins."""
    bounds = [None if bound is None else np.array(bound, np.float32) for bound in (low, high)]
    operands: list[Array | None] = [random(3, 4), *bounds]
    while operands[-1] is None:
        operands.pop()
    check("Clip", operands, opset=opset, tolerance=0)


CASTS = {TensorProto.INT64: 19, TensorProto.INT32: 13, TensorProto.BOOL: 9, TensorProto.DOUBLE: 6}


@pytest.mark.parametrize(("to", "opset"), [*CASTS.items(), (TensorProto.FLOAT16, 21), (TensorProto.UINT8, 25)])
def test_cast(to: int, opset: int) -> None:
    x = np.array([0.0, 0.4, 1.0, 1.6, 2.5], np.float32)
    check("Cast", [x], opset=opset, tolerance=0, to=to)
    like = np.zeros(1, helper.tensor_dtype_to_np_dtype(to))
    check("CastLike", [x, like], opset=max(opset, 15), tolerance=0)


def test_cast_to_bfloat16() -> None:
    """Exporters write it for models trained in it; numpy has no such type of its own."""
    model = single("Cast", [random(3)], 17, 1, {"to": TensorProto.BFLOAT16})
    assert find(model).body(torch.rand(3)).dtype == torch.bfloat16


def test_cast_to_text_is_refused() -> None:
    with pytest.raises(UnsupportedOperatorError, match=r"the node.*ai\.onnx\.Cast, opset 17"):
        find(single("Cast", [random(3)], 17, 1, {"to": TensorProto.STRING}))


@pytest.mark.parametrize("attributes", [{}, {"approximate": "none"}, {"approximate": "tanh"}])
def test_gelu(attributes: dict[str, str]) -> None:
    check("Gelu", [3 * random(4, 5)], opset=20, **attributes)


@pytest.mark.parametrize(
    "attributes",
    [
        {"value": numpy_helper.from_array(random(2, 3))},
        {"value_float": 0.5},
        {"value_floats": [0.5, 1.5]},
        {"value_int": 3},
        {"value_ints": [3, 4, 5]},
    ],
    ids=lambda attributes: next(iter(attributes)),
)
def test_constant(attributes: dict[str, Any]) -> None:
    entry = helper.make_node("Constant", [], ["c"], **attributes)
    inputs, outputs = [helper.make_tensor_value_info("x", 1, [1])], [onnx.ValueInfoProto(name="c")]
    graph = helper.make_graph([entry, helper.make_node("Relu", ["x"], ["y"])], "graph", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    model = onnx.shape_inference.infer_shapes(model)
    (expected,) = Session(model.SerializeToString()).run(np.zeros(1, np.float32))
    assert_close(find(model).body().numpy(), expected, 0)


OLDER = [
    ("Selu", 6, {}),
    ("Celu", 12, {"alpha": 0.7}),
    ("Mish", 18, {}),
    ("Softsign", 1, {}),
    ("ThresholdedRelu", 10, {"alpha": 0.3}),
    ("Cos", 7, {}),
    ("Sin", 7, {}),
    ("Round", 11, {}),
    ("LpNormalization", 1, {"axis": 1}),
    ("LpPool", 11, {"kernel_shape": [2, 2], "pads": [1, 0, 0, 1]}),
    ("DepthToSpace", 1, {"blocksize": 2}),
    ("DepthToSpace", 11, {"blocksize": 2, "mode": "CRD"}),
    ("SpaceToDepth", 1, {"blocksize": 2}),
    ("Flatten", 9, {"axis": 2}),
    ("Flatten", 11, {"axis": -1}),
    ("ReduceProd", 11, {"axes": [1, 3]}),
    ("ReduceLogSumExp", 13, {"axes": [-1], "keepdims": 0}),
    ("Dropout", 13, {"seed": 3}),
]


@pytest.mark.parametrize(("op", "opset", "attributes"), OLDER, ids=[f"{op}-{opset}" for op, opset, _ in OLDER])
def test_older_versions(op: str, opset: int, attributes: dict[str, Any]) -> None:
    check(op, [random(2, 4, 6, 6)], opset=max(opset, 7), tolerance=1e-5, **attributes)


@pytest.mark.parametrize("opset", [11, 22])
@pytest.mark.parametrize("groups", [1, 2])
def test_conv_transpose(groups: int, opset: int) -> None:
    operands = [random(2, 4, 5, 6), random(4, 6 // groups, 3, 2, seed=1), random(6, seed=2)]
    attributes = {"strides": [2, 3], "pads": [1, 0, 0, 1], "output_padding": [1, 0], "group": groups}
    check("ConvTranspose", operands, opset=opset, tolerance=1e-5, **attributes)


def test_a_cache_of_keys_is_not_a_classifiers() -> None:
    """Past keys and values are those of text that is being written: the operator refuses them, and says so."""
    x = torch.from_numpy(random(1, 2, 3, 4))
    with pytest.raises(NotImplementedError, match="cache"):
        registry._TABLE["", "Attention", 23]({})(x, x, x, None, x, x)
