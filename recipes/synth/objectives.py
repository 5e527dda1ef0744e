"""Loss terms of synthesis, and the learned weights that balance them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from converters.torch_module import BatchNorm
from recipes.synth.statistics import Statistics, lengths, norms_by_layer, spread, sums_by_layer

LEAST = 1e-6
"""A layer whose deviations are all smaller is dead: its term has no size to be relative to."""
DEAD = 1e-3
"""Share of the root mean square of a layer's values, of which a channel's deviation falls short when it is dead."""


def batchnorm_loss(statistics: Mapping[str, Statistics], norms: list[BatchNorm], *, relative: bool = False) -> Tensor:
    """sum over BatchNorm layers of ||mean(X) - mu||_2 + ||std(X) - sigma||_2.

    `statistics` holds mean and biased deviation [C] of each layer's input. `relative` divides each layer's term by
    ||sigma||_2, so that a layer counts by how far off it is and not by its units.
    """
    mean, deviation, counts = _joined(statistics, (norm.input for norm in norms))
    mu, sigma = torch.cat([norm.mean for norm in norms]), torch.cat([norm.variance for norm in norms]).sqrt()
    terms = norms_by_layer(mean - mu, counts) + norms_by_layer(deviation - sigma, counts)
    if relative:
        sizes = norms_by_layer(sigma, counts)
        terms = terms / torch.where(sizes > LEAST, sizes, torch.ones_like(sizes))
    return terms.sum()


def unevenness_loss(statistics: Mapping[str, Statistics], names: Iterable[str]) -> Tensor:
    """mean over values of mean_c (m_c / s)^2 + mean_c log(s_c / s)^2, with log s = mean_c log s_c.

    m_c and s_c are mean and deviation of channel c of each of the values `names`, from `statistics`. Where BatchNorm
    was folded into a convolution, they were its offset beta_c and its scale |gamma_c| in training. Both are lost, and
    what is known of them is that training moves them little from where they begin, beta_c = 0 and gamma_c all alike: up
    to a factor this is the negative logarithm of a normal prior for beta_c / s and log |gamma_c| (ours). Of what
    LayerNormalization writes, m_c is what all places have in common. The size s of a value is free. Channels that
    hardly vary are left out: no image can change what is dead.
    """
    mean, deviation, counts = _joined(statistics, names)
    with torch.no_grad():
        power = sums_by_layer(mean.square() + deviation.square(), counts) / lengths(counts, mean.device)
        alive = (deviation > spread(DEAD * power.sqrt(), counts)).to(deviation)
        count = sums_by_layer(alive, counts).clamp_min(1)
    logarithms = deviation.clamp_min(LEAST).log()
    size = sums_by_layer(alive * logarithms, counts) / count
    uneven = (logarithms - spread(size, counts)).square() + (mean / spread(size.exp(), counts)).square()
    return (sums_by_layer(alive * uneven, counts) / count).mean()


def _joined(statistics: Mapping[str, Statistics], names: Iterable[str]) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Means and deviations of the channels of all these layers, and how many channels each of them has."""
    means, deviations = zip(*(statistics[name] for name in names), strict=True)
    return torch.cat(means), torch.cat(deviations), tuple(map(len, means))


def total_variation(images: Tensor) -> Tensor:
    """Mean squared difference of horizontal and vertical neighbours (the L2 form)."""
    vertical, horizontal = (_power(images.diff(dim=dim)) for dim in (2, 3))
    return vertical + horizontal


def _power(differences: Tensor) -> Tensor:
    """Mean square; 0 where an image of one row or column has no neighbours."""
    return differences.square().mean() if differences.numel() else differences.new_zeros(())


def deep_inversion_prior(images: Tensor, variation: float, magnitude: float) -> Tensor:
    """DeepInversion's image prior (Yin et al. 2020), in norms of sums and not in means.

    `variation` times the sum, over horizontal, vertical and both diagonal neighbours, of the L2 norm of all differences
    of the batch, plus `magnitude` times the mean L2 norm of an image.
    """
    horizontal, vertical = images.diff(dim=3), images.diff(dim=2)
    falling = images[:, :, 1:, 1:] - images[:, :, :-1, :-1]
    rising = images[:, :, 1:, :-1] - images[:, :, :-1, 1:]
    roughness = torch.stack([part.norm() for part in (horizontal, vertical, falling, rising)]).sum()
    return variation * roughness + magnitude * images.flatten(1).norm(dim=1).mean()


class LearnedWeights:
    """Balances terms of unlike size (seed, eq. 8): sum_i L_i / (L_i0 alpha_i^2) + alpha_i^2.

    L_i0 is the term's first value. At the optimum alpha_i^2 = sqrt(L_i / L_i0).
    """

    def __init__(self) -> None:
        self.first: dict[str, float] = {}
        self.alpha: dict[str, Tensor] = {}

    def register(self, name: str, first: float, device: torch.device) -> None:
        """Enter a term with its first value; a term that starts at zero is left as it is."""
        self.first[name] = first if first > 1e-12 else 1.0
        self.alpha[name] = torch.ones((), device=device, requires_grad=True)

    def combine(self, terms: Mapping[str, Tensor], factors: Mapping[str, float]) -> Tensor:
        """The weighted sum of the terms, each of which has been registered."""
        total = torch.zeros((), device=next(iter(terms.values())).device)
        for name, term in terms.items():
            squared = self.alpha[name].square()
            total = total + factors.get(name, 1.0) * (term / self.first[name] / squared + squared)
        return total
