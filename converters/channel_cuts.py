"""What has to be cut out of a file when channels are removed: constants, group counts, and sizes that follow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from converters.edits import AttributeEdit, Edit, TensorEdit
from converters.numbering import FIXED, Numbers
from converters.torch_module import Layer


@dataclass(frozen=True)
class Lane:
    """The axis of a value that channels lie along, and their numbers."""

    axis: int
    numbers: Numbers

    def kept(self, removed: Numbers) -> NDArray[np.bool_]:
        return ~np.isin(self.numbers, removed)


@dataclass(frozen=True)
class Slot:
    """A constant operand that is cut along an axis: operand `index` of the node that writes `output`."""

    output: str
    index: int
    name: str
    axis: int
    numbers: Numbers


class Resize(Protocol):
    """A node whose sizes follow from the channels of some values."""

    @property
    def values(self) -> Sequence[str]:
        """Nothing is to be written where none of these loses a channel."""
        ...

    def edits(self, lanes: Mapping[str, Lane], removed: Numbers) -> list[Edit]: ...


@dataclass(frozen=True)
class Regroup:
    """A convolution in groups, which go whole."""

    output: str
    groups: int

    @property
    def values(self) -> Sequence[str]:
        return [self.output]

    def edits(self, lanes: Mapping[str, Lane], removed: Numbers) -> list[Edit]:
        kept = lanes[self.output].kept(removed)
        return [AttributeEdit(self.output, "group", int(kept.sum()) * self.groups // len(kept))]


@dataclass(frozen=True)
class Reshape:
    """A Reshape to `sizes`, -1 in the batch's place."""

    output: str
    values: Sequence[str]
    sizes: Sequence[int]

    def edits(self, lanes: Mapping[str, Lane], removed: Numbers) -> list[Edit]:
        sizes, lane = np.array(self.sizes, np.int64), lanes.get(self.output)
        if lane is not None and sizes[lane.axis] != -1:
            sizes[lane.axis] = lane.kept(removed).sum()
        return [TensorEdit(self.output, 1, sizes)]


@dataclass(frozen=True)
class Expand:
    """An Expand to `sizes`, which are 1 wherever what is expanded has its size already."""

    output: str
    values: Sequence[str]
    sizes: Sequence[int]

    def edits(self, lanes: Mapping[str, Lane], removed: Numbers) -> list[Edit]:
        return [TensorEdit(self.output, 1, np.array(self.sizes, np.int64))]


@dataclass(frozen=True)
class _Pick:
    """A node that takes parts of `source` along an axis."""

    output: str
    source: str
    axis: int

    @property
    def values(self) -> Sequence[str]:
        return [self.source]

    def kept(self, lanes: Mapping[str, Lane], removed: Numbers) -> NDArray[np.bool_] | None:
        """What is left along the axis; None where channels lie along another."""
        lane = lanes[self.source]
        return lane.kept(removed) if lane.axis == self.axis else None


@dataclass(frozen=True)
class Split(_Pick):
    """A Split of `source` along an axis, into `sizes`."""

    sizes: Sequence[int]

    def edits(self, lanes: Mapping[str, Lane], removed: Numbers) -> list[Edit]:
        kept = self.kept(lanes, removed)
        if kept is None:
            return []
        parts = np.split(kept, np.cumsum(self.sizes)[:-1])
        return [TensorEdit(self.output, 1, np.array([part.sum() for part in parts], np.int64))]


@dataclass(frozen=True)
class Slice(_Pick):
    """A Slice of `source` along an axis from one bound to another, which may count from the end."""

    bounds: tuple[int, int]

    def edits(self, lanes: Mapping[str, Lane], removed: Numbers) -> list[Edit]:
        kept = self.kept(lanes, removed)
        if kept is None:
            return []
        before = np.append(0, np.cumsum(kept))
        length = len(before) - 1
        places = [min(max(bound + length if bound < 0 else bound, 0), length) for bound in self.bounds]
        return [
            TensorEdit(self.output, index, np.array([before[place]], np.int64))
            for index, place in zip((1, 2), places, strict=True)
        ]


@dataclass(frozen=True)
class Pin:
    """An operand that was computed from the shapes of `values`, and is to stay what it was: a scale, a bound."""

    output: str
    index: int
    values: Sequence[str]
    constant: Tensor

    def edits(self, lanes: Mapping[str, Lane], removed: Numbers) -> list[Edit]:
        return [TensorEdit(self.output, self.index, self.constant.cpu().numpy())]


@dataclass(frozen=True)
class LayerChannels:
    """A layer's channels: numbers along the output axis of its weight, and along its input axis (None: in groups)."""

    layer: Layer
    outputs: Numbers
    inputs: Numbers | None
    places: int
    """Positions of one image that each output channel is computed at."""


@dataclass(frozen=True)
class Channels:
    """All that removing channels touches. Channels of one number go together; FIXED ones stay."""

    slots: Sequence[Slot]
    layers: Sequence[LayerChannels]
    lanes: Mapping[str, Lane]
    """By name of a value, where it has channels that can be removed."""
    resizes: Sequence[Resize]

    def numbers(self) -> Numbers:
        """Those that can be removed."""
        found = np.unique(np.concatenate([np.zeros(1, np.int64), *(entry.outputs for entry in self.layers)]))
        return found[found != FIXED]

    def needed(self, harm: NDArray[np.float64]) -> Numbers:
        """Of each value the number that does most harm (by number), as no value may lose all of its channels.

        More than each layer's own: of a layer that is split, some of each part has to stay.
        """
        lanes = [lane.numbers for lane in self.lanes.values() if (lane.numbers != FIXED).all()]
        return np.unique([numbers[np.argmax(harm[numbers])] for numbers in lanes]).astype(np.int64)

    def edits(
        self, removed: Numbers, tensors: Mapping[str, Tensor], original: Callable[[str], Tensor]
    ) -> Sequence[Edit]:
        """The cuts, with `tensors` by initializer name where they have changed, and `original` ones elsewhere."""
        cuts: dict[tuple[str, int], Tensor] = {}
        for slot in self.slots:
            gone = np.isin(slot.numbers, removed)
            if not gone.any():
                continue
            key = (slot.output, slot.index)
            value = cuts.get(key)
            if value is None:
                value = tensors[slot.name] if slot.name in tensors else original(slot.name)
            cuts[key] = value.index_select(slot.axis, torch.from_numpy(np.flatnonzero(~gone)).to(value.device))
        found: list[Edit] = [TensorEdit(output, index, value.cpu().numpy()) for (output, index), value in cuts.items()]
        for resize in self.resizes:
            lanes = [self.lanes[value] for value in resize.values if value in self.lanes]
            if not all(lane.kept(removed).all() for lane in lanes):
                found += resize.edits(self.lanes, removed)
        return found
