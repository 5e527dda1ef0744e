"""Channel statistics on the way through a model: one pass forward, one pass back.

For x [N, C, ...] with M elements a channel, mean m and biased deviation s of each channel c,

    dL/dx = dL/dy + (dL/dm_c - m_c dL/ds_c / s_c) / M + x dL/ds_c / (M s_c),

which is one multiplication and addition on what comes back through the model anyway. torch's own `var_mean` takes ten
times as long on a CPU, forward, and three passes back. What is of channels alone is done for all layers at once, as on
a GPU each operation on a few hundred numbers takes as long to start as one on millions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Statistics = tuple[Tensor, Tensor]
"""Mean and biased standard deviation of each channel, [C] both."""

LEAST_VARIANCE = 1e-12
"""Added to the variance, so that the deviation of a constant channel has a gradient."""


class _Moments(torch.autograd.Function):
    """x [N, C, ...] as it is, and mean and biased variance [C] of its channels.

    What comes back for these two is not their gradient but what `_Gather` makes of it: a and b of dL/dx = a_c + b_c x,
    the gradients with respect to sum x and sum x^2 / 2.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if x.device.type == "cpu":
            # the type of the running statistics, which are not used, is that of the result
            running = torch.zeros(x.shape[1], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
            mean, variance = torch.batch_norm_update_stats(x, running, running.clone(), 0.0)
        else:
            exact = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x  # 16 bits are too few to add up in
            variance, mean = torch.var_mean(exact, [axis for axis in range(x.dim()) if axis != 1], correction=0)
        ctx.save_for_backward(x)
        return x.view_as(x), mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_x: Tensor, offset: Tensor, slope: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        shape = [1, -1, *[1] * (x.dim() - 2)]
        return torch.addcmul(offset.view(shape).to(x.dtype), x, slope.view(shape).to(x.dtype)).add_(of_x)


class _Gather(torch.autograd.Function):
    """Means and deviations of all channels of several layers, [C1 + C2 + ...] both, from what `_Moments` gave of each.

    `shares` are one over the elements a channel, by layer; means and variances follow one another in `moments`.
    """

    @staticmethod
    def forward(ctx: Any, shares: tuple[float, ...], *moments: Tensor) -> tuple[Tensor, Tensor]:
        means, variances = moments[: len(shares)], moments[len(shares) :]
        mean, deviation = torch.cat(means), (torch.cat(variances) + LEAST_VARIANCE).sqrt()
        ctx.shares, ctx.counts = shares, tuple(map(len, means))
        ctx.save_for_backward(mean, deviation)
        return mean, deviation

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_mean: Tensor, of_deviation: Tensor) -> tuple[Tensor | None, ...]:
        mean, deviation = ctx.saved_tensors
        share = _for_each_channel(ctx.shares, ctx.counts, mean.device, mean.dtype)
        slope = of_deviation * share / deviation
        offset = of_mean * share - mean * slope
        return None, *offset.split(ctx.counts), *slope.split(ctx.counts)


class _Norms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: tuple[int, ...]) -> Tensor:
        norms = torch.stack(torch._foreach_norm(x.split(counts)))
        ctx.counts = counts
        ctx.save_for_backward(x, norms)
        return norms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_norms: Tensor) -> tuple[Tensor, None]:
        x, norms = ctx.saved_tensors
        norm = spread(norms, ctx.counts)
        return spread(of_norms, ctx.counts) * (x / norm).masked_fill_(norm == 0, 0), None


def norms_by_layer(x: Tensor, counts: tuple[int, ...]) -> Tensor:
    """The L2 norms [L] of the first counts[0] numbers of x, of the counts[1] that follow, and so on."""
    norms: Tensor = _Norms.apply(x, counts)
    return norms


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: tuple[int, ...]) -> Tensor:
        ctx.counts = counts
        return torch.segment_reduce(x, "sum", lengths=lengths(counts, x.device), unsafe=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_sums: Tensor) -> tuple[Tensor, None]:
        return spread(of_sums, ctx.counts), None


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: tuple[int, ...]) -> Tensor:
        ctx.counts = counts
        return x[_layer_of(counts, x.device)]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_channels: Tensor) -> tuple[Tensor, None]:
        return sums_by_layer(of_channels, ctx.counts), None


def sums_by_layer(x: Tensor, counts: tuple[int, ...]) -> Tensor:
    """The sums [L] of the first counts[0] numbers of x, of the counts[1] that follow, and so on."""
    sums: Tensor = _Sums.apply(x, counts)
    return sums


def spread(x: Tensor, counts: tuple[int, ...]) -> Tensor:
    """Numbers [L], one a layer, for each of its channels: x[0] counts[0] times, x[1] counts[1] times, and so on."""
    channels: Tensor = _Spread.apply(x, counts)
    return channels


@lru_cache(64)
def lengths(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """How many channels each layer has [L]."""
    return torch.tensor(counts, device=device)


@lru_cache(64)
def _layer_of(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """Which layer each channel is of."""
    return torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).to(device)


@lru_cache(64)
def _for_each_channel(
    values: tuple[float, ...], counts: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> Tensor:
    """The value of its layer for each channel."""
    return torch.tensor(values, dtype=dtype, device=device)[_layer_of(counts, device)]


class Observer:
    """Sees named values as they appear in a forward pass, to which `transforms` goes.

    `axes` tells where the channels of each are: 1 in [N, C, ...], -1 in [N, ..., C]. The gradient of their statistics
    goes into them together with what comes back through the pass.
    """

    def __init__(self, axes: Mapping[str, int]) -> None:
        self._seen: dict[str, tuple[float, Tensor, Tensor]] = {}
        self.transforms: dict[str, Callable[[Tensor], Tensor]] = {
            name: self._watch(name, axis) for name, axis in axes.items()
        }

    def _watch(self, name: str, axis: int) -> Callable[[Tensor], Tensor]:
        seen = self._seen  # and not self: a cycle would keep a step's tensors until the collector comes by

        def see(x: Tensor) -> Tensor:
            y, mean, variance = _Moments.apply(x if axis == 1 else x.reshape(-1, x.shape[-1]))
            seen[name] = (len(mean) / x.numel(), mean, variance)
            return y.view(x.shape)

        return see

    @cached_property
    def statistics(self) -> dict[str, Statistics]:
        """Of each value that was seen, by name: to be read when the pass is over, in the same grad mode."""
        if not self._seen:
            return {}
        shares, means, variances = zip(*self._seen.values(), strict=True)
        counts = list(map(len, means))
        mean, deviation = _Gather.apply(shares, *means, *variances)
        return dict(zip(self._seen, zip(mean.split(counts), deviation.split(counts), strict=True), strict=True))
