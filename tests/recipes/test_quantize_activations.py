"""Which inputs get more bits than was asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from converters.classifier import Classifier
from converters.targets import PORTABLE, SAFE_BITS, choose_target
from converters.torch_module import Segment, TorchClassifier
from recipes.budget import Budget
from recipes.images import ImageSet
from recipes.inspect import layer_macs
from recipes.quantize.activations import place_activations
from recipes.quantize.engine import ACTIVATION_SAMPLE, _Run, quantize
from recipes.quantize.plan import LayerPlan, plan_bits
from recipes.quantize.primitives import spread
from recipes.quantize.quantizers import QuantizedActivation
from recipes.quantize.settings import QuantizeSettings
from recipes.reconstruct import Stretch
from recipes.sensitivity import noise_to_signal, value_noise

NEAREST = QuantizeSettings(unit="none", range_steps=10)
Modules = Callable[[str], TorchClassifier]
Classifiers = Callable[[str], Classifier]


def placed(
    module: TorchClassifier, images: ImageSet, act_bits: int | None, **settings: float
) -> tuple[list[LayerPlan], list[LayerPlan]]:
    """The plans with bits of weights alone, and with those of inputs."""
    inputs, changed = module.spec.to_input(images.pixels[:8]), NEAREST.model_copy(update=settings)
    plans = plan_bits(module, inputs, SAFE_BITS, act_bits, PORTABLE, changed)
    return plans, place_activations(module, inputs, plans, act_bits, PORTABLE, changed)


def average_bits(module: TorchClassifier, plans: Sequence[LayerPlan], asked: int, before: Sequence[LayerPlan]) -> float:
    """Bits an element of one image, of the values that had what was asked for."""
    widths = {new.layer.input: new.act_bits for new, old in zip(plans, before, strict=True) if old.act_bits == asked}
    found = module.segment([module.input_name], list(widths))({module.input_name: module.black_image()})
    sizes = {name: value.numel() for name, value in found.items()}
    return sum(size * (widths[name] or 0) for name, size in sizes.items()) / sum(sizes.values())


@pytest.mark.parametrize("share", [0.02, 0.5])
@pytest.mark.parametrize("act_bits", [2, 3])
@pytest.mark.parametrize("model", ["excite", "dense"])
def test_bits_are_added_within_the_share(
    model: str, act_bits: int, share: float, module_of: Modules, calibration_images: ImageSet
) -> None:
    module = module_of(model)
    before, after = placed(module, calibration_images, act_bits, extra_share=share, enough_snr=1000.0)
    allowed = act_bits + share * (8 - act_bits)
    assert allowed - 0.3 < average_bits(module, after, act_bits, before) <= allowed + 1e-9
    assert (after[0].act_bits, after[-1].act_bits) == (8, 8)
    for old, new in zip(before, after, strict=True):
        assert (new.layer, new.bits) == (old.layer, old.bits)
        assert new.act_bits >= act_bits
        assert new.act_bits == old.act_bits or "more bits take the most noise" in str(new.reason)
    widths: dict[str, set[int | None]] = {}
    for plan in after:
        widths.setdefault(plan.layer.input, set()).add(plan.act_bits)
    assert all(len(found) == 1 for found in widths.values())  # who reads one value reads it at one width


def test_the_value_that_hurts_most_gets_them(module_of: Modules, calibration_images: ImageSet) -> None:
    """What HardSwish leaves for a depthwise convolution, with one scale for all its channels."""
    module = module_of("excite")
    _, after = placed(module, calibration_images, 4)
    inputs = module.spec.to_input(calibration_images.pixels[:8])
    values = list(dict.fromkeys(plan.layer.input for plan in after))

    def four_bits(value: torch.Tensor) -> list[QuantizedActivation]:
        return [QuantizedActivation(value.flatten(), 4, NEAREST)]

    noise = value_noise(module, inputs, values, four_bits, NEAREST)
    worst = max((name for name in noise if name != module.input_name), key=lambda name: noise[name][0])
    (bits,) = {plan.act_bits for plan in after if plan.layer.input == worst}
    assert bits > 4


@pytest.mark.parametrize(("act_bits", "share"), [(None, 0.1), (8, 0.1), (16, 0.1), (4, 0.0)])
def test_nothing_is_placed_where_nothing_is_to_be_added(
    act_bits: int | None, share: float, module_of: Modules, calibration_images: ImageSet
) -> None:
    before, after = placed(module_of("plain"), calibration_images, act_bits, extra_share=share)
    assert before == after


@pytest.mark.parametrize("model", ["residual", "attention"])
def test_noise_is_that_of_the_whole_model_with_one_value_quantized(
    model: str, module_of: Modules, calibration_images: ImageSet
) -> None:
    module = module_of(model)
    x = module.spec.to_input(calibration_images.pixels[:8])
    values = list(dict.fromkeys(layer.input for layer in module.layers()))

    def versions(value: torch.Tensor) -> list[QuantizedActivation]:
        return [QuantizedActivation(value.flatten(), bits, NEAREST) for bits in (3, 8)]

    noise = value_noise(module, x, values, versions, NEAREST)
    assert noise.keys() == set(values)
    known = {module.input_name: x}
    known |= module.segment([module.input_name], [value for value in values if value != module.input_name])(known)
    reference = module(x)
    for name in values:
        for quantizer, measured in zip(versions(known[name]), noise[name], strict=True):
            logits = module.whole({module.input_name: x}, transforms={name: quantizer})[module.logits_name]
            assert measured == pytest.approx(noise_to_signal(reference, logits), rel=0.01)


def test_the_file_has_them(
    classifier_of: Classifiers, module_of: Modules, calibration_images: ImageSet, tmp_path: Path
) -> None:
    """As the account says; and a budget of bit operations, which counts them, is spent on them too."""
    images, settings = calibration_images.take(16), QuantizeSettings(unit="none", range_steps=10)
    result = quantize(classifier_of("excite"), images, tmp_path / "o.onnx", settings, 8, 4)
    assert {layer.act_bits for layer in result.layers} >= {4, 6}
    macs = layer_macs(module_of("excite"))
    budget = Budget("bops", 20.0 * sum(macs.values()))
    counted = quantize(classifier_of("excite"), images, tmp_path / "b.onnx", settings, budget, 4)
    assert {layer.act_bits for layer in counted.layers[1:-1]} >= {4, 6}
    spent = zip(macs.values(), counted.layers, strict=True)
    assert sum(each * (layer.bits or 32) * (layer.act_bits or 32) for each, layer in spent) <= budget.amount


def test_calibration_computes_what_lies_between_once_and_the_same(
    classifier_of: Classifiers, calibration_images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dense block has layer behind layer: from its input anew for each value, steps would grow with their square."""
    run, calibrate, steps = Segment.__call__, _Run._calibrate, {"in the block": 0, "calibrating": 0}
    inside = False

    def counting(self: Segment, *args: Any, **how: Any) -> dict[str, torch.Tensor]:
        steps["calibrating"] += inside * len(self.steps)
        return run(self, *args, **how)

    def watched(self: _Run, stretch: Stretch) -> None:
        nonlocal inside
        steps["in the block"] += len(stretch.segment.steps)
        inside = True
        calibrate(self, stretch)
        inside = False
        for name, bits in self._quantized_values(stretch).items():
            others = {other: value for other, value in self.quantizers.values.items() if other != name}
            anew = self.module.segment(stretch.block.inputs, [name])
            parameters = self.quantizers.changes.of(anew)["parameters"]
            seen = anew(stretch.changed_inputs, parameters, others)[name]
            again, found = (
                self._activation(name, spread(seen, len(seen), ACTIVATION_SAMPLE), bits),
                self.quantizers.values[name],
            )
            assert (again.scale, again.zero) == (found.scale, found.zero)

    monkeypatch.setattr(Segment, "__call__", counting)
    monkeypatch.setattr(_Run, "_calibrate", watched)
    few = ImageSet(calibration_images.pixels[:4])  # one batch
    quantize(classifier_of("dense"), few, tmp_path / "out.onnx", NEAREST, 8, 8, choose_target("ort-cpu", None, 8))
    assert 0.5 * steps["in the block"] < steps["calibrating"] <= steps["in the block"]
