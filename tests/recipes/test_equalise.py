"""Equalisation: what the factors are, and that it leaves the function, the names and ReLU6 alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch

from converters import writeback
from converters.classifier import Classifier
from converters.conversion import relative_difference, to_torch
from converters.load import load_classifier
from converters.scalings import find_scalings
from converters.targets import PORTABLE
from converters.torch_module import TorchClassifier
from converters.units import KEY, STEPS_PER_OCTAVE, to_metadata
from recipes.images import ImageSet
from recipes.quantize import engine
from recipes.quantize.equalise import MOST_STEPS, equalise, steps
from recipes.quantize.settings import PACKAGE, QuantizeSettings
from recipes.settings import load_recipe
from recipes.validate import validate
from recipes.workpiece import model_inputs

SETTINGS = load_recipe(QuantizeSettings, PACKAGE, "nearest", overrides=["equalise=0.5"])


def prepared_module(classifier: Classifier) -> TorchClassifier:
    return to_torch(writeback.prepare_for_quantization(classifier, PORTABLE, 4, 4), check=False)


def test_factors_are_powers_of_the_ranges() -> None:
    """Over their mean, in quarters of an octave: the roots 1, 2 and 4 have the mean 7 / 3, log2 of which is 1.22."""
    ranges = torch.tensor([1.0, 4.0, 16.0, 0.0])
    assert steps(ranges, 0.5).tolist() == [-5, -1, 3, 0]
    assert steps(ranges, 0.0).tolist() == [0, 0, 0, 0]
    assert steps(torch.tensor([1e-6, 1.0]), 1.0).tolist() == [-MOST_STEPS, 4]
    assert steps(torch.zeros(2), 0.5).tolist() == [0, 0]


def test_ranges_are_brought_nearer(module_of: Callable[[str], TorchClassifier], calibration_images: ImageSet) -> None:
    """At power 1/2 the widest channel over another is the root of what it was, but for half a step to either side."""
    module = prepared_module(module_of("plain").classifier)
    inputs = model_inputs(module, calibration_images)
    edits, units = equalise(module, inputs, SETTINGS)
    edited = to_torch(writeback.edited_classifier(module.classifier, edits), check=False)
    for scaling, unit in zip(find_scalings(module), units, strict=True):
        (name,) = scaling.read
        before, after = (m.segment([m.input_name], [name])({m.input_name: inputs})[name] for m in (module, edited))
        ranges = [x.reshape(len(x), scaling.count, -1).amax((0, 2)) for x in (before, after)]  # behind Relu
        live = (torch.tensor(unit.steps).abs() < MOST_STEPS) & (ranges[0] > 0)
        rooted = (ranges[1][live] / ranges[0][live].sqrt()).log2()
        assert rooted.max() - rooted.min() < 1 / STEPS_PER_OCTAVE + 1e-4
        torch.testing.assert_close(ranges[1] * torch.from_numpy(unit.factors), ranges[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["plain", "residual", "dense"])
def test_the_function_stays(
    name: str, classifier_of: Callable[[str], Classifier], calibration_images: ImageSet
) -> None:
    module = prepared_module(classifier_of(name))
    inputs = model_inputs(module, calibration_images)
    edited = writeback.edited_classifier(module.classifier, equalise(module, inputs, SETTINGS)[0])
    x = inputs.contiguous().numpy()
    before, after = (c.session().run_in_batches(x, len(x)) for c in (classifier_of(name), edited))
    assert relative_difference(after, before) < 1e-5
    names = [set(c.original.graph.initializers) for c in (module.classifier, edited)]
    assert names[0] == names[1]


@pytest.mark.parametrize(
    ("name", "act_bits", "differs"), [("plain", 4, True), ("plain", 8, False), ("inverted", 4, False)]
)
def test_where_it_is_used(
    name: str,
    act_bits: int,
    differs: bool,
    classifier_of: Callable[[str], Classifier],
    calibration_images: ImageSet,
    tmp_path: Path,
) -> None:
    """With few bits of activations, and where the graph has a pair; the file says the same otherwise."""
    files = []
    for power in (0.0, 0.5):
        settings = SETTINGS.model_copy(update={"equalise": power, "batch": 16, "range_steps": 10})
        output = tmp_path / f"{power}.onnx"
        engine.quantize(classifier_of(name), calibration_images, output, settings, 4, act_bits)
        files.append(onnx.load(output))
    one, other = ({t.name: t.raw_data for t in file.graph.initializer} for file in files)
    assert set(one) == set(other)
    assert (one != other) == differs
    assert [KEY in {entry.key for entry in file.metadata_props} for file in files] == [False, differs]


@pytest.mark.parametrize("name", ["plain", "dense"])
def test_layers_are_compared_in_the_original_units(
    name: str, classifier_of: Callable[[str], Classifier], calibration_images: ImageSet, tmp_path: Path
) -> None:
    """A file that is equalised and nothing else has no noise in any layer; without the entry it would seem to have."""
    classifier = classifier_of(name)
    module = prepared_module(classifier)
    edits, units = equalise(module, model_inputs(module, calibration_images), SETTINGS)
    files = []
    for facts in (to_metadata(units), {}):
        files.append(tmp_path / f"{len(files)}.onnx")
        edited = writeback.edited_classifier(module.classifier, edits)
        writeback.save(edited.original, files[-1], classifier.spec.to_metadata() | facts)
    rescaled = {name for unit in units for name in unit.values}
    for reference, candidate, misread in (
        (classifier.path, files[0], False),
        (files[0], classifier.path, False),
        (files[0], files[0], False),
        (classifier.path, files[1], True),
    ):
        judged = validate(
            load_classifier(reference), [load_classifier(candidate)], calibration_images, layers=True, threads=1
        )
        layers = judged.candidates[0].layers
        assert layers is not None
        noisy = {layer.value for layer in layers if layer.snr is None or layer.snr < 90}
        assert noisy == ({layer.value for layer in layers} & rescaled if misread else set())
