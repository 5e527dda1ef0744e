"""Resize and Upsample against onnxruntime, over modes, scales and sizes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.converters.oracle import check, ints
from tests.models import random

QUICK = settings(max_examples=40, deadline=None, derandomize=True)
SCALES = st.sampled_from([0.5, 0.75, 1.0, 1.5, 2.0, 3.0])
TRANSFORMATIONS = ["half_pixel", "pytorch_half_pixel", "asymmetric", "align_corners"]


def scales(*values: float) -> Any:
    return np.array(values, np.float32)


@given(
    data=st.data(),
    mode=st.sampled_from(["nearest", "linear", "cubic"]),
    transformation=st.sampled_from(TRANSFORMATIONS),
    opset=st.sampled_from([11, 13, 18, 19]),
)
@QUICK
def test_resize_by_scales(data: st.DataObject, mode: str, transformation: str, opset: int) -> None:
    """Sides are multiples of four, so that every length is whole."""
    x = random(2, 3, *[4 * data.draw(st.integers(1, 3)) for _ in range(2)])
    attributes: dict[str, Any] = {"mode": mode, "coordinate_transformation_mode": transformation}
    if mode == "nearest":
        # exact halves are decided by float noise in onnxruntime unless the rule takes one side of everything
        attributes["nearest_mode"] = data.draw(st.sampled_from(["floor", "ceil"]))
        attributes["coordinate_transformation_mode"] = "asymmetric"
        chosen = [data.draw(st.sampled_from([0.5, 1.0, 2.0, 4.0])) for _ in range(2)]
    else:
        chosen = [data.draw(SCALES) for _ in range(2)]
    operands = [x, scales(), scales(1, 1, *chosen)]
    check("Resize", operands, opset=opset, tolerance=1e-5, **attributes)


@given(
    data=st.data(),
    transformation=st.sampled_from(TRANSFORMATIONS),
    rule=st.sampled_from(["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"]),
)
@QUICK
def test_nearest_by_any_scale(data: st.DataObject, transformation: str, rule: str) -> None:
    """Scales that are no binary fractions, so that lengths and pixels hang on the last digit of single precision."""
    x = random(1, 2, *[data.draw(st.integers(1, 14)) for _ in range(2)])
    chosen = [data.draw(st.sampled_from([1.0, 1.3, 1.5, 7 / 3, 3.0])) for _ in range(2)]
    attributes = {"coordinate_transformation_mode": transformation, "nearest_mode": rule}
    check("Resize", [x, scales(), scales(1, 1, *chosen)], opset=19, mode="nearest", **attributes)


@given(data=st.data(), mode=st.sampled_from(["linear", "cubic"]), transformation=st.sampled_from(TRANSFORMATIONS))
@QUICK
def test_resize_to_sizes(data: st.DataObject, mode: str, transformation: str) -> None:
    x = random(1, 2, *[data.draw(st.integers(2, 9)) for _ in range(2)])
    sizes = ints(1, 2, *[data.draw(st.integers(1, 12)) for _ in range(2)])
    attributes = {"mode": mode, "coordinate_transformation_mode": transformation}
    check("Resize", [x, scales(), scales(), sizes], opset=13, tolerance=1e-5, **attributes)


@pytest.mark.parametrize("mode", ["nearest", "linear"])
@pytest.mark.parametrize(("op", "opset"), [("Upsample", 9), ("Resize", 10)])
def test_the_forms_before_opset_11(op: str, opset: int, mode: str) -> None:
    check(op, [random(2, 3, 5, 4), scales(1, 1, 2, 3)], opset=opset, mode=mode, tolerance=1e-5)


def test_upsample_with_scales_as_an_attribute() -> None:
    check("Upsample", [random(2, 3, 5, 4)], opset=7, scales=[1.0, 1.0, 2.0, 2.0])


def test_resize_of_chosen_axes() -> None:
    check("Resize", [random(1, 2, 4, 6), scales(), scales(2, 0.5)], opset=18, axes=[2, 3], mode="linear")
