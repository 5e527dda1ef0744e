"""Placement of bits, and the contract around a quantization: refusals, files, seeds, progress."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from converters.classifier import Classifier
from converters.errors import MixMixError, OutputError
from converters.load import load_classifier
from converters.targets import PORTABLE, choose_target
from converters.torch_module import TorchClassifier
from recipes.allocate import Choice
from recipes.images import ImageSet
from recipes.progress import Silent
from recipes.quantize.engine import quantize
from recipes.quantize.plan import LayerPlan, allocate_enough, decibels, measure_noise, noise_of, plan_bits
from recipes.quantize.quantizers import QuantizedWeight
from recipes.quantize.settings import QuantizeSettings
from recipes.sensitivity import noise_to_signal

NEAREST = QuantizeSettings(unit="none", range_steps=10)
TRAINED = QuantizeSettings(unit="block", steps=3, batch=5, range_steps=10, activation_drop=0.5, input_drop=0.5)
Classifiers = Callable[[str], Classifier]
Modules = Callable[[str], TorchClassifier]


def plans(
    module: TorchClassifier, images: ImageSet, bits: int = 2, act_bits: int | None = None, **settings: float
) -> list[LayerPlan]:
    inputs = module.spec.to_input(images.pixels[:8])
    return plan_bits(module, inputs, bits, act_bits, PORTABLE, NEAREST.model_copy(update=settings))


def average_bits(found: Sequence[LayerPlan]) -> float:
    return sum(plan.bits * plan.layer.parameters for plan in found) / sum(plan.layer.parameters for plan in found)


@pytest.mark.parametrize("share", [0.02, 0.1, 0.4, 1.0])
@pytest.mark.parametrize("bits", [2, 3])
def test_bits_are_added_within_the_share(
    share: float, bits: int, module_of: Modules, calibration_images: ImageSet
) -> None:
    found = plans(module_of("inverted"), calibration_images, bits, extra_share=share, enough_snr=1000.0)
    assert all(plan.bits >= bits and plan.snr is not None for plan in found)
    assert all((plan.reason is None) == (plan.bits == bits) for plan in found)
    allowed = bits + share * (8 - bits)
    assert allowed - 0.1 < average_bits(found) <= allowed + 1e-9


def test_bits_go_where_they_take_most_noise_away(module_of: Modules, calibration_images: ImageSet) -> None:
    """No layer could give its bits to another and leave the logits less noise: the best of all placements."""
    module = module_of("plain")
    x = module.spec.to_input(calibration_images.pixels[:8])
    widths = (2, 3, 4, 8)
    noise = measure_noise(module, x, widths, None, PORTABLE, NEAREST)
    found = plans(module, calibration_images, extra_share=0.2, enough_snr=1000.0)
    sizes = [plan.layer.parameters for plan in found]

    def harm(placement: Sequence[int]) -> float:
        return sum(noise[p.layer.output][widths.index(bits)] for p, bits in zip(found, placement, strict=True))

    allowed = (2 + 0.2 * 6) * sum(sizes)
    possible = [
        harm(placement)
        for placement in itertools.product(widths, repeat=len(found))
        if sum(size * bits for size, bits in zip(sizes, placement, strict=True)) <= allowed
    ]
    assert harm([plan.bits for plan in found]) == pytest.approx(min(possible))


def test_no_more_is_added_than_is_enough(module_of: Modules, calibration_images: ImageSet) -> None:
    module = module_of("inverted")
    x = module.spec.to_input(calibration_images.pixels[:8])
    noise = measure_noise(module, x, (4, 8), None, PORTABLE, NEAREST)
    averages = []
    for enough in (15.0, 24.0, 26.0):
        found = plans(module, calibration_images, 4, extra_share=1.0, enough_snr=enough)
        total = sum(noise[plan.layer.output][(4, 8).index(plan.bits)] for plan in found)
        assert decibels(total) >= enough
        averages.append(average_bits(found))
    assert averages == sorted(averages)
    assert averages[0] == 4 < averages[1] < averages[2] < 8


@pytest.mark.parametrize(
    ("container", "bits", "widths"),
    [("int4", 2, {2, 3, 4, 8}), ("int4", 5, {5, 6, 8}), ("int2", 2, {2, 4, 8}), ("int8", 2, {2, 3, 4, 6, 8})],
)
def test_a_wider_container_is_used_in_full(
    container: str, bits: int, widths: set[int], module_of: Modules, calibration_images: ImageSet
) -> None:
    module = module_of("inverted")
    x = module.spec.to_input(calibration_images.pixels[:8])
    settings = NEAREST.model_copy(update={"extra_share": 0.3, "enough_snr": 1000.0})
    found = plan_bits(module, x, bits, None, choose_target("portable", container), settings)
    assert {plan.bits for plan in found} <= widths
    assert max(plan.bits for plan in found) == 8


@pytest.mark.parametrize("name", ["ort-cpu", "portable"])
def test_bits_that_would_saturate_are_not_given(name: str, module_of: Modules, calibration_images: ImageSet) -> None:
    module = module_of("plain")
    x = module.spec.to_input(calibration_images.pixels[:8])
    target = choose_target(name, None, 8)
    eight = plan_bits(module, x, 8, 8, target, NEAREST)
    assert {plan.bits for plan in eight} == {7}
    assert all(plan.reason is not None and plan.reason.startswith("8 bits saturate") for plan in eight)
    four = plan_bits(module, x, 4, 8, target, NEAREST.model_copy(update={"extra_share": 1.0, "enough_snr": 1000.0}))
    assert {plan.bits for plan in four} == {7}
    full = plan_bits(module, x, 8, 8, target, NEAREST.model_copy(update={"reduce_range": False}))
    assert {(plan.bits, plan.reason) for plan in full} == {(8, None)}
    in_float = [plan_bits(module, x, 8, act_bits, PORTABLE, NEAREST) for act_bits in (None, 16)]
    assert {plan.bits for found in in_float for plan in found} == {8}


def test_inputs_of_the_ends_have_their_own_bits(module_of: Modules, calibration_images: ImageSet) -> None:
    module = module_of("plain")
    found = plans(module, calibration_images, 4, 4, extra_share=0.0)
    assert [(plan.bits, plan.act_bits) for plan in found] == [(4, 8), *[(4, 4)] * 5, (4, 8)]
    assert found[0].reason == found[-1].reason == "input of the first or the last layer"
    assert [plan.layer for plan in found] == module.layers()
    low = plans(module, calibration_images, 2, 2, extra_share=0.0, end_bits=6)
    assert [plan.act_bits for plan in low] == [6, 2, 2, 2, 2, 2, 6]
    assert {(p.bits, p.reason) for p in plans(module, calibration_images, 8, None)} == {(8, None)}


@pytest.mark.parametrize("act_bits", [None, 8])
def test_ratios_are_those_of_the_whole_model_with_one_layer_rounded(
    act_bits: int | None, module_of: Modules, calibration_images: ImageSet
) -> None:
    """Rounded as it will be written: with zero point 0 where integer kernels may take it."""
    module = module_of("residual")
    x = module.spec.to_input(calibration_images.pixels[:8])
    noise = measure_noise(module, x, (3, 6), act_bits, PORTABLE, NEAREST)
    with torch.no_grad():
        reference = module(x)
        for layer in module.layers():
            for bits, measured in zip((3, 6), noise[layer.output], strict=True):
                symmetric = PORTABLE.symmetric(bits, act_bits)
                assert symmetric == (act_bits is not None and bits == 6)
                weight = module.constant(layer.weight)
                rounded = QuantizedWeight(weight, layer.axis, bits, NEAREST, symmetric).tensor()
                logits = module.whole({module.input_name: x}, {layer.weight: rounded})[module.logits_name]
                assert measured == pytest.approx(noise_to_signal(reference, logits), rel=0.01)


def test_inputs_of_the_ends_keep_their_bits_whatever_the_weights_have(
    module_of: Modules, calibration_images: ImageSet
) -> None:
    found = plans(module_of("plain"), calibration_images, 8, 4)
    assert [plan.act_bits for plan in found] == [8, 4, 4, 4, 4, 4, 8]


def test_decibels_are_of_power() -> None:
    reference = torch.tensor([[3.0, 4.0]])
    noise = noise_to_signal(reference, reference + torch.tensor([[0.3, 0.4]]))
    assert decibels(noise) == pytest.approx(20, abs=1e-4)
    assert decibels(noise_to_signal(reference, reference)) == float("inf")
    assert noise_of(decibels(0.01)) == pytest.approx(0.01)


@given(
    st.lists(
        st.lists(st.tuples(st.integers(1, 20), st.integers(0, 50)), min_size=1, max_size=4), min_size=1, max_size=5
    ),
    st.integers(0, 120),
    st.integers(0, 100),
)
def test_enough_is_the_cheapest_and_otherwise_the_best(
    rows: list[list[tuple[int, int]]], budget: int, enough: int
) -> None:
    choices = [[Choice(cost, harm) for cost, harm in row] for row in rows]
    every = [
        (sum(choice.cost for choice in chosen), sum(choice.harm for choice in chosen))
        for chosen in itertools.product(*choices)
    ]
    within = [(cost, harm) for cost, harm in every if cost <= budget]
    if not within:
        with pytest.raises(MixMixError, match="below what the cheapest choices cost"):
            allocate_enough(choices, budget, enough)
        return
    found = allocate_enough(choices, budget, enough)
    cost = sum(row[index].cost for row, index in zip(choices, found, strict=True))
    harm = sum(row[index].harm for row, index in zip(choices, found, strict=True))
    assert cost <= budget
    cheap = [c for c, h in within if h <= enough]
    if cheap:
        assert harm <= enough
        assert cost == min(cheap)
    else:
        assert harm == min(h for _, h in within)


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
    assert (stated["bits"], stated["act_bits"], stated["images"], stated["seed"]) == (4, 8, 16, 3)
    assert QuantizeSettings.model_validate(stated["settings"]) == NEAREST


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
    settings = TRAINED.model_copy(update={"unit": unit, "steps": 0 if unit == "none" else TRAINED.steps})
    quantize(classifier_of("plain"), calibration_images, tmp_path / "o.onnx", settings, bits, progress=watching)
    assert watching.tasks
    assert {name: done for name, (done, _) in watching.tasks.items()} == {n: t for n, (_, t) in watching.tasks.items()}


def test_an_interrupted_quantization_leaves_no_model(
    tmp_path: Path, classifier_of: Classifiers, calibration_images: ImageSet
) -> None:
    with pytest.raises(KeyboardInterrupt):
        quantize(classifier_of("plain"), calibration_images, tmp_path / "o.onnx", TRAINED, 4, progress=Watching(9))
    assert [path.suffix for path in tmp_path.iterdir()] == [".partial"]  # what was measured
