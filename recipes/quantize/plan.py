"""Which layer gets how many bits, and why: the placement is what most disputed figures come down to, so it is said.

The first layer at `end_bits`, and the last unless it holds more than `end_share` of the weights: then it would decide
the file's size, and is judged as the others are. Those are rounded one at a time, and the layers that hurt most, by the
noise in the logits for each weight (a depthwise layer costs next to nothing), are kept at `sensitive_bits` until the
share of the weights that may be kept is used up or what is left does no harm (`sensitive_snr`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from converters.errors import MixMixError
from converters.kernels import values_between
from converters.targets import MAX_BITS, SAFE_BITS, Target
from converters.torch_module import Layer, TorchClassifier
from recipes.quantize.quantizers import QuantizedWeight
from recipes.quantize.settings import QuantizeSettings
from recipes.sensitivity import logit_noise


@dataclass(frozen=True)
class LayerPlan:
    """One layer: its bits, and the reason where they differ from what was asked for."""

    layer: Layer
    bits: int
    act_bits: int | None
    reason: str | None = None
    snr: float | None = None
    """Logit signal-to-noise ratio in dB with this layer alone rounded to the bits asked for."""

    def kept(self, bits: int) -> bool:
        """Whether the weight has more than the `bits` asked for."""
        return self.bits > bits


def decibels(noise: float) -> float:
    """10 log10 of the signal-to-noise ratio; infinite where there is no noise."""
    return -10 * math.log10(noise) if noise else math.inf


def layers_to_quantize(module: TorchClassifier) -> list[Layer]:
    """The weighted layers, in order. Raises MixMixError where the model has none."""
    layers = module.layers()
    if not layers:
        raise MixMixError(f"{module.classifier.path} has no layer with constant weights: there is nothing to quantize")
    return layers


def rounded(module: TorchClassifier, layer: Layer, bits: int, target: Target, settings: QuantizeSettings) -> Tensor:
    """A layer's weight rounded to nearest at `bits` bits: what its noise is measured with."""
    weight = module.constant(layer.weight)
    return QuantizedWeight(weight, layer.axis, bits, settings, target.symmetric_weights).tensor()


@torch.no_grad()
def plan_bits(
    module: TorchClassifier,
    inputs: Tensor,
    bits: int,
    act_bits: int | None,
    target: Target,
    settings: QuantizeSettings,
    advance: Callable[[], None] = lambda: None,
) -> list[LayerPlan]:
    """The placement for every layer, in order. `inputs` [N, ...] are model inputs to measure on.

    Raises MixMixError where the model has no layer.
    """
    layers = layers_to_quantize(module)
    total = sum(layer.parameters for layer in layers)
    ends = {layers[0].output: "first layer"}
    if len(layers) > 1 and layers[-1].parameters <= settings.end_share * total:
        ends[layers[-1].output] = "last layer"
    measured = bits < settings.sensitive_bits and settings.sensitive_share > 0
    sample = inputs[: settings.sensitive_images]
    ratios = _ratios(module, sample, bits, ends, target, settings, advance) if measured else {}
    if not measured:
        for _ in layers:
            advance()
    plans = []
    for layer, act in zip(layers, activation_bits(layers, act_bits, settings), strict=True):
        wide = settings.end_bits if layer.output in ends else 0
        changed = max(bits, wide) != bits or act != act_bits
        reason = ends.get(layer.output, "last layer's input") if changed else None
        plans.append(LayerPlan(layer, max(bits, wide), act, reason, ratios.get(layer.output)))
    return _at_most(_keep_worst(plans, settings), widest(target, settings, act_bits))


def activation_bits(layers: Sequence[Layer], act_bits: int | None, settings: QuantizeSettings) -> list[int | None]:
    """Bits of each layer's input: what was asked for, and at least `end_bits` for the first and the last."""
    if act_bits is None:
        return [None] * len(layers)
    return [max(act_bits, settings.end_bits) if layer in (layers[0], layers[-1]) else act_bits for layer in layers]


def plan_values(
    module: TorchClassifier, plans: Sequence[LayerPlan], act_bits: int | None, target: Target
) -> dict[str, int]:
    """Bits of every value to quantize, in order: inputs of layers, the widest where layers share, and at 8 bits what
    keeps integer kernels apart."""
    found: dict[str, int] = {}
    for plan in plans:
        if plan.act_bits is not None:
            found[plan.layer.input] = max(found.get(plan.layer.input, 0), plan.act_bits)
    if act_bits is not None and target.integer_kernels:
        found = dict.fromkeys(values_between(module), MAX_BITS) | found
    return {name: found[name] for name in module.values if name in found}


def widest(target: Target, settings: QuantizeSettings, act_bits: int | None) -> int:
    """The most bits that a weight may have: 7 where products with the quantized input could saturate."""
    return SAFE_BITS if target.saturates and settings.reduce_range and act_bits is not None else MAX_BITS


def _at_most(plans: Sequence[LayerPlan], bits: int) -> list[LayerPlan]:
    """The same with no weight above `bits`, and the reason."""
    reason = "8 bits saturate on processors without VNNI"
    return [
        replace(plan, bits=bits, reason=f"{plan.reason}; {reason}" if plan.reason else reason)
        if plan.bits > bits
        else plan
        for plan in plans
    ]


def _ratios(
    module: TorchClassifier,
    inputs: Tensor,
    bits: int,
    ends: Mapping[str, str],
    target: Target,
    settings: QuantizeSettings,
    advance: Callable[[], None],
) -> dict[str, float]:
    """Logit signal-to-noise ratio in dB with one layer alone rounded, by layer output, for all layers but `ends`."""

    def versions(layer: Layer) -> list[Tensor]:
        return [] if layer.output in ends else [rounded(module, layer, bits, target, settings)]

    noise = logit_noise(module, inputs, versions, settings.max_chain, advance)
    return {name: decibels(found[0]) for name, found in noise.items() if found}


def _keep_worst(plans: Sequence[LayerPlan], settings: QuantizeSettings) -> list[LayerPlan]:
    budget = settings.sensitive_share * sum(plan.layer.parameters for plan in plans)
    kept = {}
    hurting = [plan for plan in plans if plan.snr is not None and plan.snr < settings.sensitive_snr]
    for plan in sorted(hurting, key=_noise_per_weight, reverse=True):
        if plan.layer.parameters <= budget:
            budget -= plan.layer.parameters
            reason = f"alone it leaves the logits {plan.snr:.1f} dB"
            kept[plan.layer.output] = replace(plan, bits=settings.sensitive_bits, reason=reason)
    return [kept.get(plan.layer.output, plan) for plan in plans]


def _noise_per_weight(plan: LayerPlan) -> float:
    """Noise-to-signal ratio of the logits over the number of the layer's weights."""
    return float(10 ** (-(plan.snr or 0.0) / 10)) / plan.layer.parameters
