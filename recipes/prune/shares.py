"""How much each layer gives up, so that together it is the sparsity that was asked for."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from converters.errors import MixMixError
from converters.torch_module import Layer, TorchClassifier
from recipes.allocate import Choice, allocate
from recipes.least_squares import checked, from_rows, moments, operands, settled_layers, shifted, to_rows
from recipes.patterns import NofM, Pattern, keep_largest
from recipes.prune import surgeon
from recipes.prune.masks import Choose, sparing
from recipes.prune.settings import PruneSettings
from recipes.sensitivity import Before, logit_noise

Shares = dict[str, float]
"""Part of the weights to remove, by layer output."""

GRID = (0.0, 0.2, 0.35, 0.5, 0.6, 0.7, 0.8, 0.87, 0.92, 0.95, 0.97, 0.98)
"""Shares that the noise of a layer is measured at; between them it is interpolated."""
FINE = 4
"""Choices between neighbours of the grid."""


def zeros_of(module: TorchClassifier, layers: Sequence[Layer]) -> Shares:
    """Part of the weights that is zero already, and stays so whatever is removed: those go first."""
    return {layer.output: float((module.constant(layer.weight) == 0).float().mean()) for layer in layers}


def uniform(layers: Sequence[Layer], sparsity: float, settings: PruneSettings, zeros: Shares) -> Shares:
    """The same for all, but for a first layer that stays as it is: with the `zeros` there are, together `sparsity`.

    Raises MixMixError where that cannot be reached.
    """
    dense = 1 if settings.dense_first and len(layers) > 1 else 0
    pruned, most = layers[dense:], settings.most
    share = _factor({layer.output: 1.0 for layer in pruned}, zeros, layers, sparsity)
    if share > most:
        helps = ["--set most=..."] * (sparsity > most) + ["--set dense_first=false"] * (sparsity <= most or share >= 1)
        would = f"would remove {share:.1%} of each layer{' but the first' * dense}"
        if share >= 1:
            would = "cannot be reached while the first layer stays dense"
        raise MixMixError(
            f"sparsity {sparsity:g} {would}, and no more than {most:g} of one may go: ask for less, or allow it with"
            f" {' '.join(helps)}"
        )
    return {layer.output: share for layer in pruned}


def by_threshold(module: TorchClassifier, layers: Sequence[Layer], sparsity: float, settings: PruneSettings) -> Shares:
    """What one threshold over |w| / rms(layer) says, with at most `most` of a layer removed."""
    weights = {layer.output: module.constant(layer.weight).flatten() for layer in layers}
    sizes = {name: w.abs() / w.square().mean().sqrt().clamp_min(1e-12) for name, w in weights.items()}
    _check_most(sparsity, settings)
    protected = {name: torch.where(keep_largest(size, settings.most), torch.inf, size) for name, size in sizes.items()}
    together = torch.cat(list(protected.values())).sort().values
    threshold = together[min(round(sparsity * len(together)), len(together) - 1)]
    return {name: float((size < threshold).float().mean()) for name, size in protected.items()}


def by_sensitivity(
    module: TorchClassifier,
    layers: Sequence[Layer],
    inputs: Tensor,
    pattern: Pattern,
    sparsity: float,
    settings: PruneSettings,
    advance: Callable[[], None] = lambda: None,
) -> Shares:
    """Shares of `layers`, which the pattern fits, with the least sum of logit noise, each measured alone on `inputs`.

    A layer gives up any share without a pattern, measured at those of GRID, and with N:M all that it asks for or none,
    together at least `sparsity`. Where weights will make up for those taken out, noise is measured so: with weights
    taken out stage by stage, and settled. All of `inputs` tell what layers read, `sensitive_images` of them measure.
    """
    stages, offered = _offers(pattern, settings)
    settled = settled_layers(module, settings) if settings.compensate else set()

    def versions(layer: Layer, before: Before) -> Iterator[dict[str, Tensor]]:
        if not pattern.fits(layer):
            return
        choices = [partial(stage.choose, layer=layer, share=share) for stage, share in stages]
        if layer.output in settled:
            yield from _compensated(module, layer, before, choices, settings)
        else:
            weight = module.constant(layer.weight)
            yield from ({layer.weight: torch.where(choose(weight.abs()), weight, 0.0)} for choose in choices)

    count = settings.sensitive_images
    zeros = zeros_of(module, layers)
    noise = logit_noise(module, inputs if settled else inputs[:count], versions, count, settings, advance)
    measured = [0.0, *(share for _, share in stages)]
    total = sum(layer.parameters for layer in layers)
    choices = []
    for layer in layers:
        rising = np.maximum.accumulate([0.0, *noise[layer.output]])  # removing more is never taken to do less harm
        curve = np.interp(offered, measured, rising)
        left = layer.parameters / total
        stays = [left * (1 - max(share, zeros[layer.output])) for share in offered]
        choices.append([Choice(cost, float(harm)) for cost, harm in zip(stays, curve, strict=True)])
    chosen = allocate(choices, 1 - sparsity)
    found = {layer.output: offered[index] for layer, index in zip(layers, chosen, strict=True)}
    if isinstance(pattern, NofM):
        return found
    factor = min(1.0, _factor(found, zeros, layers, sparsity))  # from a little above what was asked for to just it
    return {name: share * factor for name, share in found.items()}


def _offers(pattern: Pattern, settings: PruneSettings) -> tuple[list[tuple[Pattern, float]], list[float]]:
    """Ever stricter patterns and shares to measure noise at, and the shares that a layer may give up."""
    if isinstance(pattern, NofM):
        return pattern.by_stages(pattern.share), [0.0, pattern.share]
    grid = [share for share in GRID if share <= settings.most] + [settings.most] * (settings.most not in GRID)
    return [(pattern, share) for share in grid[1:]], _between(grid)


def _compensated(
    module: TorchClassifier, layer: Layer, before: Before, choices: Sequence[Choose], settings: PruneSettings
) -> Iterator[dict[str, Tensor]]:
    """Weight and bias of a layer after each of `choices`, which are ever stricter, with what stays settled."""
    weight = module.constant(layer.weight)
    vectors = operands(module, layer, before.read, settings)
    found = checked(moments((each, each) for each in vectors), layer)
    rules = surgeon.by_rows([sparing(choose, weight) for choose in choices], layer)
    whole = to_rows(weight, layer)
    for rows, _ in surgeon.remove(whole, found, rules, settings.settle_steps):
        tensors = {layer.weight: from_rows(rows, layer)}
        if layer.bias is not None:
            shift = found.mean_difference(whole, rows).flatten()
            tensors[layer.bias] = shifted(module, layer, module.constant(layer.bias), shift)
        yield tensors


def check_reachable(layers: Sequence[Layer], sparsity: float, settings: PruneSettings, zeros: Shares) -> None:
    """Raise MixMixError where the layers cannot give up so much of their weights, however it is allocated."""
    if settings.allocation == "uniform":
        uniform(layers, sparsity, settings, zeros)
    else:
        _check_most(sparsity, settings)


def _check_most(sparsity: float, settings: PruneSettings) -> None:
    if sparsity > settings.most:
        raise MixMixError(
            f"sparsity {sparsity:g} cannot be reached with at most {settings.most:g} of a layer removed: ask for less,"
            " or raise it with --set most=..."
        )


def _between(grid: Sequence[float]) -> list[float]:
    """The grid with FINE - 1 more values between neighbours."""
    fine = [a + (b - a) * step / FINE for a, b in itertools.pairwise(grid) for step in range(FINE)]
    return [*fine, grid[-1]]


def _factor(shares: Mapping[str, float], zeros: Mapping[str, float], layers: Sequence[Layer], sparsity: float) -> float:
    """What all shares are multiplied by for a sparsity of all layers, of which none gets below its `zeros`.

    sum_l n_l max(f s_l, z_l) = sparsity sum_l n_l, which grows with f, in pieces that are straight: solved on the one
    that it falls into. 0 where the zeros alone are as much, infinite where no layer has a share.
    """
    given = [(layer.parameters, shares.get(layer.output, 0.0), zeros[layer.output]) for layer in layers]
    wanted = sparsity * sum(n for n, _, _ in given) - sum(n * z for n, _, z in given)
    if wanted <= 0:
        return 0.0
    growing, started = 0.0, 0.0  # of the layers that give up more than they have lost: sum of n s, sum of n z
    starts = sorted((z / s, n * s, n * z) for n, s, z in given if s > 0)
    for index, (_, slope, lost) in enumerate(starts):
        growing, started = growing + slope, started + lost
        factor = (wanted + started) / growing
        if index + 1 == len(starts) or factor <= starts[index + 1][0]:
            return factor
    return math.inf
