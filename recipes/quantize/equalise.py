"""Equalisation: the channels of a value that is quantized with one scale are brought nearer to one range.

Divided by r_i where they are made and multiplied by it where they are read (`converters.scalings`), channels with small
values get more of the steps: r_i = range_i^power, brought to a mean of 1. Power 1 makes the ranges equal, and the rows
of the weights behind them uneven; 1/2 is between. r_i is a power of 2^(1/4), which the file says (`converters.units`).
Nagel et al. (2019) equalise weights, which have a scale for each
output channel here, so that it is the activations' ranges that count, as in SmoothQuant (Xiao et al. 2023).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from converters.channel_cuts import Slot
from converters.edits import TensorEdit
from converters.scalings import find_scalings
from converters.torch_module import TorchClassifier
from converters.units import STEPS_PER_OCTAVE, Rescaled
from recipes.quantize.primitives import broadcast
from recipes.quantize.settings import QuantizeSettings
from recipes.reconstruct import batches

FEW_BITS = 4
"""Most bits of activations that it is used with: at 8 bits some models gained and others lost."""
MOST_STEPS = 12
"""No channel is multiplied or divided by more than 2^3: what is nearly always zero has no range to go by."""


class _Range:
    """A transform that leaves a value [N, count * n, ...] as it is and keeps each channel's bounds; 0 lies within."""

    def __init__(self, count: int, device: torch.device) -> None:
        self.low, self.high = torch.zeros(count, device=device), torch.zeros(count, device=device)

    def __call__(self, x: Tensor) -> Tensor:
        channels = x.reshape(len(x), len(self.low), -1)
        self.low = torch.minimum(self.low, channels.amin((0, 2)))
        self.high = torch.maximum(self.high, channels.amax((0, 2)))
        return x

    def size(self) -> Tensor:
        return self.high - self.low


def steps(ranges: Tensor, power: float) -> Tensor:
    """STEPS_PER_OCTAVE * log2(r), whole numbers [C], from channels' ranges [C]; 0 where that is 0 or infinite."""
    live = (ranges > 0) & ranges.isfinite()
    if not live.any():
        return torch.zeros_like(ranges)
    raised = ranges.pow(power)
    octaves = torch.where(live, raised / raised[live].mean(), 1.0).log2()
    return (STEPS_PER_OCTAVE * octaves).round().clamp(-MOST_STEPS, MOST_STEPS)


def equalise(
    module: TorchClassifier, inputs: Tensor, settings: QuantizeSettings
) -> tuple[list[TensorEdit], list[Rescaled]]:
    """Edits that equalise what can be, on model inputs [N, ...], and the units that they bring; the function stays."""
    scalings = find_scalings(module)
    ranges = {name: _Range(scaling.count, module.device) for scaling in scalings for name in scaling.read}
    for _ in batches(module.whole, {module.input_name: inputs}, settings.batch, transforms=ranges):
        pass
    tensors: dict[tuple[str, int], Tensor] = {}
    units = []
    for scaling in scalings:
        found = steps(torch.stack([ranges[name].size() for name in scaling.read]).amax(0), settings.equalise)
        units.append(Rescaled(values=list(scaling.values), steps=[int(step) for step in found]))
        r = torch.exp2(found / STEPS_PER_OCTAVE)
        for slots, factor in ((scaling.makers, 1 / r), (scaling.readers, r)):
            for slot in slots:
                tensors[slot.output, slot.index] = _scaled(_tensor(module, slot, tensors), slot, factor)
    edits = [TensorEdit(output, index, tensor.cpu().numpy()) for (output, index), tensor in tensors.items()]
    return edits, units


def _tensor(module: TorchClassifier, slot: Slot, changed: Mapping[tuple[str, int], Tensor]) -> Tensor:
    """A constant as it is by now: most weights read one value's channels and make another's."""
    found = changed.get((slot.output, slot.index))
    return module.constant(slot.name) if found is None else found


def _scaled(tensor: Tensor, slot: Slot, factor: Tensor) -> Tensor:
    each = factor[torch.from_numpy(slot.numbers).to(factor.device)]
    return tensor * broadcast(each, tensor.dim(), slot.axis)
