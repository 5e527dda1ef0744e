"""Closed-form rounding that makes up for its own error (GPTQ, Frantar et al. 2023), aimed at the float layer's output.

For one layer with float input X, input X~ through what is quantized already, and rows W:

1. the weight that on X~ answers as the float layer does on X:  W' = argmin ||W' X~ - W X||^2 + d ||W' - W||^2
   = (W X X~^T + d W) (X~ X~^T + d I)^-1;
   d grows with K / n, the number of weights over the number of vectors seen: what few vectors say of many weights is
   mostly chance, and calibration images are not the images that the model will see;
2. column by column, round and push the error onto the columns still to come: with U the upper Cholesky factor of
   (X~ X~^T + d I)^-1,  e_k = (w_k - round(w_k)) / U_kk,  w_j -= e_k U_kj for j > k;
3. the bias takes the mean difference that is left.

No gradient step is needed; reconstruction starts from the result.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from recipes.quantize import primitives as q

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


def moments(float_patches: Tensor, patches: Tensor) -> Moments:
    """From the operand vectors [G, n, K] of the float layer and of the layer behind quantized ones."""
    count = patches.shape[1]
    return Moments(
        own=patches.mT @ patches / count,
        cross=float_patches.mT @ patches / count,
        count=count,
        mean=patches.mean(1),
        float_mean=float_patches.mean(1),
    )


def compensate(rows: Tensor, found: Moments, scale: Tensor, zero: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Compensated weights and bias change.

    `rows` [G, R, K] are the weights by group, `scale` and `zero` [G, R]. Returns weights [G, R, K] that nearest
    rounding takes to the chosen integers, and what to add to the bias [G, R].
    """
    identity = torch.eye(rows.shape[2], dtype=rows.dtype, device=rows.device)
    power = found.own.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-12)
    share = DAMPING + rows.shape[2] / found.count
    damping = share * power[:, None, None] * identity
    own = found.own + damping
    aimed = torch.linalg.solve(own, (rows @ (found.cross + damping)).mT).mT
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(own)), upper=True)
    left, chosen, rounded = aimed.clone(), torch.empty_like(aimed), torch.empty_like(aimed)
    for k in range(rows.shape[2]):
        column = left[:, :, k]
        chosen[:, :, k] = column
        rounded[:, :, k] = q.fake_quantize(column, scale, zero, low, high)
        error = (column - rounded[:, :, k]) / factor[:, k, k, None]
        left[:, :, k:] -= error[:, :, None] * factor[:, None, k, k:]
    shift = (rows @ found.float_mean[:, :, None] - rounded @ found.mean[:, :, None])[:, :, 0]
    return chosen, shift
