"""Operators that move elements: blocks and depth, gathers and scatters, samples of images, triangles, sums by name."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from converters.ops.registry import Attributes, Body, numbers, operator


@operator("DepthToSpace")
def depth_to_space(attributes: Attributes) -> Body:
    size, column_major = attributes["blocksize"], attributes.get("mode", "DCR") == "CRD"

    def run(x: Tensor) -> Tensor:
        count, channels, height, width = x.shape
        if column_major:
            blocks = x.reshape(count, channels // size**2, size, size, height, width).permute(0, 1, 4, 2, 5, 3)
        else:
            blocks = x.reshape(count, size, size, channels // size**2, height, width).permute(0, 3, 4, 1, 5, 2)
        return blocks.reshape(count, channels // size**2, height * size, width * size)

    return run


@operator("SpaceToDepth")
def space_to_depth(attributes: Attributes) -> Body:
    size = attributes["blocksize"]

    def run(x: Tensor) -> Tensor:
        count, channels, height, width = x.shape
        blocks = x.reshape(count, channels, height // size, size, width // size, size)
        return blocks.permute(0, 3, 5, 1, 2, 4).reshape(count, channels * size**2, height // size, width // size)

    return run


@operator("Einsum")
def einsum(attributes: Attributes) -> Body:
    equation = attributes["equation"].replace(" ", "")
    return lambda *operands: torch.einsum(equation, *operands)


@operator("Trilu", static=(1,))
def trilu(attributes: Attributes) -> Body:
    part = torch.triu if attributes.get("upper", 1) else torch.tril

    def run(x: Tensor, diagonal: Tensor | list[int] | int = 0) -> Tensor:
        return part(x, *numbers(diagonal))

    return run


@operator("Gather")
def gather(attributes: Attributes) -> Body:
    """The indices' axes take the place of the axis that they index."""
    axis = attributes.get("axis", 0)

    def run(x: Tensor, indices: Tensor) -> Tensor:
        at = axis % x.dim()
        found = x.index_select(at, indices.long().reshape(-1) % x.shape[at])
        return found.reshape((*x.shape[:at], *indices.shape, *x.shape[at + 1 :]))

    return run


@operator("GatherElements")
def gather_elements(attributes: Attributes) -> Body:
    axis = attributes.get("axis", 0)
    return lambda x, indices: torch.gather(x, axis, indices.long() % x.shape[axis])


@operator("GatherND")
def gather_nd(attributes: Attributes) -> Body:
    batch = attributes.get("batch_dims", 0)

    def run(x: Tensor, indices: Tensor) -> Tensor:
        leading = x.shape[:batch]
        flat = x.reshape(leading.numel(), *x.shape[batch:])
        rows = indices.long().reshape(leading.numel(), -1, indices.shape[-1])
        places = torch.arange(len(flat), device=x.device)[:, None]
        found = flat[(places, *rows.unbind(-1))]
        return found.reshape((*indices.shape[:-1], *x.shape[batch + indices.shape[-1] :]))

    return run


SCATTERS = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}
"""Torch's names of the ways to combine what falls on one place."""


def scatter_elements(attributes: Attributes) -> Body:
    """Updates at indices along one axis; equal indices are combined with `reduction`, and unordered without."""
    axis, reduction = attributes.get("axis", 0), attributes.get("reduction", "none")

    def run(x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
        index = indices.long() % x.shape[axis]
        if reduction == "none":
            return x.scatter(axis, index, updates)
        return x.scatter_reduce(axis, index, updates, SCATTERS[reduction])

    return run


operator("Scatter")(scatter_elements)
operator("ScatterElements")(scatter_elements)


@operator("ScatterND")
def scatter_nd(attributes: Attributes) -> Body:
    """Updates at indices; equal indices are combined with `reduction`, and unordered without."""
    reduction = attributes.get("reduction", "none")

    def run(x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
        places = tuple(indices.long().unbind(-1))
        if reduction in ("none", "add"):
            return x.index_put(places, updates, accumulate=reduction == "add")
        inner = x.shape[len(places) :]
        strides = [x.shape[axis + 1 : len(places)].numel() for axis in range(len(places))]
        rows = sum((at % side) * step for at, side, step in zip(places, x.shape, strides, strict=False))
        assert isinstance(rows, Tensor)
        into = x.reshape(-1, inner.numel())
        index = rows.reshape(-1, 1).expand(-1, inner.numel())
        return into.scatter_reduce(0, index, updates.reshape(-1, inner.numel()), SCATTERS[reduction]).reshape(x.shape)

    return run


@operator("NonZero")
def non_zero(_attributes: Attributes) -> Body:
    return lambda x: torch.nonzero(x).T


@operator("OneHot", static=(1,))
def one_hot(attributes: Attributes) -> Body:
    """Off everywhere where an index is out of range."""
    axis = attributes.get("axis", -1)

    def run(indices: Tensor, depth: Tensor | list[int] | int, values: Tensor) -> Tensor:
        (count,) = numbers(depth)
        places = torch.where(indices < 0, indices + count, indices).unsqueeze(axis)
        shape = [1] * places.dim()
        shape[axis] = -1
        hot = places == torch.arange(count, device=indices.device).view(shape)
        return torch.where(hot, values[1], values[0])

    return run


SAMPLINGS = {"linear": "bilinear", "cubic": "bicubic"}
"""The names of opset 20, and those of opset 16, which are torch's."""


@operator("GridSample")
def grid_sample(attributes: Attributes) -> Body:
    given: str = attributes.get("mode", "linear")
    padding: str = attributes.get("padding_mode", "zeros")
    mode: str = SAMPLINGS.get(given, given)
    aligned = bool(attributes.get("align_corners", 0))
    return lambda x, grid: F.grid_sample(x, grid, mode, padding, aligned)


@operator("AffineGrid", static=(1,))
def affine_grid(attributes: Attributes) -> Body:
    aligned = bool(attributes.get("align_corners", 0))
    return lambda theta, size: F.affine_grid(theta, numbers(size), aligned)
