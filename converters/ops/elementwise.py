"""Elementwise operators: activations that newer exporters name, comparisons, remainders."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from converters.ops.registry import Attributes, Body, operator

SELU_ALPHA, SELU_GAMMA = 1.67326319217681884765625, 1.05070102214813232421875  # ONNX's defaults


@operator("Mish", 18, 22)
def mish(_attributes: Attributes) -> Body:
    return F.mish


@operator("Swish", 24)
def swish(attributes: Attributes) -> Body:
    alpha = attributes.get("alpha", 1.0)
    return lambda x: x * torch.sigmoid(alpha * x)


@operator("Celu", 12)
def celu(attributes: Attributes) -> Body:
    return lambda x: F.celu(x, attributes.get("alpha", 1.0))


@operator("Selu", 6, 22)
def selu(attributes: Attributes) -> Body:
    alpha, gamma = attributes.get("alpha", SELU_ALPHA), attributes.get("gamma", SELU_GAMMA)
    return lambda x: gamma * F.elu(x, alpha)


@operator("Softsign", 1, 22)
def softsign(_attributes: Attributes) -> Body:
    return F.softsign


@operator("ThresholdedRelu", 10, 22)
def thresholded_relu(attributes: Attributes) -> Body:
    return lambda x: F.threshold(x, attributes.get("alpha", 1.0), 0.0)


@operator("Mod", 10, 13)
def mod(attributes: Attributes) -> Body:
    """The remainder has the divisor's sign; with `fmod`, the dividend's."""
    return torch.fmod if attributes.get("fmod", 0) else torch.remainder


@operator("Dropout", 12, 13, 22)
def dropout(_attributes: Attributes) -> Body:
    """Inference form, whatever the seed, the ratio and the mode say."""
    return lambda x, *_: x


def _plain(function: Callable[..., Tensor]) -> Callable[[Attributes], Body]:
    return lambda _attributes: function


for _name, _function, _versions in (
    ("GreaterOrEqual", torch.ge, (12, 16)),
    ("LessOrEqual", torch.le, (12, 16)),
    ("Cos", torch.cos, (7, 22)),
    ("Sin", torch.sin, (7, 22)),
    ("Round", torch.round, (11, 22)),
):
    operator(_name, *_versions)(_plain(_function))
