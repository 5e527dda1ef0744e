"""Which weights stay: numeric primitives of the two patterns that leave a layer's shape as it is.

- unstructured: the largest by absolute value, anywhere in the layer;
- N:M: in every group of M weights that stand next to one another along the input channels, the N largest. This is the
  layout that sparse tensor cores read (2:4), for convolutions along C at each position of the kernel.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from converters.errors import MixMixError

if TYPE_CHECKING:  # what can be asked for is checked before torch is there, which takes seconds to import
    from torch import Tensor

    from converters.torch_module import Layer

CHANNEL = "channel"
STAGES = 4
"""In how many stages weights go where those that stay are settled in between; each leaves about the same part."""


class Pattern(Protocol):
    """A rule for which weights may stay."""

    @property
    def name(self) -> str:
        """As `--pattern` takes it."""
        ...

    def fits(self, layer: Layer) -> bool:
        """Whether the layer's weight can have the pattern."""
        ...

    def choose(self, size: Tensor, layer: Layer, share: float) -> Tensor:
        """A mask, true where a weight stays; `size` is what weights are worth, `share` the part to remove."""
        ...

    def by_stages(self, share: float) -> list[tuple[Pattern, float]]:
        """Ever stricter patterns and shares, the last of which are this one and `share`."""
        ...


def keep_largest(size: Tensor, share: float) -> Tensor:
    """A mask of the shape of `size` that is false for exactly round(share * n) of its elements, the smallest."""
    removed = round(share * size.numel())
    return (size.flatten().argsort(stable=True).argsort() >= removed).view(size.shape)


def keep_n_of_m(size: Tensor, n: int, m: int, axis: int) -> Tensor:
    """A mask that is true for the `n` largest of every `m` neighbours along `axis`, whose length m must divide."""
    groups = size.movedim(axis, -1)
    shape = groups.shape
    groups = groups.reshape(*shape[:-1], shape[-1] // m, m)
    order = groups.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return (order < n).reshape(shape).movedim(-1, axis)


def obeys_n_of_m(weight: Tensor, n: int, m: int, axis: int) -> bool:
    """Whether no group of `m` neighbours along `axis` has more than `n` that are not zero."""
    if weight.shape[axis] % m:
        return False
    groups = weight.movedim(axis, -1).unflatten(-1, (-1, m))
    return bool(((groups != 0).sum(-1) <= n).all())


def input_axis(layer: Layer) -> int:
    """The axis of a layer's weight that its input channels lie along (of a group, where there are groups)."""
    return 1 - layer.axis


@dataclass(frozen=True)
class Unstructured:
    """Any weight may go."""

    @property
    def name(self) -> str:
        return "unstructured"

    def fits(self, layer: Layer) -> bool:
        return True

    def choose(self, size: Tensor, layer: Layer, share: float) -> Tensor:
        return keep_largest(size, share)

    def by_stages(self, share: float) -> list[tuple[Pattern, float]]:
        return [*((self, 1 - (1 - share) ** (stage / STAGES)) for stage in range(1, STAGES)), (self, share)]


@dataclass(frozen=True)
class NofM:
    """`n` of every `m` neighbours along the input channels stay."""

    n: int
    m: int

    @property
    def name(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def share(self) -> float:
        """The part that is removed."""
        return (self.m - self.n) / self.m

    def fits(self, layer: Layer) -> bool:
        return layer.shape[input_axis(layer)] % self.m == 0

    def choose(self, size: Tensor, layer: Layer, share: float) -> Tensor:
        return keep_n_of_m(size, self.n, self.m, input_axis(layer))

    def by_stages(self, share: float) -> list[tuple[Pattern, float]]:
        left = [self.m * (self.n / self.m) ** (stage / STAGES) for stage in range(1, STAGES)]
        found = dict.fromkeys(min(max(math.ceil(n), self.n), self.m - 1) for n in (self.m - 1, *left, self.n))
        return [(NofM(n, self.m), 1 - n / self.m) for n in found]

    def obeyed_by(self, weight: Tensor, layer: Layer) -> bool:
        """Whether the layer's weight has the pattern."""
        return obeys_n_of_m(weight, self.n, self.m, input_axis(layer))


@dataclass(frozen=True)
class WholeChannels:
    """Whole channels go, which no rule for a single layer decides (`recipes.prune.channels`)."""

    @property
    def name(self) -> str:
        return CHANNEL


def parse_n_of_m(text: str) -> NofM:
    """`2:4`. Raises MixMixError for anything that is not N:M with 0 < N < M."""
    found = re.fullmatch(r"(\d+):(\d+)", text)
    if found is None or not 0 < int(found[1]) < int(found[2]):
        raise MixMixError(f"{text!r} is not a pattern: use N:M with N below M, such as 2:4")
    return NofM(int(found[1]), int(found[2]))
