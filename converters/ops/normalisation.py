"""Normalisation without stored statistics: layers, instances, groups, root mean square, unit norm, neighbours."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from converters.ops.registry import OUTPUTS, Attributes, Body, operator


@operator("LayerNormalization")
def layer_normalization(attributes: Attributes) -> Body:
    """Over `axis` and all that follow; a second and third output are the mean and the inverse deviation."""
    axis, epsilon = attributes.get("axis", -1), attributes.get("epsilon", 1e-5)
    outputs = attributes.get(OUTPUTS, 1)

    def run(x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Any:
        shape = x.shape[axis:]
        if scale.shape == shape and (bias is None or bias.shape == shape):
            results: tuple[Tensor, ...] = torch.native_layer_norm(x, shape, scale, bias, epsilon)
        else:  # either may also be of fewer axes, or of ones
            normal, *moments = torch.native_layer_norm(x, shape, None, None, epsilon)
            results = (normal * scale if bias is None else normal * scale + bias, *moments)
        return results[0] if outputs == 1 else results[:outputs]

    return run


@operator("InstanceNormalization")
def instance_normalization(attributes: Attributes) -> Body:
    epsilon = attributes.get("epsilon", 1e-5)
    return lambda x, scale, bias: torch.group_norm(x, x.shape[1], scale, bias, epsilon)


@operator("GroupNormalization", 18)
def group_normalization_by_group(attributes: Attributes) -> Body:
    """The first form: scale and bias have one entry a group."""
    groups, epsilon = attributes["num_groups"], attributes.get("epsilon", 1e-5)

    def run(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        share = x.shape[1] // groups
        return torch.group_norm(x, groups, scale.repeat_interleave(share), bias.repeat_interleave(share), epsilon)

    return run


@operator("GroupNormalization", 21)
def group_normalization(attributes: Attributes) -> Body:
    """Scale and bias have one entry a channel."""
    groups, epsilon = attributes["num_groups"], attributes.get("epsilon", 1e-5)
    return lambda x, scale, bias: torch.group_norm(x, groups, scale, bias, epsilon)


@operator("MeanVarianceNormalization")
def mean_variance_normalization(attributes: Attributes) -> Body:
    axes = attributes.get("axes", [0, 2, 3])

    def run(x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
        return (x - mean) / (variance.sqrt() + 1e-9)

    return run


@operator("RMSNormalization")
def rms_normalization(attributes: Attributes) -> Body:
    axis, epsilon = attributes.get("axis", -1), attributes.get("epsilon", 1e-5)

    def run(x: Tensor, scale: Tensor) -> Tensor:
        axes = tuple(range(axis % x.dim(), x.dim()))
        return x * torch.rsqrt(x.square().mean(axes, keepdim=True) + epsilon) * scale

    return run


@operator("LpNormalization")
def lp_normalization(attributes: Attributes) -> Body:
    axis, p = attributes.get("axis", -1), attributes.get("p", 2)

    def run(x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, p, axis, keepdim=True)
        return torch.where(norm == 0, torch.zeros_like(x), x / torch.where(norm == 0, 1, norm))

    return run


@operator("LRN")
def lrn(attributes: Attributes) -> Body:
    """Each value divided by a power of the sum of squares at the same place in `size` neighbouring channels."""
    size, alpha = attributes["size"], attributes.get("alpha", 1e-4)
    beta, offset = attributes.get("beta", 0.75), attributes.get("bias", 1.0)
    before = (size - 1) // 2

    def run(x: Tensor) -> Tensor:
        squares = x.square().reshape(len(x), 1, x.shape[1], -1)
        padded = F.pad(squares, [0, 0, before, size - 1 - before])
        mean = F.avg_pool2d(padded, (size, 1), stride=1).reshape(x.shape)
        return x / (offset + alpha * mean) ** beta

    return run
