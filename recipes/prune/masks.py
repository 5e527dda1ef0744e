"""A pruned weight as a change that the reconstruction loop can train: the seed's two stages (eq. 10)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from converters.torch_module import Layer
from recipes.least_squares import Moments, from_rows, to_rows
from recipes.prune import surgeon
from recipes.prune.settings import PruneSettings
from recipes.reconstruct import Group

Choose = Callable[[Tensor], Tensor]
"""From what weights are worth, at first their absolute values, to a mask, true where a weight stays."""


def sparing(choose: Choose, weight: Tensor) -> Choose:
    """`choose` so that what is exactly zero in `weight` is worth nothing and stays zero."""
    nonzero = weight != 0
    return lambda size: choose(torch.where(nonzero, size, 0.0)) & nonzero


class PrunedWeight:
    """W with a mask M: M * W.

    At first M is what the last of `choices` makes of |W|. `compensate` goes through all of them, which are ever
    stricter, and settles what stays in between. `soften` lets M take any value and trains it with W, so that a weight
    that was removed can come back; `absorb` multiplies both and chooses again; `freeze` trains W under the mask. What
    is exactly zero in the given W stays so: a model that is sparse already gets no denser.
    """

    def __init__(self, weight: Tensor, choices: Sequence[Choose], settings: PruneSettings) -> None:
        self.settings = settings
        self.choices = [sparing(choose, weight) for choose in choices]
        self.importance: Tensor | float = 1.0
        """What absolute values are multiplied with."""
        self.kept = self.choices[-1](weight.abs())
        self.weight = weight.clone()
        self.mask: Tensor | None = None
        self.trained = False
        self.rate = settings.weight_rate * float(weight.square().mean().sqrt())

    def compensate(self, layer: Layer, found: Moments) -> Tensor:
        """Take weights out stage by stage, those that stay settled in between; what to add to the bias [C]."""
        rows = to_rows(self.weight, layer)
        self.importance = from_rows(surgeon.importance(found).expand_as(rows), layer)
        rules = surgeon.by_rows(self.choices, layer)
        *_, (settled, kept) = surgeon.remove(rows, found, rules, self.settings.settle_steps)
        self.kept = from_rows(kept, layer)
        self.weight = torch.where(self.kept, from_rows(settled, layer), self.weight)
        return found.mean_difference(rows, settled).flatten()

    def soften(self) -> None:
        """Begin the first stage."""
        self.mask, self.trained = self.kept.to(self.weight.dtype), True

    @torch.no_grad()
    def absorb(self) -> None:
        """End the first stage: the product of mask and weight is the weight, and its smallest are chosen again."""
        if self.mask is not None:
            self.weight, self.mask = self.weight * self.mask, None
            self.kept = self.choices[-1](self.weight.abs() * self.importance)

    def freeze(self) -> None:
        """Begin the second stage."""
        self.trained = True

    @torch.no_grad()
    def harden(self) -> None:
        """End of training."""
        self.weight, self.trained = self.tensor(), False

    def groups(self) -> list[Group]:
        if not self.trained:
            return []
        groups = [Group([self.weight], self.rate, decay=True)]
        if self.mask is not None:
            groups.append(Group([self.mask], self.settings.mask_rate, decay=True))
        return groups

    def penalty(self, progress: float) -> Tensor | None:
        return None

    def tensor(self) -> Tensor:
        """The real weight, in the file's layout."""
        if self.mask is not None:  # where both begin at 0, neither has a gradient: zeros of the given model stay
            return self.weight * self.mask
        return torch.where(self.kept, self.weight, 0.0)

    def state(self) -> dict[str, Tensor]:
        """What a hard weight is restored from."""
        return {"weight": self.weight, "kept": self.kept}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.weight, self.kept = (state[name].to(self.weight.device) for name in ("weight", "kept"))

    @property
    def sparsity(self) -> float:
        """Share of the weights that are removed."""
        return 1 - float(self.kept.float().mean())
