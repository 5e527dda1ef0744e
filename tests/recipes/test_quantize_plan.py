"""Placement of bits, and the contract around a quantization: refusals, files, seeds, progress."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from converters.classifier import Classifier
from converters.errors import MixMixError, OutputError
from converters.load import load_classifier
from converters.targets import PORTABLE
from converters.torch_module import TorchClassifier
from recipes.images import ImageSet
from recipes.progress import Silent
from recipes.quantize.engine import output_path, quantize
from recipes.quantize.plan import LayerPlan, decibels, plan_bits
from recipes.quantize.quantizers import QuantizedWeight
from recipes.quantize.settings import QuantizeSettings
from recipes.sensitivity import noise_to_signal

NEAREST = QuantizeSettings(unit="none", range_steps=10)
TRAINED = QuantizeSettings(unit="block", steps=3, batch=5, range_steps=10, activation_drop=0.5, input_drop=0.5)
Classifiers = Callable[[str], Classifier]


def plans(
    module: TorchClassifier, images: ImageSet, bits: int = 2, act_bits: int | None = None, **settings: float
) -> list[LayerPlan]:
    inputs = module.spec.to_input(images.pixels[:8])
    return plan_bits(module, inputs, bits, act_bits, PORTABLE, NEAREST.model_copy(update=settings))


@pytest.mark.parametrize("share", [0.015, 0.05, 0.3, 1.0])
def test_sensitive_layers_fit_the_share_worst_first(
    share: float, module_of: Callable[[str], TorchClassifier], calibration_images: ImageSet
) -> None:
    module = module_of("inverted")
    found = plans(module, calibration_images, sensitive_share=share, sensitive_snr=1000.0)
    total = sum(plan.layer.parameters for plan in found)
    inner = found[1:-1]
    kept = [plan for plan in inner if plan.bits != 2]
    assert all(plan.bits == 8 and plan.reason for plan in kept)
    assert all(plan.snr is not None for plan in inner)
    left = share * total
    for plan in sorted(inner, key=lambda plan: plan.snr or 0.0):
        fits = plan.layer.parameters <= left
        assert (plan in kept) == fits
        left -= plan.layer.parameters * fits
    assert left >= 0
    assert len(kept) == len(inner) if share == 1 else 0 < len(kept) < len(inner)


def test_only_layers_below_the_limit_are_kept(
    module_of: Callable[[str], TorchClassifier], calibration_images: ImageSet
) -> None:
    module = module_of("inverted")
    ratios = sorted(p.snr for p in plans(module, calibration_images, sensitive_snr=-1000.0) if p.snr is not None)
    limit = (ratios[2] + ratios[3]) / 2
    found = plans(module, calibration_images, sensitive_share=1.0, sensitive_snr=limit)
    assert sorted(p.snr for p in found[1:-1] if p.bits == 8 and p.snr is not None) == ratios[:3]
    for settings in ({"sensitive_share": 0.0}, {"sensitive_share": 1.0, "sensitive_snr": -1000.0}):
        assert [plan.bits for plan in plans(module, calibration_images, **settings)[1:-1]] == [2] * 19


def test_ends_have_their_own_bits(module_of: Callable[[str], TorchClassifier], calibration_images: ImageSet) -> None:
    module = module_of("plain")
    found = plans(module, calibration_images, 4, 4, sensitive_share=0.0)
    assert [(plan.bits, plan.act_bits) for plan in found] == [(8, 8), *[(4, 4)] * 5, (8, 8)]
    assert (found[0].reason, found[-1].reason) == ("first layer", "last layer")
    assert [plan.layer for plan in found] == module.layers()
    low = plans(module, calibration_images, 2, sensitive_share=0.0, end_bits=6)
    assert [plan.bits for plan in low] == [6, 2, 2, 2, 2, 2, 6]
    assert {(p.bits, p.reason) for p in plans(module, calibration_images, 8, 8)} == {(8, None)}


@pytest.mark.parametrize(("limit", "bits"), [(1000.0, 8), (-1000.0, 2)])
def test_a_last_layer_that_holds_much_is_judged_as_the_others_are(
    limit: float, bits: int, module_of: Callable[[str], TorchClassifier], calibration_images: ImageSet
) -> None:
    module = module_of("plain")
    last = plans(module, calibration_images, 2, 4, end_share=0.0, sensitive_share=1.0, sensitive_snr=limit)[-1]
    assert (last.bits, last.act_bits) == (bits, 8)
    assert last.snr is not None
    assert last.reason is not None
    assert last.reason.startswith("alone it leaves" if bits == 8 else "last layer's input")
    share = last.layer.parameters / sum(layer.parameters for layer in module.layers())
    at_the_limit = plans(module, calibration_images, end_share=share)[-1]
    assert (at_the_limit.bits, at_the_limit.snr, at_the_limit.reason) == (8, None, "last layer")


def test_ratios_are_those_of_the_whole_model_with_one_layer_rounded(
    module_of: Callable[[str], TorchClassifier], calibration_images: ImageSet
) -> None:
    module = module_of("residual")
    x = module.spec.to_input(calibration_images.pixels[:8])
    with torch.no_grad():
        reference = module(x)
        for plan in plans(module, calibration_images, 3)[1:-1]:
            rounded = QuantizedWeight(module.constant(plan.layer.weight), plan.layer.axis, 3, NEAREST).tensor()
            logits = module.whole({module.input_name: x}, {plan.layer.weight: rounded})[module.logits_name]
            assert plan.snr == pytest.approx(decibels(noise_to_signal(reference, logits)), abs=0.05)


def test_inputs_of_the_ends_keep_their_bits_whatever_the_weights_have(
    module_of: Callable[[str], TorchClassifier], calibration_images: ImageSet
) -> None:
    found = plans(module_of("plain"), calibration_images, 8, 4)
    assert [plan.act_bits for plan in found] == [8, 4, 4, 4, 4, 4, 8]


def test_the_ratio_of_a_layer_is_measured_with_it_alone_rounded(
    module_of: Callable[[str], TorchClassifier], calibration_images: ImageSet
) -> None:
    reference = torch.tensor([[3.0, 4.0]])
    noise = noise_to_signal(reference, reference + torch.tensor([[0.3, 0.4]]))
    assert decibels(noise) == pytest.approx(20, abs=1e-4)
    assert decibels(noise_to_signal(reference, reference)) == float("inf")
    two, three = (plans(module_of("plain"), calibration_images, bits, sensitive_share=0.01) for bits in (2, 3))
    for coarse, fine in zip(two[1:-1], three[1:-1], strict=True):
        assert coarse.snr is not None
        assert fine.snr is not None
        assert coarse.snr < fine.snr


@pytest.mark.parametrize(
    ("bits", "act_bits"), [(1, None), (9, None), (0, None), (-4, None), (4, 1), (4, 9), (4, 15), (4, 17), (16, 16)]
)
def test_widths_that_cannot_be_written_are_refused(
    bits: int, act_bits: int | None, tmp_path: Path, classifier_of: Classifiers, calibration_images: ImageSet
) -> None:
    with pytest.raises(MixMixError, match=r"2 to 8 bits"):
        quantize(classifier_of("plain"), calibration_images, tmp_path / "out.onnx", NEAREST, bits, act_bits)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_replaced_only_when_told(
    tmp_path: Path, classifier_of: Classifiers, calibration_images: ImageSet
) -> None:
    output = tmp_path / "out.onnx"
    output.write_text("mine")
    with pytest.raises(OutputError, match=r"out\.onnx"):
        quantize(classifier_of("plain"), calibration_images, output, NEAREST, 4)
    assert output.read_text() == "mine"
    with pytest.raises(OutputError, match="nowhere"):
        quantize(classifier_of("plain"), calibration_images, tmp_path / "nowhere" / "out.onnx", NEAREST, 4)
    quantize(classifier_of("plain"), calibration_images, output, NEAREST, 4, overwrite=True)
    assert load_classifier(output).name == "out"
    assert list(tmp_path.iterdir()) == [output]


def test_the_output_is_named_after_the_bits() -> None:
    assert output_path(Path("a/model.onnx"), 4, None) == Path("a/model.w4.onnx")
    assert output_path(Path("a/model.v2.onnx"), 2, 8) == Path("a/model.v2.w2a8.onnx")


def test_the_file_carries_spec_and_provenance(
    tmp_path: Path, classifier_of: Classifiers, calibration_images: ImageSet
) -> None:
    output = tmp_path / "out.onnx"
    provenance = {"mixmix.note": "from a test"}
    quantize(classifier_of("plain"), calibration_images, output, NEAREST, 4, 8, seed=3, provenance=provenance)
    written = load_classifier(output)
    assert written.spec == classifier_of("plain").spec
    properties = written.original.metadata_props
    assert properties["mixmix.note"] == "from a test"
    stated = json.loads(properties["mixmix.quantize"])
    assert (stated["bits"], stated["act_bits"], stated["images"], stated["seed"]) == (4, 8, 32, 3)


def test_the_seed_decides_every_byte(tmp_path: Path, classifier_of: Classifiers, calibration_images: ImageSet) -> None:
    contents = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        output = tmp_path / f"{name}.onnx"
        torch.manual_seed(len(contents))  # the global generator has no say
        result = quantize(classifier_of("plain"), calibration_images.take(11), output, TRAINED, 3, 4, seed=seed)
        contents.append((output.read_bytes(), [block.after for _, block in result.blocks]))
    assert contents[0] == contents[1]
    assert contents[0][1] != contents[2][1]


def test_the_model_in_memory_is_not_touched(
    tmp_path: Path, classifier_of: Classifiers, calibration_images: ImageSet
) -> None:
    classifier = classifier_of("plain")
    before = classifier.original.graph.initializers, classifier.path.read_bytes()
    arrays = {name: value.const_value.numpy().copy() for name, value in before[0].items() if value.const_value}
    quantize(classifier, calibration_images, tmp_path / "out.onnx", TRAINED, 4, 4)
    after = {name: value.const_value.numpy() for name, value in before[0].items() if value.const_value}
    assert arrays.keys() == after.keys()
    assert all((arrays[name] == after[name]).all() for name in arrays)
    assert classifier.path.read_bytes() == before[1]


class Watching(Silent):
    """Notes how much of each task was done, and can stop the work."""

    def __init__(self, stop_after: float | None = None) -> None:
        self.tasks: dict[str, list[float]] = {}
        self.stop_after, self.now = stop_after, ""

    @contextmanager
    def task(self, name: str, total: float) -> Iterator[Watching]:
        self.now = name
        self.tasks[name] = [0, total]
        yield self

    def advance(self, steps: float = 1, note: str | None = None) -> None:
        self.tasks[self.now][0] += steps
        if self.stop_after is not None and sum(done for done, _ in self.tasks.values()) > self.stop_after:
            raise KeyboardInterrupt


@pytest.mark.parametrize(("unit", "bits"), [("none", 4), ("layer", 4), ("block", 4), ("block", 8)])
def test_progress_comes_to_its_end(
    unit: str, bits: int, tmp_path: Path, classifier_of: Classifiers, calibration_images: ImageSet
) -> None:
    watching = Watching()
    settings = TRAINED.model_copy(update={"unit": unit})
    quantize(classifier_of("plain"), calibration_images, tmp_path / "o.onnx", settings, bits, progress=watching)
    assert watching.tasks
    assert {name: done for name, (done, _) in watching.tasks.items()} == {n: t for n, (_, t) in watching.tasks.items()}


def test_an_interrupted_quantization_leaves_no_file(
    tmp_path: Path, classifier_of: Classifiers, calibration_images: ImageSet
) -> None:
    with pytest.raises(KeyboardInterrupt):
        quantize(classifier_of("plain"), calibration_images, tmp_path / "o.onnx", TRAINED, 4, progress=Watching(9))
    assert list(tmp_path.iterdir()) == []
