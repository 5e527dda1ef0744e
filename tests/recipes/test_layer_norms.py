"""LayerNormalization that exporters wrote out: found by what it computes, and nothing else taken for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx
import pytest

from converters.classifier import Classifier
from converters.conversion import to_torch
from recipes.evenness import even_values
from recipes.layer_norms import layer_norms
from tests import models

Load = Callable[[onnx.ModelProto], Classifier]

MEANS = {
    "doubled": "Add features features",
    "mean": "ReduceMean features axis",
    "centred": "Sub features mean",
    "square": "Mul centred centred",
    "variance": "ReduceMean square axis",
    "padded": "Add variance little",
}
ROOT = {"root": "Sqrt padded"}
INVERSE = {"inverse": "Reciprocal root"}
PRODUCT = {"normal": "Mul centred inverse"}
AFFINE = {"scaled": "Mul normal gamma", "moved": "Add scaled beta"}
DIVIDED = MEANS | ROOT | {"normal": "Div centred root"} | AFFINE
GAIN = {"gain": "Mul inverse gamma", "scaled": "Mul features gain", "shift": "Mul mean gain"}
SPELLINGS = {
    "divided": DIVIDED,
    "reciprocal": MEANS | ROOT | INVERSE | PRODUCT | AFFINE,
    "power": MEANS | {"inverse": "Pow padded power"} | PRODUCT | AFFINE,
    "tensorflow": MEANS | ROOT | INVERSE | GAIN | {"rest": "Sub beta shift", "moved": "Add scaled rest"},
    "small deviations": DIVIDED | {"padded": "Add variance large"},
}
"""LayerNorm of the last axis, by hand: what computes each value, in order."""


def written_out(parts: Mapping[str, str], end: str = "moved") -> onnx.ModelProto:
    """A convolution, what `parts` make of its features [N, 4, H, 6], and the head, which reads `end`."""
    nodes = [models.node("Conv", "image weight", "features")]
    nodes += [models.node(*part.split(maxsplit=1), name) for name, part in parts.items()]
    tensors = {"weight": models.weights(4, models.CHANNELS, 3, 3), "axis": np.array([-1]), "all": np.array([1, 2, 3])}
    tensors |= {name: models.weights(6, seed=seed) for seed, name in enumerate(("gamma", "beta"), 2)}
    tensors |= {"of.first": models.weights(4, 1, 1, seed=4), "of.places": models.weights(6, 6, seed=5)}
    numbers = {"little": 1e-5, "large": 0.05, "power": -0.5, "faint": 1e-6}
    tensors |= {name: np.float32(number) for name, number in numbers.items()}
    tensors |= {"rows": np.array([0, 2, -1]), "image.shape": np.array([0, 4, -1, 6])}
    return models.assemble([*nodes, *models.head(end)], tensors | models.head_tensors(4), opset=18)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_a_layer_norm_is_found(spelling: str, load: Load) -> None:
    (norm,) = layer_norms(to_torch(load(written_out(SPELLINGS[spelling]))))
    assert (norm.input, norm.output, norm.axis) == ("features", "moved", -1)


@pytest.mark.parametrize(
    "tampered",
    [
        pytest.param({"mean": "ReduceMean doubled axis"}, id="the mean of something else"),
        pytest.param({"normal": "Div centred padded"}, id="no root"),
        pytest.param({"normal": "Div root centred"}, id="upside down"),
        pytest.param({"variance": "ReduceMean square all"}, id="one deviation for the image"),
        pytest.param({"scaled": "Mul normal of.first"}, id="a norm over places, with a scale for each channel"),
        pytest.param({"scaled": "Mul normal power"}, id="no scale"),
        pytest.param({"scaled": "Mul normal faint"}, id="next to nothing"),
    ],
)
def test_what_is_not_a_layer_norm_is_not_taken_for_one(tampered: Mapping[str, str], load: Load) -> None:
    assert layer_norms(to_torch(load(written_out(DIVIDED | tampered)))) == []


def test_a_group_norm_is_none(load: Load) -> None:
    """[N, 2, ...]: each row normalised, and scaled when it is an image again."""
    groups = {"features": "Reshape maps rows"} | DIVIDED
    del groups["scaled"], groups["moved"]
    ends = {"again": "Reshape normal image.shape", "scaled": "Mul again of.first"}
    model = written_out(groups | ends, "scaled")
    model.graph.node[0].output[0] = "maps"
    assert layer_norms(to_torch(load(model))) == []


@pytest.mark.parametrize("part", ["Mul features faint", "Mul moved faint", "Relu moved"])
def test_what_is_added_behind_it_is_not_of_it(part: str, load: Load) -> None:
    """However little: it is the next block's."""
    (norm,) = layer_norms(to_torch(load(written_out(DIVIDED | {"block": part, "sum": "Add moved block"}, "sum"))))
    assert norm.output == "moved"


def test_what_is_added_for_each_place_is_no_offset(load: Load) -> None:
    (norm,) = layer_norms(to_torch(load(written_out(DIVIDED | {"moved": "Add scaled of.places"}))))
    assert norm.output == "scaled"


def test_a_norm_of_one_place_is_one(load: Load) -> None:
    """So that the convolution before it is known to have had no BatchNorm; but there is nothing to ask of it."""
    parts = {"active": "Relu maps", "features": "GlobalAveragePool active"} | DIVIDED
    model = written_out(parts | {"scaled": "Mul normal of.first", "moved": "Add scaled of.first"})
    model.graph.node[0].output[0] = "maps"
    model.graph.node[0].input.append("bias")
    for name, array in (("bias", models.weights(4, seed=6)), ("first", np.array([1]))):
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    for node in model.graph.node:
        if node.op_type == "ReduceMean":
            node.input[1] = "first"
    module = to_torch(load(model))
    (norm,) = layer_norms(module)
    assert (norm.output, norm.axis) == ("moved", 1)
    assert even_values(module) == []
