"""Resize, in every mode that the standard has, and its predecessor Upsample.

Resizing is separable and linear: along each axis, output o = sum_k w[o, k] x[i[o, k]]. Indices i and weights w come
from the coordinate transformation and the kernel (one tap for nearest, two for linear, four for cubic, more with
antialias), in double precision; gradients pass through the gathers. Nearest is decided in single precision, as
onnxruntime does it, because there the last digit can choose another pixel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from converters.ops.registry import Attributes, Body, operator

Numbers = Tensor | Sequence[float] | None


def _coordinates(mode: str, out: int, size: int, scale: float, start: float, end: float, dtype: torch.dtype) -> Tensor:
    """Where each of `out` outputs lies on an axis of `size` inputs, in inputs."""
    x = torch.arange(out, dtype=dtype)
    match mode:
        case "asymmetric":
            return x / scale
        case "align_corners":
            return x * (size - 1) / (out - 1) if out > 1 else torch.zeros_like(x)
        case "pytorch_half_pixel" if out == 1:
            return torch.zeros_like(x)
        case "half_pixel" | "pytorch_half_pixel":
            return (x + 0.5) / scale - 0.5
        case "half_pixel_symmetric":
            return size / 2 * (1 - out / (scale * size)) + (x + 0.5) / scale - 0.5
        case "tf_half_pixel_for_nn":
            return (x + 0.5) / scale
        case "tf_crop_and_resize":
            if out == 1:
                return 0.5 * (start + end) * (size - 1) + torch.zeros_like(x)
            return start * (size - 1) + x * (end - start) * (size - 1) / (out - 1)
    raise NotImplementedError(f"coordinate_transformation_mode {mode!r}")


def _linear(distance: Tensor) -> Tensor:
    return (1 - distance.abs()).clamp_min(0)


def _cubic(a: float) -> Callable[[Tensor], Tensor]:
    """Keys' kernel with parameter a."""

    def kernel(distance: Tensor) -> Tensor:
        x = distance.abs()
        near = (a + 2) * x**3 - (a + 3) * x**2 + 1
        far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
        return torch.where(x <= 1, near, torch.where(x < 2, far, torch.zeros_like(x)))

    return kernel


NEAREST: dict[str, Callable[[Tensor], Tensor]] = {
    "round_prefer_floor": lambda c: c.floor() + (c - c.floor() > 0.5),
    "round_prefer_ceil": lambda c: c.floor() + (c - c.floor() >= 0.5),
    "floor": torch.floor,
    "ceil": torch.ceil,
}


def _taps(attributes: Attributes, where: Tensor, size: int, scale: float) -> tuple[Tensor, Tensor]:
    """Indices and weights [out, K] for coordinates [out]."""
    mode = attributes.get("mode", "nearest")
    if mode == "nearest":
        index = NEAREST[attributes.get("nearest_mode", "round_prefer_floor")](where)
        return index.clamp(0, size - 1).long()[:, None], torch.ones(len(where), 1, dtype=torch.float64)
    kernel, reach = (_linear, 1) if mode == "linear" else (_cubic(attributes.get("cubic_coeff_a", -0.75)), 2)
    squeeze = min(scale, 1.0) if attributes.get("antialias", 0) else 1.0
    span = math.ceil(reach / squeeze)
    index = torch.floor(where)[:, None] + torch.arange(1 - span, span + 1)
    weights = kernel((index - where[:, None]) * squeeze)
    if attributes.get("exclude_outside", 0):
        weights = torch.where((index < 0) | (index > size - 1), 0, weights)
    weights = weights / weights.sum(1, keepdim=True)
    return index.clamp(0, size - 1).long(), weights


def _along(x: Tensor, axis: int, index: Tensor, weights: Tensor) -> Tensor:
    shape = [1] * x.dim()
    shape[axis] = -1
    total: Tensor | None = None
    for k in range(index.shape[1]):
        part = x.index_select(axis, index[:, k].to(x.device))
        if index.shape[1] > 1:
            part = part * weights[:, k].to(x).view(shape)
        total = part if total is None else total + part
    assert total is not None
    return total


def _listed(numbers: Numbers) -> list[float]:
    return [float(number) for number in numbers] if numbers is not None else []


def _outcome(
    attributes: Attributes, lengths: list[int], scales: list[float], sizes: list[float]
) -> list[tuple[int, float]]:
    """Length and scale of each resized axis."""
    if not sizes:
        # in single precision, where 3 * 2.3333333 is 7
        outs = torch.tensor(lengths, dtype=torch.float32) * torch.tensor(scales, dtype=torch.float32)
        return list(zip(outs.int().tolist(), scales, strict=True))
    policy = attributes.get("keep_aspect_ratio_policy", "stretch")
    ratios = [wanted / length for wanted, length in zip(sizes, lengths, strict=True)]
    if policy == "stretch":
        return [(int(wanted), ratio) for wanted, ratio in zip(sizes, ratios, strict=True)]
    ratio = min(ratios) if policy == "not_larger" else max(ratios)
    return [(math.floor(length * ratio + 0.5), ratio) for length in lengths]


def _resize(attributes: Attributes, x: Tensor, roi: Numbers, scales: Numbers, sizes: Numbers) -> Tensor:
    axes = [axis % x.dim() for axis in attributes.get("axes", range(x.dim()))]
    mode = attributes.get("coordinate_transformation_mode", "half_pixel")
    dtype = torch.float32 if attributes.get("mode", "nearest") == "nearest" else torch.float64
    region = _listed(roi) if mode == "tf_crop_and_resize" else []
    region = region or [0.0] * len(axes) + [1.0] * len(axes)
    lengths = [x.shape[axis] for axis in axes]
    outcome = _outcome(attributes, lengths, _listed(scales), _listed(sizes))
    if mode != "tf_crop_and_resize" and [out for out, _ in outcome] == lengths:
        return x  # onnxruntime copies it, whatever the scales say
    for order, (axis, (out, scale)) in enumerate(zip(axes, outcome, strict=True)):
        start, end = region[order], region[order + len(axes)]
        size = x.shape[axis]
        if out == size and scale == 1 and (start, end) == (0.0, 1.0):
            continue
        where = _coordinates(mode, out, size, scale, start, end, dtype)
        x = _along(x, axis, *_taps(attributes, where, size, scale))
        if mode == "tf_crop_and_resize":
            shape = [1] * x.dim()
            shape[axis] = -1
            outside = ((where < 0) | (where > size - 1)).view(shape).to(x.device)
            x = torch.where(outside, attributes.get("extrapolation_value", 0.0), x)
    return x


@operator("Resize", 11, 13, 18, 19, static=(1, 2, 3))
def resize(attributes: Attributes) -> Body:
    def run(x: Tensor, roi: Numbers = None, scales: Numbers = None, sizes: Numbers = None) -> Tensor:
        return _resize(attributes, x, roi, scales, sizes)

    return run


def _upsample(attributes: Attributes) -> Body:
    fixed = {
        "mode": attributes.get("mode", "nearest"),
        "nearest_mode": "floor",
        "coordinate_transformation_mode": "asymmetric",
    }

    def run(x: Tensor, scales: Numbers = None) -> Tensor:
        return _resize(fixed, x, None, scales if scales is not None else attributes["scales"], None)

    return run


operator("Resize", 10, static=(1, 2, 3))(_upsample)
operator("Upsample", static=(1,))(_upsample)
