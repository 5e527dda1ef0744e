"""Bits by layer under one budget.

    minimise  sum_l noise_l(b_l) + sum_x noise_x(a_x)   subject to   sum_l cost_l(b_l, a_x(l)) <= budget

noise_l(b) is the noise-to-signal ratio of the logits with layer l alone rounded to b bits, noise_x(a) that with value x
alone, which layer l reads, at a bits. The cost is one of

- `size`: bytes of the written file. Weights of 3 bits are stored in 4, so only full containers are offered;
- `bops`: bit operations for one image, multiply-accumulates x bits of the weight x bits of the input (32 for float);
- `bits`: bits a weight, on average.

Bits of inputs cost bit operations alone, and are chosen with those; layers that read one value choose together. The
allocation is exact (`recipes.allocate`), but that a file also stores each tensor's length: for `size` the placement may
be a few bytes short of the best.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from converters.errors import MixMixError
from converters.targets import MAX_BITS, Target
from converters.torch_module import Layer, TorchClassifier
from recipes.allocate import ROUNDING, Choice, allocate, frontier
from recipes.budget import Budget, Spending
from recipes.inspect import layer_macs
from recipes.quantize.activations import input_widths, measure_inputs
from recipes.quantize.plan import (
    WIDTHS,
    Keep,
    LayerPlan,
    Noise,
    activation_bits,
    at_once,
    decibels,
    input_bits,
    layers_to_quantize,
    measure_noise,
    scale_bits,
    widest,
)
from recipes.quantize.settings import QuantizeSettings

FLOAT_BITS = 32
Cost = Callable[[Layer, int, int | None], float]
"""Of a layer with so many bits of its weight, and of its input."""


@dataclass(frozen=True)
class _Option:
    """Bits of one value (None for float) and of the weights that multiply it, with what they cost and harm."""

    act: int | None
    widths: tuple[int, ...]
    choice: Choice


@dataclass(frozen=True)
class _Group:
    """Layers that read one value, and the bits that it may have, rising."""

    value: str
    layers: tuple[Layer, ...]
    acts: tuple[int | None, ...]

    def options(self, widths: Sequence[int], cost: Cost, weights: Noise, inputs: Noise) -> list[_Option]:
        """All that are worth choosing."""
        found = []
        harms = inputs.get(self.value, [0.0] * len(self.acts))
        for act, harm in zip(self.acts, harms, strict=True):
            rows = [
                [Choice(cost(layer, w, act), noise) for w, noise in zip(widths, weights[layer.output], strict=True)]
                for layer in self.layers
            ]
            for sums, indices in frontier(rows):
                found.append(
                    _Option(act, tuple(widths[index] for index in indices), Choice(sums.cost, sums.harm + harm))
                )
        kept = frontier([[option.choice for option in found]])
        return [found[index] for _, (index,) in kept]


@dataclass(frozen=True)
class Placements:
    """What a placement may choose among, and what that costs."""

    layers: Sequence[Layer]
    widths: Sequence[int]
    groups: Sequence[_Group]
    cost: Cost
    fixed: float
    """Of everything but weights, in the budget's unit."""


def find_placements(
    module: TorchClassifier,
    budget: Budget,
    act_bits: int | None,
    target: Target,
    settings: QuantizeSettings,
    file_size: Callable[[Sequence[LayerPlan]], int],
) -> Placements:
    """What there is to choose among. Raises MixMixError as `plan_mixed` does, and needs no images."""
    layers = layers_to_quantize(module)
    widths = _widths(budget, target, settings, act_bits)
    narrowest = [
        LayerPlan(layer, widths[0], act)
        for layer, act in zip(layers, activation_bits(layers, act_bits, settings), strict=True)
    ]
    groups = _groups(narrowest, budget, act_bits, settings)
    cost = _cost(module, layers, budget, target, settings)
    fewest = sum(cost(layer, widths[0], group.acts[0]) for group in groups for layer in group.layers)
    fixed = file_size(narrowest) - fewest if budget.kind == "size" else 0.0
    least = fixed + fewest
    if budget.kind == "size":  # the file says what was asked for, in more letters where that is more
        least += len(str(replace(budget, amount=least))) - len(str(budget))
    if fixed + fewest > budget.amount * (1 + ROUNDING):
        raise MixMixError(
            f"--mixed {budget} cannot be reached: with {widths[0]} bits everywhere it is"
            f" {replace(budget, amount=least)}: allow more{_way_to_less(budget, act_bits, target)}"
        )
    return Placements(layers, widths, groups, cost, fixed)


def plan_mixed(
    module: TorchClassifier,
    inputs: Tensor,
    budget: Budget,
    act_bits: int | None,
    target: Target,
    settings: QuantizeSettings,
    file_size: Callable[[Sequence[LayerPlan]], int],
    keep: Keep = at_once,
    keep_inputs: Keep = at_once,
) -> tuple[list[LayerPlan], Spending]:
    """The placement with the least noise within `budget`, and its cost; `inputs` [N, ...] are what is measured on.

    `file_size` gives the bytes of the file that a placement is written as. Raises MixMixError where the model has no
    layer, or where even the fewest bits cost more than the budget.
    """
    among = find_placements(module, budget, act_bits, target, settings, file_size)
    layers, widths, groups, fixed = among.layers, among.widths, among.groups, among.fixed
    noise = keep(
        len(layers), lambda advance: measure_noise(module, inputs, widths, act_bits, target, settings, advance)
    )
    open_values = [group.value for group in groups if len(group.acts) > 1]
    of_inputs: Noise = {}
    if act_bits is not None and open_values:
        acts = input_widths(act_bits)
        of_inputs = keep_inputs(
            len(open_values),
            lambda advance: measure_inputs(module, inputs, open_values, acts, target, settings, advance),
        )
    reason = f"least noise within {budget}"
    options = [group.options(widths, among.cost, noise, of_inputs) for group in groups]

    def plans_of(taken: Sequence[_Option]) -> list[LayerPlan]:
        found = {
            layer.output: (width, option.act)
            for group, option in zip(groups, taken, strict=True)
            for layer, width in zip(group.layers, option.widths, strict=True)
        }
        return [
            LayerPlan(layer, bits, act, reason, decibels(noise[layer.output][widths.index(bits)]))
            for layer in layers
            for bits, act in [found[layer.output]]
        ]

    def spent_on(taken: Sequence[_Option]) -> float:
        return float(file_size(plans_of(taken))) if budget.kind == "size" else fixed + _costs(taken)

    taken, spent = _choose(options, budget.amount, budget.amount - fixed, spent_on)
    binds = any(option is not row[-1] for row, option in zip(options, taken, strict=True))
    return plans_of(taken), Spending(budget, spent, binds)


def _choose(
    options: Sequence[Sequence[_Option]], amount: float, allowed: float, spent_on: Callable[[Sequence[_Option]], float]
) -> tuple[list[_Option], float]:
    """One option a group, with the least harm, that `spent_on` says comes to no more than `amount`; and to what.

    `allowed` is what their costs may add up to if they are all that is spent. A file says how long each tensor is, in
    more bytes for a longer one: where that is too much, they may add up to so much less. The cheapest always fit.
    """
    fewest = sum(min(option.choice.cost for option in row) for row in options)
    while True:
        chosen = allocate([[option.choice for option in row] for row in options], allowed)
        taken = [row[index] for row, index in zip(options, chosen, strict=True)]
        costs, spent = _costs(taken), spent_on(taken)
        excess = spent - amount * (1 + ROUNDING)
        if excess <= 0 or costs <= fewest * (1 + ROUNDING):
            return taken, spent
        allowed = max(fewest, costs - max(excess, 2 * ROUNDING * costs))


def _costs(taken: Sequence[_Option]) -> float:
    return sum(option.choice.cost for option in taken)


def _way_to_less(budget: Budget, act_bits: int | None, target: Target) -> str:
    """What else brings the cost down, in words."""
    if budget.kind == "bops" and act_bits is None:
        return ", or quantize the inputs too (--act-bits)"
    if budget.kind == "size" and target.weights[0].bits > 2 and act_bits is None:
        return ", or store weights of 2 bits in 2 (--weight-container int2)"
    return ""


def _groups(
    narrowest: Sequence[LayerPlan], budget: Budget, act_bits: int | None, settings: QuantizeSettings
) -> list[_Group]:
    """Layers by the value that they read, whose bits are open where they cost something, are few, and may be more."""
    given = input_bits(narrowest)
    readers: dict[str, list[Layer]] = {}
    for plan in narrowest:
        readers.setdefault(plan.layer.input, []).append(plan.layer)
    groups = []
    for value, layers in readers.items():
        bits = given.get(value)
        acts: tuple[int | None, ...] = (bits,)
        if bits is not None and bits == act_bits and bits < MAX_BITS and budget.kind == "bops" and settings.extra_share:
            acts = tuple(input_widths(bits))
        groups.append(_Group(value, tuple(layers), acts))
    return groups


def _widths(budget: Budget, target: Target, settings: QuantizeSettings, act_bits: int | None) -> list[int]:
    """Of few bits first. Fewer bits than a container holds make no smaller file."""
    widths = [container.bits for container in target.weights] if budget.kind == "size" else WIDTHS
    return sorted({min(bits, widest(target, settings, act_bits)) for bits in widths})


def _cost(
    module: TorchClassifier, layers: Sequence[Layer], budget: Budget, target: Target, settings: QuantizeSettings
) -> Cost:
    """In the budget's unit."""
    if budget.kind == "bops":
        macs = layer_macs(module)
        return lambda layer, bits, act: float(macs[layer.output] * bits * (act or FLOAT_BITS))
    if budget.kind == "bits":
        total = sum(layer.parameters for layer in layers)
        return lambda layer, bits, act: layer.parameters * bits / total

    def stored(layer: Layer, bits: int, act: int | None) -> float:
        each = target.weight_container(bits).bits
        numbers = (layer.parameters, layer.shape[layer.axis])  # weights, and a zero point a channel
        groups = scale_bits(layer, bits, act, target, settings)
        return float(sum(-(-count * each // 8) for count in numbers) + groups // 8)

    return stored
