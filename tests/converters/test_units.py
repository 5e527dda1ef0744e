"""Units of inner values: what the metadata says, there and back, and what cannot be read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from converters.classifier import Classifier
from converters.errors import MixMixError
from converters.units import KEY, Rescaled, Units, to_metadata
from tests import models

Load = Callable[[onnx.ModelProto], Classifier]


def with_entry(load: Load, text: str) -> Classifier:
    model = models.conv()
    onnx.helper.set_model_props(model, {KEY: text})
    return load(model)


def test_a_file_that_says_nothing_has_the_originals_units(load: Load) -> None:
    assert to_metadata([]) == {}
    x = models.images(2, (2, 4, 3, 3))
    units = Units(load(models.conv()))
    assert units.original({"x": x})["x"] is x
    assert units.own("x", x) is x


def test_by_hand(load: Load) -> None:
    """A map of two channels, the same flattened, and a value that is not named."""
    units = Units(with_entry(load, to_metadata([Rescaled(values=["map", "flat"], steps=[-4, 8])])[KEY]))
    x = np.ones((1, 2, 1, 3), np.float32)
    found = units.original({"map": x, "flat": x.reshape(1, 6), "other": x})
    assert found["map"].tolist() == [[[[0.5] * 3], [[4.0] * 3]]]
    assert found["flat"].tolist() == [[0.5] * 3 + [4.0] * 3]
    assert found["other"] is x
    assert units.own("map", x).tolist() == [[[[2.0] * 3], [[0.25] * 3]]]
    assert found["map"].dtype == np.float32


@settings(deadline=None, derandomize=True)
@given(
    steps=st.lists(st.integers(-12, 12), min_size=1, max_size=4),
    places=st.integers(1, 3),
    x=arrays.arrays(np.float32, (2, 12), elements=st.floats(-1e3, 1e3, width=32)),
)
def test_there_and_back(steps: list[int], places: int, x: np.ndarray[Any, np.dtype[np.float32]]) -> None:
    value = x[:, : len(steps) * places]
    units = Units.__new__(Units)
    units._factors = {"x": Rescaled(values=["x"], steps=steps).factors}
    np.testing.assert_allclose(units.own("x", units.original({"x": value})["x"]), value, rtol=1e-6, atol=1e-37)


@pytest.mark.parametrize("text", ["", "{}", "[1]", '[{"values": ["x"]}]', '[{"values": ["x"], "steps": [0.5]}]'])
def test_what_cannot_be_read(load: Load, text: str) -> None:
    with pytest.raises(MixMixError, match=r"mixmix\.units is not a list"):
        Units(with_entry(load, text))
