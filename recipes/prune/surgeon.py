"""Weights taken out so that those that stay make up for them: Optimal Brain Surgeon, as far as whole layers allow.

With H = X~ X~^T + d I of the layer's operands (`recipes.least_squares`), taking out w_k alone and settling all others
raises the layer's squared error by w_k^2 / (H^-1)_kk (Hassibi and Stork 1993). So weights go by
|w_k| / sqrt((H^-1)_kk), some at a time: after each round, what stays is settled anew by least squares under the mask,
row by row

    w = argmin over w with w_k = 0 where the mask is 0 of  w H w^T - 2 w b^T,   b = W X X~^T + d W,

by conjugate gradients, for all rows at once. Between rounds H^-1 stays that of the whole layer, where Frantar et al.
(2022, "Optimal Brain Compression") follow every row's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from converters.torch_module import Layer
from recipes.least_squares import Moments, from_rows, to_rows

Rule = Callable[[Tensor], Tensor]
"""From what weights are worth [G, R, K] to a mask, true where one stays; of those worth nothing, none."""

LEAST = 1e-30  # where a row has no weight left there is nothing to divide


def settle(start: Tensor, kept: Tensor, curvature: Tensor, right_side: Tensor, steps: int) -> Tensor:
    """min over w, 0 where not `kept`, of w H w^T - 2 w b^T: `steps` conjugate gradients from `start`.

    `start`, `kept` and `right_side` (b) [G, R, K], `curvature` (H) [G, K, K]; the diagonal of H preconditions.
    """
    diagonal = curvature.diagonal(dim1=1, dim2=2)[:, None]
    w = torch.where(kept, start, 0.0)
    residual = torch.where(kept, right_side - w @ curvature, 0.0)
    scaled = residual / diagonal
    direction, power = scaled, (residual * scaled).sum(2, keepdim=True)
    for _ in range(steps):
        bent = torch.where(kept, direction @ curvature, 0.0)
        length = power / (direction * bent).sum(2, keepdim=True).clamp_min(LEAST)
        w = w + length * direction
        residual = residual - length * bent
        scaled = residual / diagonal
        before, power = power, (residual * scaled).sum(2, keepdim=True)
        direction = scaled + power / before.clamp_min(LEAST) * direction
    return w


def importance(found: Moments) -> Tensor:
    """1 / sqrt((H^-1)_kk) [G, 1, K]: what a weight's absolute value is multiplied with."""
    return found.inverse.diagonal(dim1=1, dim2=2).rsqrt()[:, None]


def by_rows(choices: Iterable[Rule], layer: Layer) -> list[Rule]:
    """Choices in the weight's layout as rules for its rows."""

    def rule(choose: Rule) -> Rule:
        return lambda rows: to_rows(choose(from_rows(rows, layer)), layer)

    return [rule(choose) for choose in choices]


def remove(rows: Tensor, found: Moments, rules: Iterable[Rule], steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Weights [G, R, K] and mask after each of `rules`, which are ever stricter; `rows` are the float weights."""
    right_side, factor = found.right_side(rows), importance(found)
    weights = found.solve(right_side)
    for rule in rules:
        kept = rule(weights.abs() * factor)
        weights = settle(weights, kept, found.damped, right_side, steps)
        yield weights, kept
