"""Pooling against onnxruntime: windows, padding that counts or does not, and what ceil_mode adds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from converters.ops import registry
from tests import models
from tests.converters.oracle import check
from tests.models import random

QUICK = settings(max_examples=30, deadline=None, derandomize=True)


@given(data=st.data(), rank=st.integers(1, 3), ceil=st.sampled_from([0, 1]), count=st.sampled_from([0, 1]))
@QUICK
def test_average_pool(data: st.DataObject, rank: int, ceil: int, count: int) -> None:
    """Pads are smaller than the window, as onnxruntime asks."""
    kernel = [data.draw(st.integers(1, 4)) for _ in range(rank)]
    strides = [data.draw(st.integers(1, 3)) for _ in range(rank)]
    pads = [data.draw(st.integers(0, side - 1)) for side in kernel * 2]
    sizes = [data.draw(st.integers(4, 9)) for _ in range(rank)]
    opset = data.draw(st.sampled_from([10, 11, 17, 19, 21, 22]))
    attributes = {"kernel_shape": kernel, "strides": strides, "pads": pads, "ceil_mode": ceil}
    check("AveragePool", [random(2, 3, *sizes)], opset=opset, count_include_pad=count, **attributes)


@given(data=st.data(), auto_pad=st.sampled_from(["SAME_UPPER", "SAME_LOWER", "VALID"]), count=st.sampled_from([0, 1]))
@QUICK
def test_average_pool_with_auto_pad(data: st.DataObject, auto_pad: str, count: int) -> None:
    kernel = data.draw(st.tuples(*[st.integers(1, 4)] * 2))
    strides = [data.draw(st.integers(1, side)) for side in kernel]
    sizes = data.draw(st.tuples(*[st.integers(4, 9)] * 2))
    assume(count == 0 or auto_pad == "VALID")
    attributes: dict[str, Any] = {"kernel_shape": kernel, "strides": strides, "auto_pad": auto_pad}
    check("AveragePool", [random(1, 2, *sizes)], count_include_pad=count, **attributes)


@given(data=st.data(), op=st.sampled_from(["MaxPool", "AveragePool"]), ceil=st.sampled_from([0, 1]))
@QUICK
def test_dilated_windows(data: st.DataObject, op: str, ceil: int) -> None:
    kernel, strides, dilations = ([data.draw(st.integers(1, 3)) for _ in range(2)] for _ in range(3))
    pads = [data.draw(st.integers(0, side - 1)) for side in kernel * 2]
    sizes = [data.draw(st.integers(7, 10)) for _ in range(2)]
    attributes = {"kernel_shape": kernel, "strides": strides, "dilations": dilations, "pads": pads, "ceil_mode": ceil}
    check(op, [random(2, 3, *sizes)], opset=22, **attributes)


@given(data=st.data(), rank=st.integers(1, 3), ceil=st.sampled_from([0, 1]))
@QUICK
def test_max_pool(data: st.DataObject, rank: int, ceil: int) -> None:
    kernel = [data.draw(st.integers(1, 4)) for _ in range(rank)]
    strides = [data.draw(st.integers(1, 3)) for _ in range(rank)]
    pads = [data.draw(st.integers(0, side - 1)) for side in kernel * 2]
    sizes = [data.draw(st.integers(4, 9)) for _ in range(rank)]
    opset = data.draw(st.sampled_from([10, 11, 12, 17, 22]))
    attributes = {"kernel_shape": kernel, "strides": strides, "pads": pads, "ceil_mode": ceil}
    check("MaxPool", [random(2, 3, *sizes) - 5], opset=opset, tolerance=0, **attributes)


@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize("size", [7, 8])
def test_max_pool_with_auto_pad(size: int, auto_pad: str) -> None:
    attributes: dict[str, Any] = {"kernel_shape": [3, 3], "strides": [2, 2], "auto_pad": auto_pad}
    check("MaxPool", [random(1, 2, size, size) - 5], tolerance=0, **attributes)


@pytest.mark.parametrize("opset", [9, 11, 17, 18, 19, 20, 21, 22, 25])
@pytest.mark.parametrize("op", ["AveragePool", "MaxPool", "GlobalAveragePool", "GlobalMaxPool"])
def test_pooling_at_every_opset(op: str, opset: int) -> None:
    attributes = {} if op.startswith("Global") else {"kernel_shape": [2, 2], "strides": [2, 2]}
    check(op, [random(2, 3, 8, 8)], opset=opset, **attributes)


@pytest.mark.parametrize("opset", [1, 22])
@pytest.mark.parametrize("rank", [3, 4, 5])
def test_global_max_pool(rank: int, opset: int) -> None:
    check("GlobalMaxPool", [random(2, 3, *[4] * (rank - 2))], opset=opset, tolerance=0)


@pytest.mark.parametrize("ceil", [0, 1])
def test_gradient_of_average_pool(ceil: int) -> None:
    attributes = {"kernel_shape": [2, 3], "strides": [2, 2], "pads": [1, 0, 0, 1], "ceil_mode": ceil}
    x = torch.from_numpy(models.random(1, 2, 4, 5)).double().requires_grad_()
    assert torch.autograd.gradcheck(registry._TABLE["", "AveragePool", 11](attributes), x)
