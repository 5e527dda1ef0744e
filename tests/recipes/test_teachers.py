"""Models as teachers: in which units their images are made, at which scales they run, and whose labels count."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import helper, numpy_helper
from torch import Tensor

from converters import folding
from converters.classifier import Classifier
from converters.conversion import to_torch
from converters.input_spec import InputSpec
from converters.load import load_classifier
from converters.torch_module import TorchClassifier
from recipes import zoo
from recipes.image_store import OtherSetError
from recipes.inspect import inspect_model
from recipes.pipeline import load_suitable_recipe
from recipes.progress import Silent
from recipes.synth.engine import synthesize
from recipes.synth.objectives import LearnedWeights
from recipes.synth.settings import Stage, SynthSettings
from recipes.synth.teachers import SynthesisError, make_teachers, working_units
from tests import models

Modules = Callable[[str], TorchClassifier]
Load = Callable[[onnx.ModelProto], Classifier]


def settings(**changes: Any) -> SynthSettings:
    stages = (Stage(scale=1.0, steps=4),)
    return SynthSettings(**({"images": 8, "batch": 4, "stages": stages, "label": 0.5, "variation": 0.01} | changes))


def behind_pixels(path: Path, output: Path) -> TorchClassifier:
    """The same function for pixels of 0 to 255, which the graph normalises."""
    model = onnx.load(path)
    spec = load_classifier(path).spec
    (image,) = (value.name for value in model.graph.input)
    for node in model.graph.node:
        node.input[:] = ["normal" if name == image else name for name in node.input]
    operands = {"mean": 255 * np.float32(spec.mean), "std": 255 * np.float32(spec.std)}
    model.graph.initializer.extend(
        numpy_helper.from_array(value[:, None, None], name) for name, value in operands.items()
    )
    model.graph.node.insert(0, helper.make_node("Sub", [image, "mean"], ["shifted"]))
    model.graph.node.insert(1, helper.make_node("Div", ["shifted", "std"], ["normal"]))
    raw = spec.model_copy(update={"scale": 255.0, "mean": (0.0,), "std": (1.0,)})
    del model.metadata_props[:]
    helper.set_model_props(model, raw.to_metadata())
    onnx.save(model, output)
    return to_torch(load_classifier(output))


def test_a_model_that_normalises_within_gets_images_as_good(module_of: Modules, tmp_path: Path) -> None:
    """A step of one size would hardly change pixels of 0 to 255."""
    plain = module_of("plain")
    raw = behind_pixels(plain.classifier.path, tmp_path / "raw.onnx")
    how = settings(images=8, batch=8, label=0.0, stages=(Stage(scale=1.0, steps=40),))
    found = [
        next(iter(synthesize([module], tmp_path / str(index), how).losses.values()))
        for index, module in enumerate((plain, raw))
    ]
    assert found[1] < 1.5 * found[0]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}, ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))),
        ({"mean": (127.0,) * 3, "std": (128.0,) * 3, "scale": 255.0}, ((127 / 255,) * 3, (128 / 255,) * 3)),
        ({"mean": (0.1, 0.2, 0.3), "std": (0.25,) * 3, "channels": "bgr"}, ((0.3, 0.2, 0.1), (0.25,) * 3)),
        ({"mean": (0.0,) * 3, "std": (1.0,) * 3, "scale": 255.0}, ((0.5,) * 3, (0.25,) * 3)),
        ({"mean": (103.9, 116.8, 123.7), "std": (1.0,) * 3, "scale": 255.0}, ((0.5,) * 3, (0.25,) * 3)),
        ({"mean": (0.0,) * 3, "std": (1.0,) * 3}, ((0.5,) * 3, (0.25,) * 3)),
    ],
)
def test_images_are_optimised_in_units_of_images(
    spec: dict[str, Any], expected: tuple[tuple[float, ...], tuple[float, ...]]
) -> None:
    found = working_units(InputSpec(size=(8, 8), **({"channels": "rgb"} | spec)))
    assert found == expected


def test_a_model_runs_smaller_where_it_does_at_every_scale(module_of: Modules, monkeypatch: pytest.MonkeyPatch) -> None:
    module = module_of("plain")
    tried: list[int] = []
    forward = module.forward

    def runs_at_half(x: Tensor) -> Tensor:
        tried.append(x.shape[2])
        if x.shape[2] == 21:
            raise RuntimeError("sizes of two branches differ")
        return forward(x)

    monkeypatch.setattr(module, "forward", runs_at_half)
    stages = tuple(Stage(scale=scale, steps=1) for scale in (0.5, 0.75, 1.0))
    (teacher,), _ = make_teachers([module], settings(stages=stages))
    assert {14, 21} <= set(tried)
    assert not teacher.runs_smaller
    assert teacher.input_size(0.5) == (28, 28)


def test_the_labels_of_a_single_class_shape_nothing(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "CLASSES", 1)
    with pytest.raises(SynthesisError, match="a single logit, whose label tells nothing apart"):
        synthesize([to_torch(load(models.conv()))], tmp_path / "set", settings())


def partly_folded(path: Path) -> TorchClassifier:
    """`plain` with its first BatchNorm, and the others folded."""
    model = ir.load(zoo.model_path("plain"))
    first = next(node for node in model.graph if node.op_type == "BatchNormalization")
    first.op_type = "Held"
    folding.fold_affine(model)
    first.op_type = "BatchNormalization"
    ir.save(model, path)
    return to_torch(load_classifier(path))


def test_where_some_batchnorm_was_folded_the_layers_count_alike(
    module_of: Modules, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One BatchNorm that is left says little: the convolutions that lost theirs are looked at beside it."""
    first, *others = (norm.input for norm in module_of("plain").batchnorms())
    module = partly_folded(tmp_path / "part.onnx")
    how = settings(label=0.5, unevenness=2.0)
    (teacher,), _ = make_teachers([module], how)
    assert [norm.input for norm in teacher.norms] == [first]
    assert len(teacher.evens) == len(others)
    assert first not in [value.name for value in teacher.evens]
    factors = {
        "batchnorm/part": 1 / (1 + len(others)),
        "unevenness/part": 2 * len(others) / (1 + len(others)),
        "label/part": 0.5,
    }
    assert teacher.factors(how) == pytest.approx(factors)
    used = []
    combine = LearnedWeights.combine

    def spy(self: LearnedWeights, terms: Mapping[str, Tensor], given: Mapping[str, float]) -> Tensor:
        used.append({name: given[name] for name in terms})
        return combine(self, terms, given)

    monkeypatch.setattr(LearnedWeights, "combine", spy)
    assert set(synthesize([module], tmp_path / "set", how).losses) == set(factors)
    assert used
    assert all(each == pytest.approx(factors) for each in used)


def test_statistics_that_are_not_asked_for_are_not_looked_at(tmp_path: Path) -> None:
    how = settings(label=0.5, unevenness=2.0, batchnorm=0.0)
    (teacher,), _ = make_teachers([partly_folded(tmp_path / "part.onnx")], how)
    assert teacher.norms == []
    assert teacher.factors(how)["unevenness/part"] == 2
    statistics, _ = teacher.look(torch.rand(4, 1, 28, 28))
    assert set(statistics) == {value.name for value in teacher.evens}


@pytest.mark.parametrize("small", [True, False], ids=["small", "large"])
def test_a_partly_folded_model_is_asked_for_both_as_it_is(
    small: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = partly_folded(tmp_path / "part.onnx")
    monkeypatch.setattr("recipes.pipeline.SMALL", 64 if small else 1)
    name, how = load_suitable_recipe(None, [module.classifier], "fast", (), None, {}, Silent())
    assert name == ("small" if small else "default")
    (teacher,), _ = make_teachers([module], how)
    assert all(factor > 0 for key, factor in teacher.factors(how).items() if key != "label/part")


def test_a_single_logit_behind_convolutions_is_enough(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And `inspect` says the same as `synth`."""
    monkeypatch.setattr(models, "CLASSES", 1)
    with_bias = load(models.conv())
    made = synthesize([to_torch(with_bias)], tmp_path / "set", settings(unevenness=1.0))
    assert list(made.losses) == ["unevenness/model"]
    assert inspect_model(with_bias).why_not_synthesize is None
    without = load(models.conv(bias=False))
    with pytest.raises(SynthesisError, match="nor even channels to ask for"):
        synthesize([to_torch(without)], tmp_path / "other", settings(unevenness=1.0))
    assert "nor even channels" in str(inspect_model(without).why_not_synthesize)


def test_labels_of_another_first_model_are_another_set(module_of: Modules, load: Load, tmp_path: Path) -> None:
    """Also where that model, which has no statistics, is left out: it says how many classes there are."""
    few, plain = to_torch(load(models.conv())), module_of("plain")
    how = settings(label=0.0)
    synthesize([few, plain], tmp_path / "set", how)
    with pytest.raises(OtherSetError, match="classes is 5 and not 10"):
        synthesize([plain], tmp_path / "set", how, size=plain.spec.size, resume=True)
