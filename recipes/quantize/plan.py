"""Which layer gets how many bits, and why: the placement is what most disputed figures come down to, so it is said.

First and last layer at `end_bits`. Then the layers that hurt most: each remaining layer is rounded alone, and those
that bring the logits below `sensitive_snr` dB are kept at `sensitive_bits` while they fit the share of the weights
that may be kept, those first that add the most noise for each weight (a depthwise layer costs next to nothing).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from converters.torch_module import Layer, TorchClassifier
from recipes.quantize.quantizers import QuantizedWeight
from recipes.quantize.settings import QuantizeSettings


@dataclass(frozen=True)
class LayerPlan:
    """One layer: its bits, and the reason where they differ from what was asked for."""

    layer: Layer
    bits: int
    act_bits: int | None
    reason: str | None = None
    snr: float | None = None
    """Logit signal-to-noise ratio in dB with this layer alone rounded to the bits asked for."""


def signal_to_noise(reference: Tensor, other: Tensor) -> float:
    """10 log10 of the reference's power over the difference's, in dB; infinite where they are equal."""
    noise = (other - reference).double().square().sum()
    return float(10 * torch.log10(reference.double().square().sum() / noise))


@torch.no_grad()
def plan_bits(
    module: TorchClassifier,
    inputs: Tensor,
    bits: int,
    act_bits: int | None,
    settings: QuantizeSettings,
    advance: Callable[[], None] = lambda: None,
) -> list[LayerPlan]:
    """The placement for every layer, in order. `inputs` [N, ...] are model inputs to measure on."""
    layers = module.layers()
    ends = {0: "first layer", len(layers) - 1: "last layer"}
    plans = []
    for index, layer in enumerate(layers):
        wide = settings.end_bits if index in ends else 0
        act = None if act_bits is None else max(act_bits, wide)
        changed = max(bits, wide) != bits or act != act_bits
        plans.append(LayerPlan(layer, max(bits, wide), act, ends[index] if changed else None))
    if bits >= settings.sensitive_bits or settings.sensitive_share == 0:
        for _ in plans:
            advance()
        return plans
    x = inputs[: settings.sensitive_images]
    reference = module(x)
    for index, plan in enumerate(plans):
        if plan.reason is None:
            rounded = QuantizedWeight(module.constant(plan.layer.weight), plan.layer.axis, bits, settings)
            logits = module.whole({module.input_name: x}, {plan.layer.weight: rounded.tensor()})[module.logits_name]
            plans[index] = replace(plan, snr=signal_to_noise(reference, logits))
        advance()
    return _keep_worst(plans, settings)


def _keep_worst(plans: Sequence[LayerPlan], settings: QuantizeSettings) -> list[LayerPlan]:
    budget = settings.sensitive_share * sum(plan.layer.parameters for plan in plans)
    kept = {}
    hurting = [plan for plan in plans if plan.snr is not None and plan.snr < settings.sensitive_snr]
    for plan in sorted(hurting, key=_noise_per_weight, reverse=True):
        if plan.layer.parameters <= budget:
            budget -= plan.layer.parameters
            reason = f"hurts most: alone it leaves the logits {plan.snr:.1f} dB"
            kept[plan.layer.output] = replace(plan, bits=settings.sensitive_bits, reason=reason)
    return [kept.get(plan.layer.output, plan) for plan in plans]


def _noise_per_weight(plan: LayerPlan) -> float:
    """Noise-to-signal ratio of the logits over the number of the layer's weights."""
    return float(10 ** (-(plan.snr or 0.0) / 10)) / plan.layer.parameters
