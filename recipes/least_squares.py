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

import torch
from torch import Tensor

from converters.errors import MixMixError
from converters.torch_module import Layer, TorchClassifier
from recipes.reconstruct import Changed, Changes, LearnedTensor, LoopSettings, Stretch, batches

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
        """d I [G, K, K]."""
        size = self.own.shape[2]
        power = self.own.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-12)
        share = DAMPING + size / self.count
        return share * power[:, None, None] * torch.eye(size, dtype=self.own.dtype, device=self.own.device)

    @cached_property
    def damped(self) -> Tensor:
        """X~ X~^T / n + d I [G, K, K]."""
        return self.own + self.damping

    @cached_property
    def inverse(self) -> Tensor:
        """(X~ X~^T / n + d I)^-1 [G, K, K]; taken in float64, as positive inputs alone make one eigenvalue near K."""
        return torch.cholesky_inverse(torch.linalg.cholesky(self.damped.double())).to(self.own.dtype)

    def asked(self, rows: Tensor) -> Tensor:
        """The right-hand side W X X~^T / n + d W of the normal equations [G, R, K], for float weights of that shape."""
        return rows @ (self.cross + self.damping)

    def aimed(self, asked: Tensor) -> Tensor:
        """The least-squares weights W' [G, R, K] for a right-hand side of that shape."""
        return torch.linalg.solve(self.damped, asked.mT).mT

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
    module: TorchClassifier, layer: Layer, start: str, x: Tensor, settings: LoopSettings, changed: Changed | None = None
) -> Iterator[Tensor]:
    """Batches of the operand vectors [G, n, K] of a layer, from the values `x` [N, ...] of `start` before it."""
    before = module.segment([start], [layer.input])
    for part in batches(before, x, settings.batch, **(changed or Changed(parameters={}, transforms={}))):
        yield module.operand_vectors(layer, part, settings.compensate_places)


def stretch_moments(
    module: TorchClassifier, layer: Layer, stretch: Stretch, changes: Changes, settings: LoopSettings
) -> Moments:
    """Moments of a layer of the stretch's block, behind the layers before it as they are now.

    Raises MixMixError where what the layer reads is not finite.
    """
    start = stretch.block.input
    changed = changes.of(module.segment([start], [layer.input]))
    pairs = zip(
        operands(module, layer, start, stretch.float_input, settings),
        operands(module, layer, start, stretch.changed_input, settings, changed),
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


def shift_bias(module: TorchClassifier, layer: Layer, bias: LearnedTensor, shift: Tensor) -> None:
    """Add `shift` [C], in units of what the layer's products come to, where the bias has a number for each channel."""
    unit = module.bias_unit(layer)
    if unit is not None and bias.value.numel() == shift.numel():
        bias.value = bias.value + (shift * unit).view_as(bias.value)


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
