"""Which layer gets how many bits, and why: the placement is what most disputed figures come down to, so it is said.

`--bits B` gives each layer B bits at least. Up to `extra_share` of what lies between B bits and 8 is added where it
takes the most noise out of the logits, each layer's noise measured alone at each width, the allocation exact
(`recipes.allocate`); no more than `enough_snr` needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from converters.errors import MixMixError
from converters.kernels import values_between
from converters.targets import INT4, MAX_BITS, SAFE_BITS, Target
from converters.torch_module import Layer, TorchClassifier
from recipes.allocate import ROUNDING, Choice, allocate
from recipes.quantize.primitives import Granularity
from recipes.quantize.quantizers import QuantizedWeight
from recipes.quantize.settings import QuantizeSettings
from recipes.sensitivity import Before, logit_noise

WIDTHS = (2, 3, 4, 6, 8)
Noise = dict[str, list[float]]
"""By layer output, the noise at each of some widths."""
Advance = Callable[[], None]
Keep = Callable[[int, Callable[[Advance], Noise]], Noise]
"""Gives what it is told to measure, in so many steps, or what was measured before."""


def at_once(_: int, measure: Callable[[Advance], Noise]) -> Noise:
    """Measure, and keep nothing."""
    return measure(lambda: None)


SCALE_BITS = 32
MOST = "where more bits take the most noise out of the logits"


@dataclass(frozen=True)
class LayerPlan:
    """One layer: its bits, and the reason where they differ from what was asked for."""

    layer: Layer
    bits: int
    act_bits: int | None
    reason: str | None = None
    snr: float | None = None
    """Logit signal-to-noise ratio in dB with this layer alone rounded to the bits asked for."""


def decibels(noise: float) -> float:
    """10 log10 of the signal-to-noise ratio; infinite where there is no noise."""
    return -10 * math.log10(noise) if noise else math.inf


def noise_of(snr: float) -> float:
    """The noise-to-signal ratio of `snr` decibels."""
    return float(10 ** (-snr / 10))


def layers_to_quantize(module: TorchClassifier) -> list[Layer]:
    """The weighted layers, in order. Raises MixMixError where the model has none."""
    layers = module.layers()
    if not layers:
        raise MixMixError(f"{module.classifier.path} has no layer with constant weights: there is nothing to quantize")
    return layers


def activation_bits(layers: Sequence[Layer], act_bits: int | None, settings: QuantizeSettings) -> list[int | None]:
    """Bits of each layer's input: what was asked for, and at least `end_bits` for the first and the last."""
    if act_bits is None:
        return [None] * len(layers)
    return [max(act_bits, settings.end_bits) if layer in (layers[0], layers[-1]) else act_bits for layer in layers]


def widest(target: Target, settings: QuantizeSettings, act_bits: int | None) -> int:
    """The most bits that a weight may have: 7 where products with the quantized input could saturate.

    An input of fewer bits than 8 may yet get 8; one of 16 is multiplied in float.
    """
    in_integers = act_bits is not None and act_bits <= MAX_BITS
    return SAFE_BITS if target.saturates and settings.reduce_range and in_integers else MAX_BITS


def group_size(layer: Layer, bits: int, act_bits: int | None, target: Target, settings: QuantizeSettings) -> int:
    """How many inputs of an output channel share a scale; 0 for all of them.

    Groups are for few bits beside float inputs: integer kernels take one scale a channel, and 8 bits need no more.
    """
    few = act_bits is None and target.weight_container(bits).bits <= INT4.bits
    return settings.group_size if few and 0 < settings.group_size < layer.shape[1 - layer.axis] else 0


def scale_bits(layer: Layer, bits: int, act_bits: int | None, target: Target, settings: QuantizeSettings) -> int:
    """Bits of the file that the layer's scales and zero points take, beyond those of one a channel."""
    size = group_size(layer, bits, act_bits, target, settings)
    more = math.prod(Granularity(layer.shape, layer.axis, size).scales) - layer.shape[layer.axis]
    return more * (SCALE_BITS + target.weight_container(bits).bits)


def quantized_weight(
    weight: Tensor, layer: Layer, bits: int, act_bits: int | None, target: Target, settings: QuantizeSettings
) -> QuantizedWeight:
    """A layer's weight at `bits` bits as `target` wants it, beside an input of `act_bits`."""
    symmetric, size = target.symmetric(bits, act_bits), group_size(layer, bits, act_bits, target, settings)
    return QuantizedWeight(weight, layer.axis, bits, settings, symmetric, size)


def measure_noise(
    module: TorchClassifier,
    inputs: Tensor,
    widths: Sequence[int],
    act_bits: int | None,
    target: Target,
    settings: QuantizeSettings,
    advance: Advance = lambda: None,
) -> Noise:
    """Noise-to-signal ratio of the logits with each layer alone rounded to nearest at each width, by layer output.

    `widths` rise; more bits never hurt. `inputs` [N, ...] are model inputs, of which `sensitive_images` are used.
    """

    def versions(layer: Layer, before: Before) -> Iterator[dict[str, Tensor]]:
        weight = module.constant(layer.weight)
        for bits in widths:
            yield {layer.weight: quantized_weight(weight, layer, bits, act_bits, target, settings).tensor()}

    count = settings.sensitive_images
    noise = logit_noise(module, inputs[:count], versions, count, settings, advance)
    return {name: list(np.minimum.accumulate(found)) for name, found in noise.items()}


def plan_bits(
    module: TorchClassifier,
    inputs: Tensor,
    bits: int,
    act_bits: int | None,
    target: Target,
    settings: QuantizeSettings,
    keep: Keep = at_once,
) -> list[LayerPlan]:
    """The placement for every layer, in order. `inputs` [N, ...] are model inputs to measure on.

    Raises MixMixError where the model has no layer.
    """
    layers = layers_to_quantize(module)
    acts = activation_bits(layers, act_bits, settings)
    most = widest(target, settings, act_bits)
    widths = _widths(min(bits, most), most, target)
    extra = settings.extra_share * (MAX_BITS - widths[0])
    if not extra or widths == [most]:
        return [
            LayerPlan(layer, widths[0], act, _why(bits, widths[0], act, act_bits))
            for layer, act in zip(layers, acts, strict=True)
        ]
    noise = keep(
        len(layers), lambda advance: measure_noise(module, inputs, widths, act_bits, target, settings, advance)
    )
    total = sum(layer.parameters for layer in layers)
    of_scales = [[scale_bits(layer, width, act_bits, target, settings) / total for width in widths] for layer in layers]
    choices = [
        [
            Choice(layer.parameters * _occupied(width, widths[0], target) / total + scales, harm)
            for width, harm, scales in zip(widths, noise[layer.output], row, strict=True)
        ]
        for layer, row in zip(layers, of_scales, strict=True)
    ]
    budget = widths[0] + extra + sum(row[0] for row in of_scales)
    chosen = [widths[index] for index in allocate_enough(choices, budget, noise_of(settings.enough_snr))]
    alone = [decibels(noise[layer.output][0]) for layer in layers]
    return [
        LayerPlan(layer, width, act, _why(bits, width, act, act_bits), snr)
        for layer, width, act, snr in zip(layers, chosen, acts, alone, strict=True)
    ]


def allocate_enough(choices: Sequence[Sequence[Choice]], budget: float, enough: float) -> list[int]:
    """The index of each layer's choice: the least harm within `budget`, or less cost where the harm is still `enough`.

    Raises MixMixError when even the cheapest choices exceed the budget.
    """
    least = sum(min(choice.harm for choice in row) for row in choices)
    if least <= enough:
        exchanged = [[Choice(choice.harm, choice.cost) for choice in row] for row in choices]
        found = allocate(exchanged, enough)
        if sum(row[index].cost for row, index in zip(choices, found, strict=True)) <= budget * (1 + ROUNDING):
            return found
    return allocate(choices, budget)


def _widths(bits: int, most: int, target: Target) -> list[int]:
    """What a layer may have, from `bits` up: widths that the container of `bits` holds, and all of wider containers."""
    first = target.weight_container(bits).bits
    held = {width for width in WIDTHS if bits <= width <= first} | {bits}
    wider = {container.bits for container in target.weights if container.bits > first}
    return sorted({min(width, most) for width in held | wider})


def _occupied(width: int, bits: int, target: Target) -> int:
    """Bits that a weight of `width` takes beside those of `bits`: of a wider container, all."""
    container = target.weight_container(width)
    return width if container == target.weight_container(bits) else container.bits


def _why(bits: int, width: int, act: int | None, act_bits: int | None) -> str | None:
    """Why a layer has other bits than what was asked for."""
    if width < bits:
        return "8 bits saturate on processors without VNNI"
    if width > bits:
        return MOST
    return "input of the first or the last layer" if act != act_bits else None


def input_bits(plans: Sequence[LayerPlan]) -> dict[str, int]:
    """Bits of the quantized inputs of layers, the widest where layers share one."""
    found: dict[str, int] = {}
    for plan in plans:
        if plan.act_bits is not None:
            found[plan.layer.input] = max(found.get(plan.layer.input, 0), plan.act_bits)
    return found


def plan_values(
    module: TorchClassifier, plans: Sequence[LayerPlan], act_bits: int | None, target: Target
) -> dict[str, int]:
    """Bits of every value to quantize, in order: inputs of layers, the widest where layers share, and at 8 bits what
    keeps integer kernels apart."""
    found = input_bits(plans)
    if act_bits is not None and target.integer_kernels:
        found = dict.fromkeys(values_between(module), MAX_BITS) | found
    return {name: found[name] for name in module.values if name in found}
