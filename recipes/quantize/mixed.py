"""Bits by layer under one budget.

    minimise  sum_l noise_l(b_l)   subject to   sum_l cost_l(b_l) <= budget

noise_l(b) is the noise-to-signal ratio of the logits with layer l alone rounded to b bits. The cost is one of

- `size`: bytes of the written file. Weights of 3 bits are stored in 4, so only full containers are offered;
- `bops`: bit operations for one image, multiply-accumulates x bits of the weight x bits of the input (32 for float);
- `bits`: bits a weight, on average.

The allocation is exact (`recipes.allocate`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
from torch import Tensor

from converters.errors import MixMixError
from converters.targets import MAX_BITS, MIN_BITS, Target
from converters.torch_module import Layer, TorchClassifier
from recipes.allocate import ROUNDING, Choice, allocate
from recipes.inspect import layer_macs
from recipes.quantize.plan import LayerPlan, activation_bits, decibels, within_reach
from recipes.quantize.quantizers import QuantizedWeight
from recipes.quantize.settings import QuantizeSettings
from recipes.sensitivity import logit_noise

Kind = Literal["size", "bops", "bits"]
WIDTHS = (2, 3, 4, 6, 8)
FLOAT_BITS = 32
UNITS: Mapping[Kind, Mapping[str, float]] = {
    "size": {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30},
    "bops": {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12},
    "bits": {"": 1},
}


@dataclass(frozen=True)
class Budget:
    """What all layers may cost together, in bytes, bit operations or bits a weight."""

    kind: Kind
    amount: float

    @classmethod
    def parse(cls, text: str) -> Budget:
        """From `size=2MB`, `bops=1.5G` or `bits=3`. Raises MixMixError for anything else."""
        found = re.fullmatch(r"(\w+)=([0-9]*\.?[0-9]+)\s*([A-Za-z]*)", text.strip())
        kind = next((kind for kind in get_args(Kind) if found is not None and found[1] == kind), None)
        if found is not None and kind is not None:
            unit = next((UNITS[kind][u] for u in UNITS[kind] if u.lower() == found[3].lower()), None)
            if unit is not None and float(found[2]) > 0:
                return cls(kind, float(found[2]) * unit)
        raise MixMixError(f"--mixed {text!r} is not a budget: write size=2MB, bops=1.5G or bits=3")

    def __str__(self) -> str:
        return f"{self.kind}={self.amount:.6g}" + ("B" if self.kind == "size" else "")


def measure_noise(
    module: TorchClassifier,
    inputs: Tensor,
    widths: Sequence[int],
    target: Target,
    settings: QuantizeSettings,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Noise-to-signal ratio of the logits for each width, each layer alone, by layer output; more bits never hurt."""

    def versions(layer: Layer) -> list[Tensor]:
        weight, symmetric = module.constant(layer.weight), target.symmetric_weights
        return [QuantizedWeight(weight, layer.axis, bits, settings, symmetric).tensor() for bits in widths]

    noise = logit_noise(module, inputs[: settings.sensitive_images], versions, settings.max_chain, advance)
    return {name: list(np.minimum.accumulate(found)) for name, found in noise.items()}


def plan_mixed(
    module: TorchClassifier,
    inputs: Tensor,
    budget: Budget,
    act_bits: int | None,
    target: Target,
    settings: QuantizeSettings,
    file_size: Callable[[Sequence[LayerPlan]], int],
    advance: Callable[[], None] = lambda: None,
) -> list[LayerPlan]:
    """The placement with the least noise within `budget`. `inputs` [N, ...] are model inputs to measure on.

    `file_size` gives the bytes of the file that a placement is written as. Raises MixMixError where the model has no
    layer, or where even the fewest bits cost more than the budget.
    """
    layers = module.layers()
    if not layers:
        raise MixMixError(f"{module.classifier.path} has no layer with constant weights: there is nothing to quantize")
    widths = _widths(budget, target)
    noise = measure_noise(module, inputs, widths, target, settings, advance)
    acts = activation_bits(layers, act_bits, settings)

    def placed(chosen: Sequence[int]) -> list[LayerPlan]:
        found = [
            LayerPlan(layer, widths[index], act, snr=decibels(noise[layer.output][index]))
            for layer, act, index in zip(layers, acts, chosen, strict=True)
        ]
        return [replace(plan, reason=_reason(plan, budget)) for plan in within_reach(found, target, settings)]

    costs = _costs(module, layers, widths, budget, acts, target)
    fixed = _fixed(budget, costs, lambda: file_size(placed([0] * len(layers))))
    least = fixed + sum(row[0] for row in costs)
    if least > budget.amount * (1 + ROUNDING):
        raise MixMixError(
            f"--mixed {budget} cannot be reached: with {widths[0]} bits everywhere it is"
            f" {replace(budget, amount=least)}: allow more"
        )
    choices = [
        [Choice(cost, harm) for cost, harm in zip(row, noise[layer.output], strict=True)]
        for layer, row in zip(layers, costs, strict=True)
    ]
    return placed(allocate(choices, budget.amount - fixed))


def _widths(budget: Budget, target: Target) -> list[int]:
    """Of few bits first. Fewer bits than a container holds make no smaller file."""
    if budget.kind == "size":
        return sorted({min(container.bits, MAX_BITS) for container in target.weights})
    return [bits for bits in WIDTHS if MIN_BITS <= bits <= MAX_BITS]


def _costs(
    module: TorchClassifier,
    layers: Sequence[Layer],
    widths: Sequence[int],
    budget: Budget,
    acts: Sequence[int | None],
    target: Target,
) -> list[list[float]]:
    """What each width of each layer costs, in the budget's unit."""
    if budget.kind == "bops":
        macs = layer_macs(module)
        return [
            [float(macs[layer.output] * bits * (act or FLOAT_BITS)) for bits in widths]
            for layer, act in zip(layers, acts, strict=True)
        ]
    if budget.kind == "bits":
        total = sum(layer.parameters for layer in layers)
        return [[layer.parameters * bits / total for bits in widths] for layer in layers]
    rows = []
    for layer in layers:
        stored = [target.weight_container(bits).bits for bits in widths]
        numbers = (layer.parameters, layer.shape[layer.axis])  # weights, and a zero point a channel
        rows.append([float(sum(-(-count * bits // 8) for count in numbers)) for bits in stored])
    return rows


def _fixed(budget: Budget, costs: Sequence[Sequence[float]], smallest: Callable[[], int]) -> float:
    """What is there whatever the widths: of a file, all but the weights and their zero points."""
    return smallest() - sum(row[0] for row in costs) if budget.kind == "size" else 0.0


def _reason(plan: LayerPlan, budget: Budget) -> str:
    chosen = f"least noise within {budget}"
    return f"{chosen}; {plan.reason}" if plan.reason else chosen
