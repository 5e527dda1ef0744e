"""Bits by layer within a budget: the budget is kept, and spent where it does most."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from converters import writeback
from converters.classifier import Classifier
from converters.errors import MixMixError
from converters.load import load_classifier
from converters.targets import PORTABLE, choose_target
from converters.torch_module import TorchClassifier
from recipes.allocate import Choice, allocate
from recipes.budget import Budget, Spending
from recipes.images import ImageSet
from recipes.inspect import layer_macs
from recipes.quantize.activations import input_widths
from recipes.quantize.engine import quantize
from recipes.quantize.mixed import _choose, _Option, plan_mixed
from recipes.quantize.plan import WIDTHS, Advance, Keep, LayerPlan, Noise, measure_noise
from recipes.quantize.settings import QuantizeSettings
from recipes.quantize.tables import file_size
from recipes.workpiece import begin
from tests import models

NEAREST = QuantizeSettings(unit="none", range_steps=10)
Classifiers = Callable[[str], Classifier]
Modules = Callable[[str], TorchClassifier]


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("size=2MB", Budget("size", 2e6)),
        ("size=1.5MiB", Budget("size", 1.5 * 2**20)),
        ("size=64kb", Budget("size", 64e3)),
        ("size=100B", Budget("size", 100)),
        ("bops=1.5G", Budget("bops", 1.5e9)),
        ("bops=20000", Budget("bops", 20000)),
        ("bits=3", Budget("bits", 3)),
        ("bits=2.5", Budget("bits", 2.5)),
        ("bops=.5G", Budget("bops", 5e8)),
    ],
)
def test_budgets_are_read(text: str, budget: Budget) -> None:
    assert Budget.parse(text) == budget


@pytest.mark.parametrize(
    ("budget", "spent", "told"),
    [
        (Budget("size", 2e6), 1.93e6, "1.93 of 2 MB"),
        (Budget("size", 500), 420, "420 of 500 B"),
        (Budget("bops", 1.5e9), 1.491e9, "1.491 of 1.5 G bit operations"),
        (Budget("bops", 2e13), 1.9e13, "19 of 20 T bit operations"),
        (Budget("bops", 500), 420, "420 of 500 bit operations"),
        (Budget("bits", 3), 2.9876, "2.99 of 3 bits a weight on average"),
    ],
)
def test_what_was_spent_is_told(budget: Budget, spent: float, told: str) -> None:
    assert str(Spending(budget, spent, binds=True)) == told
    assert str(Spending(budget, spent, binds=False)).startswith(f"{told} (more would")


def test_a_budget_binds_where_more_would_take_noise_out(module_of: Modules, calibration_images: ImageSet) -> None:
    """Not where a layer of zeros, which no bits make better, stays at the fewest."""
    module = module_of("plain")
    x = module.spec.to_input(calibration_images.pixels[:4])

    def nothing_in_the_second(_: int, measure: Callable[[Advance], Noise]) -> Noise:
        found = measure(lambda: None)
        found[module.layers()[1].output] = [0.0] * len(WIDTHS)
        return found

    for bits, binds in ((8, False), (3, True)):
        ask = (module, x, Budget("bits", bits), None, PORTABLE, NEAREST, lambda plans: 0, nothing_in_the_second)
        plans, spending = plan_mixed(*ask)
        assert spending.binds is binds
        weights = sum(plan.layer.parameters for plan in plans)
        assert spending.spent == pytest.approx(sum(p.layer.parameters * p.bits for p in plans) / weights)
        assert plans[1].bits == 2


@pytest.mark.parametrize(
    "text",
    ["", "2MB", "size", "size=", "size=2", "size=2XB", "size=-2MB", "size=0MB", "bits=3MB", "speed=3", "bops=nan"],
)
def test_what_is_no_budget_is_refused(text: str) -> None:
    with pytest.raises(MixMixError, match=r"is not a budget: write size=2MB, bops=1\.5G or bits=3"):
        Budget.parse(text)


@pytest.mark.parametrize("amount", [2.5, 3.0, 4.0])
def test_average_bits_are_within_the_budget_and_spent(
    amount: float, module_of: Modules, calibration_images: ImageSet
) -> None:
    module = module_of("inverted")
    x = module.spec.to_input(calibration_images.pixels[:8])
    plans, _ = plan_mixed(module, x, Budget("bits", amount), None, PORTABLE, NEAREST, lambda plans: 0)
    weights = sum(plan.layer.parameters for plan in plans)
    average = sum(plan.layer.parameters * plan.bits for plan in plans) / weights
    assert amount - 0.2 < average <= amount + 1e-9
    assert len({plan.bits for plan in plans}) > 1


def test_the_allocation_does_less_harm_than_the_same_bits_everywhere(
    module_of: Modules, calibration_images: ImageSet
) -> None:
    module = module_of("inverted")
    x = module.spec.to_input(calibration_images.pixels[:8])
    noise = measure_noise(module, x, (3,), None, PORTABLE, NEAREST)
    plans, _ = plan_mixed(module, x, Budget("bits", 3), None, PORTABLE, NEAREST, lambda plans: 0)
    mixed = sum(10 ** (-(plan.snr or 0.0) / 10) for plan in plans)
    assert mixed < 0.9 * sum(row[0] for row in noise.values())


@pytest.mark.parametrize("act_bits", [None, 3, 8])
def test_bit_operations_are_within_the_budget(
    act_bits: int | None, module_of: Modules, calibration_images: ImageSet
) -> None:
    module = module_of("residual")
    x = module.spec.to_input(calibration_images.pixels[:8])
    macs = layer_macs(module)
    amount = 3.3 * (act_bits or 32) * sum(macs.values())
    plans, _ = plan_mixed(module, x, Budget("bops", amount), act_bits, PORTABLE, NEAREST, lambda plans: 0)
    used = sum(macs[plan.layer.output] * plan.bits * (plan.act_bits or 32) for plan in plans)
    assert 0.9 * amount < used <= amount * (1 + 1e-9)
    assert all((plan.act_bits or 32) >= (act_bits or 32) for plan in plans)


def test_bits_of_weights_and_inputs_are_chosen_together(module_of: Modules, calibration_images: ImageSet) -> None:
    """Within the same bit operations there is less noise than with the inputs at the bits asked for, and layers that
    read one value agree on its bits."""
    module = module_of("residual")  # a shortcut's convolution reads what the block's first one reads
    x = module.spec.to_input(calibration_images.pixels[:8])
    amount = 12.0 * sum(layer_macs(module).values())
    told: dict[str, Noise] = {}

    def keep(name: str) -> Keep:
        def measured(_: int, measure: Callable[[Advance], Noise]) -> Noise:
            told[name] = measure(lambda: None)
            return told[name]

        return measured

    full = NEAREST.model_copy(update={"reduce_range": False})  # so that WIDTHS are what there is
    ask = (module, x, Budget("bops", amount), 3, PORTABLE, full, lambda plans: 0)
    plans, _ = plan_mixed(*ask, keep("weights"), keep("inputs"))
    readers: dict[str, set[int | None]] = {}
    for plan in plans:
        readers.setdefault(plan.layer.input, set()).add(plan.act_bits)
    assert len(readers) < len(plans)
    assert all(len(bits) == 1 for bits in readers.values())
    open_values = {value: bits for value, (bits,) in readers.items() if value in told["inputs"]}
    assert len(set(open_values.values())) > 1
    widths = input_widths(3)

    def harm(plans: list[LayerPlan], bits: dict[str, int | None]) -> float:
        of_weights = sum(told["weights"][plan.layer.output][WIDTHS.index(plan.bits)] for plan in plans)
        return of_weights + sum(told["inputs"][value][widths.index(b or 0)] for value, b in bits.items())

    macs = layer_macs(module)
    costs = [
        [
            Choice(float(macs[p.layer.output] * b * (p.act_bits if p.layer.input not in told["inputs"] else 3)), n)
            for b, n in zip(WIDTHS, told["weights"][p.layer.output], strict=True)
        ]
        for p in plans
    ]
    alone = [replace(p, bits=WIDTHS[i]) for p, i in zip(plans, allocate(costs, amount), strict=True)]
    assert harm(plans, open_values) < 0.8 * harm(alone, dict.fromkeys(open_values, 3))


@pytest.mark.parametrize(
    ("model", "container", "act_bits", "group_size"),
    [
        ("inverted", "int4", None, 0),
        ("attention", "int2", None, 0),
        ("plain", "int4", 8, 0),
        ("residual", "int4", None, 16),
        ("attention", "int2", None, 32),
    ],
)
def test_the_written_file_has_the_size_that_was_asked_for(
    model: str,
    container: str,
    act_bits: int | None,
    group_size: int,
    classifier_of: Classifiers,
    calibration_images: ImageSet,
    tmp_path: Path,
) -> None:
    """No larger, and no smaller than by what the last layer that did not fit would have needed."""
    target = choose_target("portable", container, act_bits)
    ask, how = (classifier_of(model), calibration_images), NEAREST.model_copy(update={"group_size": group_size})
    least = quantize(*ask, tmp_path / "a.onnx", how, Budget("bits", 2), act_bits, target).size_after
    budget = least + 0.2 * classifier_of(model).parameter_count()
    result = quantize(*ask, tmp_path / "b.onnx", how, Budget("size", budget), act_bits, target)
    assert result.size_after == (tmp_path / "b.onnx").stat().st_size
    assert 0.85 * budget < result.size_after <= budget
    assert result.bits is None
    assert result.kept == []
    most = 8 if act_bits is None else 7
    assert {layer.bits for layer in result.layers} <= ({2, 4, most} if container == "int2" else {4, most})


@pytest.mark.parametrize("act_bits", [None, 8])
def test_biases_that_an_exporter_merged_are_counted_apart(
    act_bits: int | None, small_images: ImageSet, tmp_path: Path
) -> None:
    """Several layers read one bias of zeros; each of them learns its own."""
    nodes: list[onnx.NodeProto] = []
    tensors, channels = {"zeros": np.zeros(32, np.float32)}, models.CHANNELS
    for index, source in enumerate(["image", "f0", "f1", "f2"]):
        nodes.append(models.node("Conv", f"{source} w{index} zeros", f"f{index}"))
        tensors[f"w{index}"] = models.weights(32, channels, 1, 1, seed=index)
        channels = 32
    model = models.assemble([*nodes, *models.head("f3")], tensors | models.head_tensors(32))
    classifier = load_classifier(models.write(model, tmp_path / "m.onnx"))
    settings = QuantizeSettings(unit="block", steps=4, range_steps=10, bias_rate=0.1)
    ask = (classifier, small_images, tmp_path / "o.onnx", settings)
    least = quantize(*ask, Budget("bits", 4), act_bits).size_after
    for amount in (least + 250, least + 500, least + 800):
        result = quantize(*ask, Budget("size", amount), act_bits, overwrite=True)
        assert (tmp_path / "o.onnx").stat().st_size == result.size_after <= amount


def test_lengths_that_grow_with_tensors_are_within_the_budget(
    module_of: Modules, calibration_images: ImageSet, tmp_path: Path
) -> None:
    """A file says how long each tensor is, in more bytes for a longer one: where nothing is to spare, that counts."""
    target = choose_target("portable", "int2", None)
    prepared = writeback.prepare_for_quantization(module_of("shuffle").classifier, target, 2, None)
    module = begin(prepared, tmp_path / "never.onnx", None, overwrite=True)
    x, known = module.spec.to_input(calibration_images.pixels[:1]), dict[int, Noise]()

    def once(count: int, measure: Callable[[Advance], Noise]) -> Noise:
        if count not in known:
            known[count] = measure(lambda: None)
        return known[count]

    def size(plans: Sequence[LayerPlan]) -> int:
        return file_size(module, plans, None, target, NEAREST, {})

    def plan(amount: float) -> tuple[list[LayerPlan], Spending]:
        return plan_mixed(module, x, Budget("size", amount), None, target, NEAREST, size, once)

    amount, sizes = 70_000.0, set[int]()
    for _ in range(8):
        plans, spending = plan(amount)
        assert spending.spent == size(plans) <= amount
        assert plan(spending.spent)[1].spent <= spending.spent
        sizes.add(size(plans))
        amount = spending.spent - 1
    assert len(sizes) == 8


def test_a_budget_that_a_file_exceeds_by_less_than_rounding_is_not_tried_again_and_again() -> None:
    """One byte above 700 million: beyond the precision that costs are compared with."""
    options = [[_Option(None, (bits,), Choice(cost, harm)) for bits, cost, harm in ((4, 1e8, 1.0), (8, 7e8, 0.0))]]
    taken, spent = _choose(options, 7e8, 7e8, lambda taken: 7e8 + 1 if taken[0].widths == (8,) else 1e8)
    assert [option.widths for option in taken] == [(4,)]
    assert spent == 1e8


def test_seven_bits_are_offered_where_eight_would_saturate(module_of: Modules, calibration_images: ImageSet) -> None:
    """So that the budget is spent on what is written."""
    module = module_of("inverted")
    x = module.spec.to_input(calibration_images.pixels[:8])
    target = choose_target("ort-cpu", None, 8)
    plans, _ = plan_mixed(module, x, Budget("bits", 6), 8, target, NEAREST, lambda plans: 0)
    average = sum(p.layer.parameters * p.bits for p in plans) / sum(p.layer.parameters for p in plans)
    assert 5.95 < average <= 6
    assert {plan.bits for plan in plans} <= {2, 3, 4, 6, 7}


def test_a_budget_that_cannot_be_kept_is_refused_with_what_can(
    classifier_of: Classifiers, calibration_images: ImageSet, tmp_path: Path
) -> None:
    ask = (classifier_of("plain"), calibration_images, tmp_path / "o.onnx", NEAREST)
    with pytest.raises(MixMixError, match=r"size=10000B cannot be reached: with 4 bits everywhere it is size=\d+B"):
        quantize(*ask, Budget("size", 1e4))
    with pytest.raises(MixMixError, match=r"bits=1 cannot be reached: with 2 bits everywhere it is bits=2: allow more"):
        quantize(*ask, Budget("bits", 1))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("text", "act_bits"), [("size=1kB", None), ("bops=1", None), ("bops=1", 4)])
def test_what_is_said_to_be_enough_is_enough(
    text: str, act_bits: int | None, classifier_of: Classifiers, calibration_images: ImageSet, tmp_path: Path
) -> None:
    """As it is printed, to the last digit."""
    ask = (classifier_of("inverted"), calibration_images, tmp_path / "o.onnx", NEAREST)
    with pytest.raises(MixMixError, match="cannot be reached") as refused:
        quantize(*ask, Budget.parse(text), act_bits)
    found = re.search(r"it is (\w+=[\d.]+B?): allow more", str(refused.value))
    assert found is not None
    result = quantize(*ask, Budget.parse(found[1]), act_bits)
    if text.startswith("size"):
        assert result.size_after == Budget.parse(found[1]).amount


def test_what_a_file_of_four_bits_takes_is_enough_for_four_bits(
    classifier_of: Classifiers, calibration_images: ImageSet, tmp_path: Path
) -> None:
    """All that is not weights is counted as it will be, to the length of the words in the metadata."""
    settings = NEAREST.model_copy(update={"extra_share": 0.0})
    ask = (classifier_of("residual"), calibration_images)
    uniform = quantize(*ask, tmp_path / "a.onnx", settings, 4).size_after
    result = quantize(*ask, tmp_path / "b.onnx", settings, Budget("size", uniform + 20))
    assert uniform - 100 < result.size_after <= uniform + 20
