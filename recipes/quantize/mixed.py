"""Bits by layer under one budget.

    minimise  sum_l noise_l(b_l)   subject to   sum_l cost_l(b_l) <= budget

noise_l(b) is the noise-to-signal ratio of the logits with layer l alone rounded to b bits. The cost is one of

- `size`: bytes of the written file. Weights of 3 bits are stored in 4, so only full containers are offered;
- `bops`: bit operations for one image, multiply-accumulates x bits of the weight x bits of the input (32 for float);
- `bits`: bits a weight, on average.

The allocation is exact (`recipes.allocate`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from converters.errors import MixMixError
from converters.targets import Target
from converters.torch_module import Layer, TorchClassifier
from recipes.allocate import ROUNDING, Choice, allocate
from recipes.inspect import layer_macs
from recipes.quantize.budget import Budget
from recipes.quantize.plan import (
    WIDTHS,
    Keep,
    LayerPlan,
    activation_bits,
    at_once,
    decibels,
    layers_to_quantize,
    measure_noise,
    widest,
)
from recipes.quantize.settings import QuantizeSettings

FLOAT_BITS = 32


def plan_mixed(
    module: TorchClassifier,
    inputs: Tensor,
    budget: Budget,
    act_bits: int | None,
    target: Target,
    settings: QuantizeSettings,
    file_size: Callable[[Sequence[LayerPlan]], int],
    keep: Keep = at_once,
) -> list[LayerPlan]:
    """The placement with the least noise within `budget`. `inputs` [N, ...] are model inputs to measure on.

    `file_size` gives the bytes of the file that a placement is written as. Raises MixMixError where the model has no
    layer, or where even the fewest bits cost more than the budget.
    """
    layers = layers_to_quantize(module)
    widths = _widths(budget, target, settings, act_bits)
    acts = activation_bits(layers, act_bits, settings)
    costs = _costs(module, layers, widths, budget, acts, target)
    fewest = sum(row[0] for row in costs)
    narrowest = [LayerPlan(layer, widths[0], act) for layer, act in zip(layers, acts, strict=True)]
    fixed = file_size(narrowest) - fewest if budget.kind == "size" else 0.0  # all but the weights
    least = fixed + fewest
    if least > budget.amount * (1 + ROUNDING):
        raise MixMixError(
            f"--mixed {budget} cannot be reached: with {widths[0]} bits everywhere it is"
            f" {replace(budget, amount=least)}: allow more"
        )
    noise = keep(
        len(layers), lambda advance: measure_noise(module, inputs, widths, act_bits, target, settings, advance)
    )
    choices = [
        [Choice(cost, harm) for cost, harm in zip(row, noise[layer.output], strict=True)]
        for layer, row in zip(layers, costs, strict=True)
    ]
    chosen = allocate(choices, budget.amount - fixed)
    return [
        LayerPlan(layer, widths[index], act, f"least noise within {budget}", decibels(noise[layer.output][index]))
        for layer, act, index in zip(layers, acts, chosen, strict=True)
    ]


def _widths(budget: Budget, target: Target, settings: QuantizeSettings, act_bits: int | None) -> list[int]:
    """Of few bits first. Fewer bits than a container holds make no smaller file."""
    widths = [container.bits for container in target.weights] if budget.kind == "size" else WIDTHS
    return sorted({min(bits, widest(target, settings, act_bits)) for bits in widths})


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
