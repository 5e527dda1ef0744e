"""Normalisations and operators that move pixels, against onnxruntime, over attributes and shapes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.converters.oracle import check, ints
from tests.models import random

QUICK = settings(max_examples=20, deadline=None, derandomize=True)
SIDES = st.lists(st.integers(1, 6), min_size=1, max_size=3)
EPSILON = st.sampled_from([1e-5, 1e-3, 0.5])


def positive(*shape: int, seed: int) -> np.ndarray:
    return np.asarray(1 + 0.3 * random(*shape, seed=seed), np.float32)


@given(sides=SIDES, groups=st.sampled_from([1, 2, 4]), epsilon=EPSILON)
@QUICK
def test_group_normalization(sides: list[int], groups: int, epsilon: float) -> None:
    operands = [random(2, 4, *sides), positive(4, seed=1), random(4, seed=2)]
    check("GroupNormalization", operands, opset=21, tolerance=1e-5, num_groups=groups, epsilon=epsilon)


@given(sides=SIDES, epsilon=EPSILON, opset=st.sampled_from([7, 17, 22]))
@QUICK
def test_instance_normalization(sides: list[int], epsilon: float, opset: int) -> None:
    sides = [side + 1 for side in sides]  # of one pixel nothing is left but noise
    operands = [random(2, 3, *sides), positive(3, seed=1), random(3, seed=2)]
    check("InstanceNormalization", operands, opset=opset, tolerance=1e-5, epsilon=epsilon)


@given(data=st.data(), sizes=st.lists(st.integers(2, 5), min_size=2, max_size=4), epsilon=EPSILON)
@QUICK
def test_rms_normalization(data: st.DataObject, sizes: list[int], epsilon: float) -> None:
    axis = data.draw(st.integers(-len(sizes), len(sizes) - 1))
    operands = [random(*sizes), positive(*sizes[axis % len(sizes) :], seed=1)]
    check("RMSNormalization", operands, opset=23, tolerance=1e-5, axis=axis, epsilon=epsilon)


@given(channels=st.integers(1, 9), size=st.sampled_from([1, 3, 5, 7]), alpha=st.floats(1e-4, 2), bias=st.floats(0.5, 2))
@QUICK
def test_lrn(channels: int, size: int, alpha: float, bias: float) -> None:
    check("LRN", [random(2, channels, 3, 4)], tolerance=1e-5, size=size, alpha=alpha, beta=0.6, bias=bias)


@given(data=st.data(), sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4), p=st.sampled_from([1, 2]))
@QUICK
def test_lp_normalization(data: st.DataObject, sizes: list[int], p: int) -> None:
    axis = data.draw(st.integers(-len(sizes), len(sizes) - 1))
    check("LpNormalization", [random(*sizes)], tolerance=1e-5, axis=axis, p=p)


@given(
    data=st.data(),
    mode=st.sampled_from(["linear", "nearest", "cubic"]),
    padding=st.sampled_from(["zeros", "border", "reflection"]),
    corners=st.integers(0, 1),
)
@QUICK
def test_grid_sample(data: st.DataObject, mode: str, padding: str, corners: int) -> None:
    """Grids reach a little beyond the image on every side."""
    height, width, *out = (data.draw(st.integers(2, 6)) for _ in range(4))
    grid = np.random.default_rng(data.draw(st.integers(0, 99))).uniform(-1.3, 1.3, (2, *out, 2)).astype(np.float32)
    attributes = {"mode": mode, "padding_mode": padding, "align_corners": corners}
    check("GridSample", [random(2, 3, height, width), grid], opset=20, tolerance=2e-5, **attributes)


@given(data=st.data(), rank=st.sampled_from([1, 2, 2]), how=st.sampled_from(["pads", "SAME_UPPER", "SAME_LOWER"]))
@QUICK
def test_conv_transpose(data: st.DataObject, rank: int, how: str) -> None:
    groups = data.draw(st.sampled_from([1, 2]))

    def drawn(low: int, high: int, count: int = rank) -> list[int]:
        return data.draw(st.lists(st.integers(low, high), min_size=count, max_size=count))

    strides, kernel = drawn(1, 3), drawn(3, 4)
    attributes: dict[str, Any] = {"group": groups, "strides": strides}
    if how == "pads":
        attributes |= {"pads": drawn(0, 1, 2 * rank), "dilations": drawn(1, 2)}
        attributes["output_padding"] = [data.draw(st.integers(0, stride - 1)) for stride in strides]
    else:
        attributes["auto_pad"] = how
    operands = [random(2, 4, *drawn(2, 5)), random(4, 3, *kernel, seed=1), random(3 * groups, seed=2)]
    check("ConvTranspose", operands, tolerance=1e-5, **attributes)


@given(data=st.data())
@QUICK
def test_col2im(data: st.DataObject) -> None:
    def pair(low: int, high: int) -> list[int]:
        return data.draw(st.lists(st.integers(low, high), min_size=2, max_size=2))

    image, block, strides, dilations, begins, ends = (
        pair(5, 7),
        pair(1, 3),
        pair(1, 2),
        pair(1, 2),
        pair(0, 2),
        pair(0, 2),
    )
    places = [
        (side + begin + end - dilation * (size - 1) - 1) // stride + 1
        for side, begin, end, dilation, size, stride in zip(image, begins, ends, dilations, block, strides, strict=True)
    ]
    columns = random(2, 3 * math.prod(block), math.prod(places))
    attributes = {"strides": strides, "dilations": dilations, "pads": begins + ends}
    check("Col2Im", [columns, ints(*image), ints(*block)], opset=18, tolerance=1e-5, **attributes)


@given(
    blocks=st.integers(1, 3),
    sides=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    mode=st.sampled_from(["DCR", "CRD"]),
)
@QUICK
def test_depth_and_space(blocks: int, sides: tuple[int, int], mode: str) -> None:
    check("DepthToSpace", [random(2, 3 * blocks**2, *sides)], blocksize=blocks, mode=mode)
    check("SpaceToDepth", [random(2, 3, *(blocks * side for side in sides))], blocksize=blocks)


@pytest.mark.parametrize("op", ["Add", "Sub", "Mul", "Div", "Max", "Min", "PRelu"])
@given(data=st.data(), sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4))
@QUICK
def test_broadcasting(op: str, data: st.DataObject, sizes: list[int]) -> None:
    """The second operand, of fewer dimensions or of ones; PRelu's goes only that way, the others' both ways."""
    kept = data.draw(st.integers(0 if op != "PRelu" else 1, len(sizes)))
    other = [size if data.draw(st.booleans()) else 1 for size in sizes[len(sizes) - kept :]]
    operands = [random(*sizes), positive(*other, seed=1)]
    check(op, operands, opset=data.draw(st.sampled_from([9, 17])))
    if op != "PRelu":
        check(op, [operands[1], positive(*sizes, seed=2)])
