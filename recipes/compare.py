"""Whether two image sets are alike in the eyes of a model: a two-sample test, and the distance of their statistics.

Maximum mean discrepancy (Gretton et al. 2012; the paper's appendix A): with a universal kernel k it is zero if and only
if both sets come from one distribution. With k(x, y) = exp(-||x - y||^2 / (2 s^2)), s the median distance of the pooled
features, the unbiased estimate (their eq. 3) of m and n samples is

    MMD^2 = sum_{i != j} k(x_i, x_j) / (m (m - 1)) + sum_{i != j} k(y_i, y_j) / (n (n - 1)) - 2 mean k(x_i, y_j)

and its p-value is the share of random divisions of the pooled samples that give at least as much.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from converters.errors import MixMixError
from converters.torch_module import Segment, TorchClassifier
from recipes.images import ImageSet

BATCH = 64
LARGEST = 2000
"""Images of each set that the test is made on, evenly spread over it: it holds a number for each pair of them."""
CONSTANT = 1e-6
"""Share of a layer's means that its deviations come to by rounding alone."""
FEWEST = 4
"""Images that a set must have: with fewer no division of the pooled samples says anything."""


@dataclass(frozen=True)
class Comparison:
    """Two image sets `a` and `b` in a model's features."""

    model: str
    counts: tuple[int, int]
    features: str
    """Name of the value that the test is made on: the input of the last layer."""
    mmd2: float
    p_value: float
    permutations: int
    distance: float
    """Mean over layers of (||mean_a - mean_b|| + ||std_a - std_b||) / ||std_b||; of a constant b, over its size."""
    to_stored: tuple[float, float] | None
    """The same distance of `a` and of `b` from the stored BatchNorm statistics; None where there are none."""
    layers: list[tuple[str, float]]
    """The distance of `a` and `b` by layer, in order: BatchNorm inputs, or the outputs of all layers without any."""


def kernel_matrix(features: Tensor) -> Tensor:
    """k of all pairs [N, N] in float64; `features` [N, D]. The bandwidth is the median of the distances."""
    distances = torch.cdist(features.double(), features.double())
    above = distances[torch.triu(torch.ones_like(distances, dtype=torch.bool), 1)]
    width = above.median().clamp_min(1e-12)
    return torch.exp(-distances.square() / (2 * width.square()))


def unbiased_mmd2(kernel: Tensor, first: Tensor) -> Tensor:
    """MMD^2 for one or many divisions of the samples: `first` [..., N] tells who belongs to the first set."""
    x = first.to(kernel)
    y = 1 - x
    m, n = x.sum(-1), y.sum(-1)
    off = kernel - torch.diag(kernel.diagonal())
    of_x, of_y = x @ off, y @ off
    within_x, within_y = (of_x * x).sum(-1) / (m * (m - 1)), (of_y * y).sum(-1) / (n * (n - 1))
    return within_x + within_y - 2 * (of_x * y).sum(-1) / (m * n)


def two_sample_test(a: Tensor, b: Tensor, permutations: int, seed: int) -> tuple[float, float]:
    """MMD^2 of features `a` [M, D] and `b` [N, D], and the permutation p-value, at least 1 / (permutations + 1)."""
    kernel = kernel_matrix(torch.cat([a, b]))
    first = torch.arange(len(kernel)) < len(a)
    generator = torch.Generator().manual_seed(seed)
    observed = unbiased_mmd2(kernel, first)
    divisions = torch.stack([first[torch.randperm(len(first), generator=generator)] for _ in range(permutations)])
    others = unbiased_mmd2(kernel, divisions)
    extreme = int((others >= observed - 1e-12).sum())
    return float(observed), (1 + extreme) / (1 + permutations)


@torch.no_grad()
def compare(module: TorchClassifier, a: ImageSet, b: ImageSet, *, permutations: int = 999, seed: int = 0) -> Comparison:
    """Compare two image sets. Raises MixMixError for a set too small or of other channels than the model's."""
    for images in (a, b):
        if len(images) < FEWEST:
            raise MixMixError(
                f"{len(images)} images of {images.source} are too few: a comparison needs at least {FEWEST}"
            )
    layers = module.layers()
    if not layers:
        raise MixMixError(f"{module.classifier.path} has no layer with constant weights to take features from")
    features, norms = layers[-1].input, module.batchnorms()
    # [N, C, ...] where convolutions and BatchNorm are, [..., C] behind Gemm and MatMul
    taps = {norm.input: 1 for norm in norms} or {x.output: 1 if x.op == "Conv" else -1 for x in layers}
    segment = module.segment([module.input_name], dict.fromkeys([features, *taps]))
    seen = [_statistics(segment, module, images, features, taps) for images in (a, b)]
    (features_a, of_a), (features_b, of_b) = seen
    if not bool(torch.isfinite(features_a).all() and torch.isfinite(features_b).all()):
        raise MixMixError(f"{module.classifier.path} gets NaN or infinity on these images: there is nothing to compare")
    chosen = [found[:: -(-len(found) // LARGEST)] for found in (features_a, features_b)]
    mmd2, p_value = two_sample_test(chosen[0], chosen[1], permutations, seed)
    distances = [(name, _distance(of_a[name], of_b[name])) for name in taps]
    stored = None
    if norms:
        expected = {norm.input: (norm.mean, norm.variance.sqrt()) for norm in norms}
        to_a, to_b = (_mean([_distance(of[name], expected[name]) for name in taps]) for of in (of_a, of_b))
        stored = (to_a, to_b)
    return Comparison(
        model=module.classifier.name,
        counts=(len(a), len(b)),
        features=features,
        mmd2=mmd2,
        p_value=p_value,
        permutations=permutations,
        distance=_mean([distance for _, distance in distances]),
        to_stored=stored,
        layers=distances,
    )


Statistics = tuple[Tensor, Tensor]
"""Mean and standard deviation of each channel, [C] both."""


def _statistics(
    segment: Segment, module: TorchClassifier, images: ImageSet, features: str, taps: Mapping[str, int]
) -> tuple[Tensor, dict[str, Statistics]]:
    """Features [N, D] on the CPU, and the statistics of each value of `taps` (with its channels' axis) over the set."""
    found: list[Tensor] = []
    sums: dict[str, list[Tensor]] = {name: [] for name in taps}
    for part in images.pixels.split(BATCH):
        values = segment({module.input_name: module.spec.to_input(part.to(module.device))})
        found.append(values[features].flatten(1).cpu())
        for name, channel in taps.items():
            x = values[name].double().movedim(channel, 1)
            axes = [axis for axis in range(x.dim()) if axis != 1]
            moments = torch.stack([x.mean(axes), x.square().mean(axes)]).cpu()
            sums[name].append(moments * (len(part) / len(images)))
    statistics = {}
    for name, parts in sums.items():
        mean, square = torch.stack(parts).sum(0)
        statistics[name] = (mean, (square - mean.square()).clamp_min(0).sqrt())
    return torch.cat(found), statistics


def _distance(a: Statistics, b: Statistics) -> float:
    """(||mean_a - mean_b|| + ||std_a - std_b||) / ||std_b||.

    Where b is constant, which leaves no deviation to be relative to, over ||mean_b||; where it is all zeros, over 1.
    """
    (mean_a, std_a), (mean_b, std_b) = a, (b[0].cpu().double(), b[1].cpu().double())
    deviation, value = float(std_b.norm()), float(mean_b.norm())
    size = deviation if deviation > CONSTANT * value else value or 1.0
    return float((mean_a - mean_b).norm() + (std_a - std_b).norm()) / size


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
