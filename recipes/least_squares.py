"""Closed-form weights: what a layer's operands say about weights that change together.

For one layer with float input X, input X~ through what is changed already, and rows W [R, K], the weight that on X~
answers as the float layer does on X is

    W' = argmin ||W' X~ - W X||^2 + d ||W' - W||^2 = (W X X~^T + d W) (X~ X~^T + d I)^-1;

d grows with K / n, the number of weights over the number of vectors seen: what few vectors say of many weights is
mostly chance, and calibration images are not the images that the model will see. GPTQ (Frantar et al. 2023) and Optimal
Brain Surgeon (Hassibi and Stork 1993) both start from (X~ X~^T + d I)^-1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from converters.errors import MixMixError
from converters.torch_module import Layer, TorchClassifier
from recipes.reconstruct import Changed, Changes, LearnedTensor, Stretch, Values, batches
from recipes.settings import LoopSettings

DAMPING = 0.01
"""The part of d that is always there, as a share of the mean of the diagonal of X~ X~^T."""


@dataclass(frozen=True)
class Moments:
    """Moments of a layer's operands by group: `own` = X~ X~^T / n, `cross` = X X~^T / n [G, K, K]; means [G, K]."""

    own: Tensor
    cross: Tensor
    count: int
    mean: Tensor
    float_mean: Tensor

    @cached_property
    def damping(self) -> Tensor:
        """d [G, 1, 1]."""
        power = self.own.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-12)
        return (DAMPING + self.own.shape[2] / self.count) * power[:, None, None]

    @cached_property
    def damped(self) -> Tensor:
        """H = X~ X~^T / n + d I [G, K, K]."""
        damped = self.own.clone()
        damped.diagonal(dim1=1, dim2=2).add_(self.damping[:, 0])
        return damped

    @cached_property
    def _factor(self) -> Tensor:
        """Cholesky factor of H, in float64: positive inputs alone make one eigenvalue near K."""
        return torch.linalg.cholesky(self.damped.double())

    @cached_property
    def inverse(self) -> Tensor:
        """H^-1 [G, K, K]."""
        return torch.cholesky_inverse(self._factor).to(self.own.dtype)

    def right_side(self, rows: Tensor) -> Tensor:
        """B = W X X~^T / n + d W of the normal equations W' H = B [G, R, K], for float weights W of that shape."""
        return rows @ self.cross + self.damping * rows

    def solve(self, right_side: Tensor) -> Tensor:
        """The least-squares weights W' [G, R, K] for a right-hand side of that shape."""
        return torch.cholesky_solve(right_side.mT.double(), self._factor).mT.to(self.own.dtype)

    def mean_difference(self, rows: Tensor, changed: Tensor) -> Tensor:
        """What to add to the bias [G, R] where `rows` [G, R, K] become `changed`."""
        return (rows @ self.float_mean[:, :, None] - changed @ self.mean[:, :, None])[:, :, 0]


def moments(pairs: Iterable[tuple[Tensor, Tensor]]) -> Moments:
    """From batches of the operand vectors [G, n, K], of the float layer and of the layer behind changed ones."""
    sums: list[Tensor] = []
    count = 0
    for x, changed in pairs:
        parts = [changed.mT @ changed, x.mT @ changed, changed.sum(1), x.sum(1)]
        sums = [total + part for total, part in zip(sums, parts, strict=True)] if sums else parts
        count += changed.shape[1]
    own, cross, mean, float_mean = (total / count for total in sums)
    return Moments(own, cross, count, mean, float_mean)


def operands(
    module: TorchClassifier, layer: Layer, values: Values, settings: LoopSettings, changed: Changed | None = None
) -> Iterator[Tensor]:
    """Batches of the operand vectors [G, n, K] of a layer, from `values` [N, ...] before it."""
    before = module.segment(values, [layer.input])
    for part in batches(before, values, settings.batch, **(changed or Changed(parameters={}, transforms={}))):
        yield module.operand_vectors(layer, part, settings.compensate_places)


def stretch_moments(
    module: TorchClassifier, layer: Layer, stretch: Stretch, changes: Changes, settings: LoopSettings
) -> Moments:
    """Moments of a layer of the stretch's block, behind the layers before it as they are now.

    Raises MixMixError where what the layer reads is not finite.
    """
    changed = changes.of(module.segment(stretch.block.inputs, [layer.input]))
    pairs = zip(
        operands(module, layer, stretch.float_inputs, settings),
        operands(module, layer, stretch.changed_inputs, settings, changed),
        strict=True,
    )
    return checked(moments(pairs), layer)


def checked(found: Moments, layer: Layer) -> Moments:
    """The same moments. Raises MixMixError where they are not finite."""
    if not bool((found.own.isfinite() & found.cross.isfinite()).all()):
        raise MixMixError(
            f"what layer {layer.name} reads is not finite on these images: see which layer it begins in with"
            " mixmix validate --layers, or leave its weights to training with --set compensate=false"
        )
    return found


class Compensated(Protocol):
    """A changed weight that can make up for its own change."""

    def compensate(self, layer: Layer, found: Moments) -> Tensor:
        """Change the weight of `layer`; what to add to its bias [C]."""
        ...


def compensate(
    module: TorchClassifier,
    layer: Layer,
    stretch: Stretch,
    changes: Changes,
    settings: LoopSettings,
    weight: Compensated,
    bias: LearnedTensor | None,
) -> None:
    """Let a layer of the stretch's block make up for its change, behind the layers before it as they are now.

    Raises MixMixError where what the layer reads is not finite.
    """
    shift = weight.compensate(layer, stretch_moments(module, layer, stretch, changes, settings))
    if bias is not None:
        bias.value = shifted(module, layer, bias.value, shift)


def shifted(module: TorchClassifier, layer: Layer, bias: Tensor, shift: Tensor) -> Tensor:
    """A layer's bias with `shift` [C] added, in units of what the layer's products come to.

    The same bias where it has not a number for each channel.
    """
    unit = module.bias_unit(layer)
    if unit is None or bias.numel() != shift.numel():
        return bias
    return bias + (shift * unit).view_as(bias)


def settled_layers(module: TorchClassifier, settings: LoopSettings) -> set[str]:
    """Outputs of the layers whose weights can be settled in closed form: not too many an output channel."""
    return {
        layer.output
        for layer in module.layers()
        if layer.parameters // layer.shape[layer.axis] <= settings.compensate_inputs
    }


def to_rows(weight: Tensor, layer: Layer) -> Tensor:
    """A layer's weight as [G, R, K]: R output channels a group, K weights each, in the order of the operand vectors."""
    rows = weight.movedim(layer.axis, 0)
    return rows.reshape(layer.groups, len(rows) // layer.groups, -1)


def from_rows(rows: Tensor, layer: Layer) -> Tensor:
    """The way back from `to_rows`."""
    first, *others = (layer.shape[layer.axis], *layer.shape[: layer.axis], *layer.shape[layer.axis + 1 :])
    return rows.reshape(first, *others).movedim(0, layer.axis)
