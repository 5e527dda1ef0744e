"""Closed-form rounding that makes up for its own error (GPTQ, Frantar et al. 2023), aimed at the float layer's output.

From the least-squares weight of a layer behind what is quantized already (`recipes.least_squares`):

1. column by column, round and push the error onto the columns still to come: with U the upper Cholesky factor of
   (X~ X~^T + d I)^-1,  e_k = (w_k - round(w_k)) / U_kk,  w_j -= e_k U_kj for j > k;
2. the bias takes the mean difference that is left.

No gradient step is needed; reconstruction starts from the result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recipes.least_squares import Moments
from recipes.quantize import primitives as q


def gptq(
    rows: Tensor, found: Moments, scale: Tensor, zero: Tensor, low: int, high: int, zeros: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Rounded weights that make up for one another, and the bias change.

    `rows` [G, R, K] are the weights by group, with which `scale` and `zero` broadcast; where `zeros` [G, R, K] says so,
    a weight is zero and stays it, and others make up for that. Returns weights [G, R, K] that nearest rounding takes to
    the chosen integers, and what to add to the bias [G, R].
    """
    scale, zero = scale.expand_as(rows), zero.expand_as(rows)
    factor = torch.linalg.cholesky(found.inverse.double(), upper=True).to(rows.dtype)
    left = found.solve(found.right_side(rows))
    chosen, rounded = torch.empty_like(left), torch.empty_like(left)
    for k in range(rows.shape[2]):
        column = left[:, :, k].clone()
        chosen[:, :, k] = column if zeros is None else torch.where(zeros[:, :, k], 0.0, column)
        rounded[:, :, k] = q.fake_quantize(chosen[:, :, k], scale[:, :, k], zero[:, :, k], low, high)
        error = (column - rounded[:, :, k]) / factor[:, k, k, None]
        left[:, :, k:] -= error[:, :, None] * factor[:, None, k, k:]
    return chosen, found.mean_difference(rows, rounded)
