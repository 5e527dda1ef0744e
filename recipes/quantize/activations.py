"""How many bits each quantized input gets.

`--act-bits A` gives each A bits at least. As with weights (`recipes.quantize.plan`), up to `extra_share` of what lies
between A bits and 8 is added where it takes the most noise out of the logits, here by elements of one image: what
HardSwish or a sum leaves with a few large channels needs more steps than one scale for all channels has at 4 bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from converters.targets import MAX_BITS, Target
from converters.torch_module import TorchClassifier
from recipes.allocate import Choice
from recipes.quantize.plan import (
    MOST,
    WIDTHS,
    Advance,
    Keep,
    LayerPlan,
    Noise,
    allocate_enough,
    at_once,
    input_bits,
    noise_of,
)
from recipes.quantize.primitives import spread
from recipes.quantize.quantizers import QuantizedActivation
from recipes.quantize.settings import QuantizeSettings
from recipes.sensitivity import value_noise

SAMPLE = 1 << 17
"""Elements that a value's range is searched on while its noise is measured."""


def place_activations(
    module: TorchClassifier,
    inputs: Tensor,
    plans: Sequence[LayerPlan],
    act_bits: int | None,
    target: Target,
    settings: QuantizeSettings,
    keep: Keep = at_once,
) -> list[LayerPlan]:
    """The plans with bits of their inputs. `inputs` [N, ...] are model inputs to measure on.

    Inputs that have more than `act_bits` bits already keep them, and cost nothing of what may be added.
    """
    if act_bits is None or act_bits >= MAX_BITS or not settings.extra_share:
        return list(plans)
    given = input_bits(plans)
    values = [value for value in module.values if given.get(value) == act_bits]
    widths = input_widths(act_bits)
    sizes = _sizes(module, values)
    noise = keep(len(values), lambda advance: measure_inputs(module, inputs, values, widths, target, settings, advance))
    total = sum(sizes.values())
    choices = [
        [Choice(sizes[value] * width / total, harm) for width, harm in zip(widths, noise[value], strict=True)]
        for value in values
    ]
    budget = act_bits + settings.extra_share * (MAX_BITS - act_bits)
    chosen = allocate_enough(choices, budget, noise_of(settings.enough_snr)) if values else []
    found = {value: widths[index] for value, index in zip(values, chosen, strict=True)}
    return [
        plan
        if found.get(plan.layer.input, act_bits) == act_bits
        else replace(plan, act_bits=found[plan.layer.input], reason=plan.reason or f"input {MOST}")
        for plan in plans
    ]


def input_widths(bits: int) -> list[int]:
    """What an input of at least `bits` bits may have, rising."""
    return [bits, *(width for width in WIDTHS if bits < width <= MAX_BITS)]


def _sizes(module: TorchClassifier, values: Sequence[str]) -> dict[str, int]:
    """Elements of each value for one image."""
    found = module.segment([module.input_name], values)({module.input_name: module.black_image()})
    return {name: value.numel() for name, value in found.items()}


def measure_inputs(
    module: TorchClassifier,
    inputs: Tensor,
    values: Sequence[str],
    widths: Sequence[int],
    target: Target,
    settings: QuantizeSettings,
    advance: Advance,
) -> Noise:
    """Noise-to-signal ratio of the logits with each value alone quantized at each of rising widths, by its name."""

    def versions(value: Tensor) -> Iterator[QuantizedActivation]:
        sample = spread(value, len(value), SAMPLE)
        for bits in widths:
            yield QuantizedActivation(sample, bits, settings, target.symmetric_activations)

    count = settings.sensitive_images
    noise = value_noise(module, inputs[:count], values, versions, settings, advance)
    return {name: list(np.minimum.accumulate(found)) for name, found in noise.items()}
