"""Normalisation without stored statistics: groups, root mean square, unit norm."""

from __future__ import annotations

import torch
from torch import Tensor

from converters.ops.registry import Attributes, Body, operator


def _standardise(x: Tensor, groups: int, epsilon: float) -> Tensor:
    """x [N, C, ...] with zero mean and unit variance within each of `groups` runs of channels."""
    grouped = x.reshape(len(x), groups, -1)
    variance, mean = torch.var_mean(grouped, 2, correction=0, keepdim=True)
    return ((grouped - mean) * torch.rsqrt(variance + epsilon)).reshape(x.shape)


@operator("GroupNormalization", 18)
def group_normalization_by_group(attributes: Attributes) -> Body:
    """The first form: scale and bias have one entry a group."""
    groups, epsilon = attributes["num_groups"], attributes.get("epsilon", 1e-5)

    def run(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        normal = _standardise(x, groups, epsilon).reshape(len(x), groups, -1)
        return (normal * scale.reshape(1, -1, 1) + bias.reshape(1, -1, 1)).reshape(x.shape)

    return run


@operator("GroupNormalization", 21)
def group_normalization(attributes: Attributes) -> Body:
    """Scale and bias have one entry a channel."""
    groups, epsilon = attributes["num_groups"], attributes.get("epsilon", 1e-5)

    def run(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        shape = (1, -1, *[1] * (x.dim() - 2))
        return _standardise(x, groups, epsilon) * scale.view(shape) + bias.view(shape)

    return run


@operator("RMSNormalization", 23)
def rms_normalization(attributes: Attributes) -> Body:
    axis, epsilon = attributes.get("axis", -1), attributes.get("epsilon", 1e-5)

    def run(x: Tensor, scale: Tensor) -> Tensor:
        axes = tuple(range(axis % x.dim(), x.dim()))
        return x * torch.rsqrt(x.square().mean(axes, keepdim=True) + epsilon) * scale

    return run


@operator("LpNormalization", 1, 22)
def lp_normalization(attributes: Attributes) -> Body:
    axis, p = attributes.get("axis", -1), attributes.get("p", 2)

    def run(x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, p, axis, keepdim=True)
        return torch.where(norm == 0, torch.zeros_like(x), x / torch.where(norm == 0, 1, norm))

    return run
