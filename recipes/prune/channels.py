"""Which channels to remove, so that a share of the multiplications, of the weights or of the time is left.

A channel's harm is the noise that its absence makes in the layers that read it, relative to what each layer adds up:

    harm = sum over reading layers of  |W_k|^2 var(x_k) / sum_k' |W_k'|^2 var(x_k')

with x_k the channel's values on the images; its mean is left out, as a bias can take it. Channels are removed by least
harm for what they save, and the savings are counted anew as layers grow narrower. They go in bundles that leave a
multiple of some number: runtimes compute in blocks of channels, and a layer of 13 takes longer than one of 16.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from converters.channel_cuts import Channels, LayerChannels
from converters.errors import MixMixError
from converters.numbering import FIXED
from converters.torch_module import TorchClassifier
from recipes.prune.goal import MACS, WEIGHTS

Numbers = NDArray[np.int64]
Floats = NDArray[np.float64]

ROUNDING = 1e-9
"""Shares that differ by no more are the same."""
UNITS = {MACS: "multiplications", WEIGHTS: "weights"}

STEPS = 50
"""Bundles that a large family is cut into, at least."""


@dataclass(frozen=True)
class Limits:
    """What stays of every layer: at least `least` of it, and a multiple of `multiple` channels.

    Where there are few channels, a multiple of half as many.
    """

    least: float = 0.1
    multiple: int = 1


@dataclass(frozen=True)
class Removed:
    """Channel numbers that are gone, and the share of the unit that is left without them."""

    numbers: Numbers
    left: float


def no_harm(channels: Channels) -> Floats:
    """0 by channel number: to try what may be removed at all."""
    return np.zeros(1 + int(max((entry.outputs.max() for entry in channels.layers), default=0)))


@torch.no_grad()
def channel_harm(module: TorchClassifier, channels: Channels, inputs: Tensor, batch: int) -> Floats:
    """Harm by channel number (0 for numbers that nothing reads), from inputs [N, ...] of the model."""
    reading = [entry for entry in channels.layers if entry.inputs is not None and (entry.inputs != FIXED).any()]
    values = sorted({entry.layer.input for entry in reading})
    spread = _variances(module, channels, values, inputs, batch)
    harm = no_harm(channels)
    for entry in reading:
        assert entry.inputs is not None
        layer = entry.layer
        weight = module.constant(layer.weight).double()
        power = weight.movedim(1 - layer.axis, 0).flatten(1).square().sum(1).cpu().numpy() * spread[layer.input]
        np.add.at(harm, entry.inputs, power / max(float(power.sum()), 1e-300))
    return harm


def _variances(
    module: TorchClassifier, channels: Channels, values: list[str], inputs: Tensor, batch: int
) -> dict[str, Floats]:
    """Variance of every channel of the named values over images and places."""
    segment = module.segment([module.input_name], values)
    sums: dict[str, list[Tensor]] = {}
    for part in inputs.split(batch):
        for name, value in segment({module.input_name: part}).items():
            rows = value.movedim(channels.lanes[name].axis, 0).flatten(1).double()
            found = [rows.sum(1), rows.square().sum(1), torch.tensor(rows.shape[1])]
            sums[name] = found if name not in sums else [a + b for a, b in zip(sums[name], found, strict=True)]
    return {
        name: (square / count - (total / count).square()).clamp_min(0).cpu().numpy()
        for name, (total, square, count) in sums.items()
    }


class _Costs:
    """What the layers cost with some channels gone."""

    def __init__(self, channels: Channels, unit: str) -> None:
        self.entries: list[tuple[LayerChannels, float]] = []
        for entry in channels.layers:
            pairs = len(entry.outputs) * (1 if entry.inputs is None else len(entry.inputs))
            self.entries.append((entry, entry.layer.parameters / pairs * (entry.places if unit == MACS else 1)))

    def total(self, kept: NDArray[np.bool_]) -> float:
        return sum(each * _kept(entry.outputs, kept) * _inputs(entry, kept) for entry, each in self.entries)

    def savings(self, kept: NDArray[np.bool_]) -> Floats:
        """What removing each channel number alone would save."""
        saved = np.zeros(len(kept))
        for entry, each in self.entries:
            np.add.at(saved, entry.outputs, each * _inputs(entry, kept) * kept[entry.outputs])
            if entry.inputs is not None:
                np.add.at(saved, entry.inputs, each * _kept(entry.outputs, kept) * kept[entry.inputs])
        return saved


def _kept(numbers: Numbers, kept: NDArray[np.bool_]) -> int:
    return int(kept[numbers].sum())


def _inputs(entry: LayerChannels, kept: NDArray[np.bool_]) -> int:
    return 1 if entry.inputs is None else _kept(entry.inputs, kept)


def share_left(channels: Channels, removed: Numbers, unit: str = MACS) -> float:
    """The share of the layers' multiplications, or weights, that is left with some channel numbers gone."""
    costs = _Costs(channels, unit)
    kept = np.ones(len(no_harm(channels)), bool)
    whole = costs.total(kept)
    kept[removed] = False
    return costs.total(kept) / whole


def removals(channels: Channels, harm: Floats, unit: str, limits: Limits) -> Iterator[Removed]:
    """Ever more channel numbers to remove, from none to all that may go.

    They go in bundles that leave a multiple of `limits.multiple` of each family; each time the one of least harm for
    what it saves of `unit`.
    """
    costs = _Costs(channels, unit)
    kept = np.ones(len(harm), bool)
    whole = costs.total(kept)
    needed = channels.needed(harm)
    each = _channels_each(channels)
    families = _families(channels)
    waiting = [numbers[np.lexsort((harm[numbers], np.isin(numbers, needed)))] for numbers in families]
    least = [max(round(limits.least * len(n)), int(np.isin(n, needed).sum()), 1) for n in families]
    multiples = [_multiple(len(n), limits.multiple, math.gcd(*each[n].tolist())) for n in families]
    while True:
        yield Removed(np.flatnonzero(~kept), costs.total(kept) / whole)
        savings = costs.savings(kept)
        best, chosen = math.inf, -1
        for index, numbers in enumerate(waiting):
            bundle = numbers[: _bundle(len(numbers), multiples[index])]
            if len(numbers) - len(bundle) < least[index]:
                continue
            ratio = float(harm[bundle].sum()) / max(float(savings[bundle].sum()), 1e-300)
            if ratio < best:
                best, chosen = ratio, index
        if chosen < 0:
            return
        size = _bundle(len(waiting[chosen]), multiples[chosen])
        kept[waiting[chosen][:size]] = False
        waiting[chosen] = waiting[chosen][size:]


def choose_channels(
    module: TorchClassifier, channels: Channels, harm: Floats, unit: str, share: float, limits: Limits
) -> Numbers:
    """The channel numbers to remove so that `share` of the model's multiplications or weights (`unit`) is left.

    Raises MixMixError where what may be removed does not come to it.
    """
    for removed in removals(channels, harm, unit, limits):
        if removed.left <= share + ROUNDING:
            return removed.numbers
    least = math.ceil(1000 * removed.left) / 1000
    possible = f"--macs {least:g} or more" if unit == MACS else f"--sparsity {round(1 - least, 3):g} or less"
    raise MixMixError(
        f"{module.classifier.path}: {removed.left:.1%} of its {UNITS[unit]} stay, as {kept_anyway(limits)}: give"
        f" {possible}{way_to_less(limits)}"
    )


def kept_anyway(limits: Limits) -> str:
    """What is never removed, in words."""
    together = f", in multiples of {limits.multiple} channels" if limits.multiple > 1 else ""
    return f"{limits.least:.0%} of each layer is kept{together}, and what cannot be removed"


def way_to_less(limits: Limits) -> str:
    """What the user can do where more is to go, in words."""
    return ", or allow any number with --set multiple=1" if limits.multiple > 1 else ""


def _multiple(count: int, multiple: int, each: int) -> int:
    """The multiple for a family of `count` numbers, of `each` channels: halved until twice as many are there."""
    multiple //= math.gcd(multiple, each)
    while multiple > 1 and count < 2 * multiple:
        multiple //= 2
    return multiple


def _bundle(count: int, multiple: int) -> int:
    """How many of `count` channels go at once: down to the next multiple, by some more where there are very many."""
    return count % multiple or multiple * max(1, count // (STEPS * multiple))


def _families(channels: Channels) -> list[Numbers]:
    """Numbers that stand side by side in some layer's output: how many of them are left is how wide values are."""
    family: dict[int, set[int]] = {}
    for entry in channels.layers:
        numbers = {int(number) for number in entry.outputs if number != FIXED}
        joined = numbers.union(*(family[number] for number in numbers if number in family))
        for number in joined:
            family[number] = joined
    distinct = {id(numbers): numbers for numbers in family.values()}
    return [np.array(sorted(numbers), np.int64) for numbers in distinct.values()]


def _channels_each(channels: Channels) -> Numbers:
    """By number, what divides how many channels of a layer it stands for: one, but for groups and heads."""
    each = np.zeros(1 + max(int(entry.outputs.max()) for entry in channels.layers), np.int64)
    for entry in channels.layers:
        numbers, counts = np.unique(entry.outputs, return_counts=True)
        each[numbers] = np.gcd(each[numbers], counts)
    return each


def masks(channels: Channels, removed: Numbers) -> Mapping[str, list[Callable[[Tensor], Tensor]]]:
    """By layer output, the one choice of weights: all but those of removed channels, on both sides."""

    def choice(entry: LayerChannels) -> Callable[[Tensor], Tensor]:
        def choose(size: Tensor) -> Tensor:
            kept = torch.ones_like(size, dtype=torch.bool)
            sides = [(entry.layer.axis, entry.outputs)]
            if entry.inputs is not None:
                sides.append((1 - entry.layer.axis, entry.inputs))
            for axis, numbers in sides:
                gone = torch.from_numpy(np.flatnonzero(np.isin(numbers, removed))).to(size.device)
                kept.index_fill_(axis, gone, False)
            return kept

        return choose

    return {entry.layer.output: [choice(entry)] for entry in channels.layers if _touched(entry, removed)}


def _touched(entry: LayerChannels, removed: Numbers) -> bool:
    return bool(np.isin(entry.outputs, removed).any()) or (
        entry.inputs is not None and bool(np.isin(entry.inputs, removed).any())
    )
