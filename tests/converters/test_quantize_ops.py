"""QuantizeLinear and DequantizeLinear: values are those of onnxruntime, gradients those of fake quantization."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from converters.errors import UnsupportedOperatorError
from converters.ops import registry
from converters.runtime import Session
from tests.converters.oracle import Array, assert_close, check, find, single
from tests.converters.test_opsets import opset_of
from tests.models import random

QUICK = settings(max_examples=25, deadline=None, derandomize=True)
VERSIONS = opset_of("QuantizeLinear")
TYPES = [(kind, version) for kind in (None, np.uint8, np.int8) for version in VERSIONS]
TYPES += [(kind, version) for kind in (np.uint16, np.int16) for version in VERSIONS if version >= 21]
NARROW = (TensorProto.INT4, TensorProto.UINT4)
IMAGE = random(2, 6, 5)
TIES = np.array([-np.inf, -70, -1.5, -0.5, -0.25, 0, 0.25, 0.5, 0.75, 1.5, 2.5, 200, np.inf], np.float32)


def tensor(x: Array | None) -> Tensor | None:
    return None if x is None else torch.from_numpy(np.array(x))


def check_pair(
    x: Array, scale: Array, zero: Array | None, version: int, *, output_dtype: int | None = None, **attributes: Any
) -> None:
    """Quantized and back: both values are onnxruntime's, the whole numbers (which numpy has from 8 bits) as floats."""
    names = ["scale"] if zero is None else ["scale", "zero"]
    wanted = {} if output_dtype is None else {"output_dtype": output_dtype}
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", *names], ["q"], **attributes, **wanted),
            helper.make_node("DequantizeLinear", ["q", *names], ["y"], **attributes),
        ],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [onnx.ValueInfoProto(name=name) for name in (["y"] if output_dtype in NARROW else ["y", "q"])],
        [numpy_helper.from_array(np.array(v), n) for v, n in ((scale, "scale"), (zero, "zero")) if v is not None],
    )
    opset = helper.make_opsetid("", opset_of("QuantizeLinear")[version])
    model = onnx.shape_inference.infer_shapes(helper.make_model(graph, opset_imports=[opset], ir_version=10))
    real, *whole = Session(model.SerializeToString(), optimise=False).run(x)
    parameters = [tensor(scale), tensor(zero)]
    q = registry._TABLE["", "QuantizeLinear", version](attributes | wanted)(tensor(x), *parameters)
    y = registry._TABLE["", "DequantizeLinear", version](attributes)(q, *parameters)
    assert_close(y.numpy(), real, 0)
    for expected in whole:
        assert_close(q.numpy(), np.asarray(expected).astype(np.float32), 0)


@pytest.mark.parametrize(("kind", "version"), TYPES)
def test_per_tensor(kind: Any, version: int) -> None:
    """Halves are rounded to even, and what is too large saturates, the infinite too."""
    check_pair(TIES, np.float32(0.5), None if kind is None else np.array(3, kind), version)


@pytest.mark.parametrize("version", [version for version in VERSIONS if version >= 13])
@given(data=st.data())
@QUICK
def test_per_axis(version: int, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from([np.uint8, np.int8]))
    axis = data.draw(st.integers(-3, 2))
    length = IMAGE.shape[axis]
    zero = np.array(data.draw(st.lists(st.integers(0, 127), min_size=length, max_size=length)), kind)
    scale = np.abs(random(length, seed=1)) / 50 + np.float32(0.001)
    check_pair(IMAGE, scale, data.draw(st.sampled_from([zero, None])), version, axis=axis)


def test_axis_left_out_is_the_channels() -> None:
    check_pair(IMAGE, np.abs(random(6, seed=1)), np.arange(6, dtype=np.uint8), 13)


@pytest.mark.parametrize("version", [version for version in VERSIONS if version >= 21])
@given(data=st.data(), axis=st.integers(-3, 2), block=st.integers(2, 4))
@QUICK
def test_in_blocks(version: int, data: st.DataObject, axis: int, block: int) -> None:
    """The last block may be a shorter one."""
    shape = list(IMAGE.shape)
    shape[axis] = -(-shape[axis] // block)
    scale = np.abs(random(*shape, seed=1)) / 50 + np.float32(0.001)
    zero = np.round(random(*shape, seed=2) * 9).astype(data.draw(st.sampled_from([np.int8, np.int16])))
    check_pair(IMAGE, scale, zero, version, axis=axis, block_size=block)


@pytest.mark.parametrize("version", [version for version in VERSIONS if version >= 21])
@pytest.mark.parametrize("kind", ["UINT16", "INT16", "UINT8", "INT8", "UINT4", "INT4"])
def test_output_type_without_a_zero_point(kind: str, version: int) -> None:
    """Of what is finite: with 4 bits, onnxruntime makes 0 of infinity."""
    check_pair(TIES[np.isfinite(TIES)], np.float32(0.25), None, version, output_dtype=getattr(TensorProto, kind))


def test_output_type_of_floats_is_refused() -> None:
    model = single("QuantizeLinear", [TIES, np.float32(1)], 21, 1, {"output_dtype": TensorProto.FLOAT8E4M3FN})
    with pytest.raises(UnsupportedOperatorError, match="FLOAT8E4M3FN"):
        find(model)


@pytest.mark.parametrize("version", opset_of("DequantizeLinear"))
@pytest.mark.parametrize("kind", [np.uint8, np.int8, np.int32])
def test_integers_are_dequantized(kind: Any, version: int) -> None:
    """Of 32 bits, those of a bias, no zero point."""
    q = np.array([0, 3, 100, 127], kind)
    operands = [q, np.float32(0.1), *([] if kind is np.int32 else [np.array(7, kind)])]
    check("DequantizeLinear", operands, opset=opset_of("DequantizeLinear")[version], tolerance=0)


def test_large_integers_are_dequantized() -> None:
    q = np.array([-(2**31), 2**31 - 1, 2**24 + 1], np.int32)
    check("DequantizeLinear", [q, np.float32(0.1)], opset=13, tolerance=0)


@pytest.mark.parametrize(("low", "high", "kind"), [(0, 255, torch.uint8), (-128, 127, torch.int8)])
@pytest.mark.parametrize("zero", [0, 40])
def test_gradient_is_that_of_fake_quantization(low: int, high: int, kind: torch.dtype, zero: int) -> None:
    """It passes where nothing is clipped and nowhere else; to the scale, the error or the limit in steps."""
    x = (20 * torch.randn(500, generator=torch.Generator().manual_seed(0))).requires_grad_()
    scale, towards = torch.tensor(0.13, requires_grad=True), torch.linspace(-1, 1, 500)
    point = torch.tensor(zero, dtype=kind)
    q = registry._TABLE["", "QuantizeLinear", 13]({})(x, scale, point)
    y = registry._TABLE["", "DequantizeLinear", 13]({})(q, scale, point)
    to_x, to_scale = torch.autograd.grad(y @ towards, [x, scale])
    fake = torch.fake_quantize_per_tensor_affine(x, 0.13, zero, low, high)
    (expected,) = torch.autograd.grad(fake @ towards, [x])
    torch.testing.assert_close(y, fake, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(to_x, expected, rtol=1e-6, atol=1e-6)
    exact = (x / scale).detach()
    inside = (exact.round() + zero).clamp(low, high) == exact.round() + zero
    assert 0.1 < inside.float().mean() < 0.9
    steps = torch.where(inside, exact.round() - exact, (exact.round() + zero).clamp(low, high) - zero)
    torch.testing.assert_close(to_scale, steps @ towards, rtol=1e-5, atol=1e-5)


def test_gradient_of_what_is_infinite_is_nothing() -> None:
    x = torch.tensor([torch.inf, -torch.inf, 0.3], requires_grad=True)
    q = registry._TABLE["", "QuantizeLinear", 13]({})(x, torch.tensor(0.5))
    q.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 0, 2]
