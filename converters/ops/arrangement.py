"""Operators that move elements: blocks and depth, gathers and scatters, triangles, sums of products by name."""

from __future__ import annotations

import torch
from torch import Tensor

from converters.ops.registry import Attributes, Body, operator


@operator("DepthToSpace", 1, 11, 13)
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


@operator("SpaceToDepth", 1, 13)
def space_to_depth(attributes: Attributes) -> Body:
    size = attributes["blocksize"]

    def run(x: Tensor) -> Tensor:
        count, channels, height, width = x.shape
        blocks = x.reshape(count, channels, height // size, size, width // size, size)
        return blocks.permute(0, 3, 5, 1, 2, 4).reshape(count, channels * size**2, height // size, width // size)

    return run


@operator("Flatten", 1, 9, 11, 13, 21, 23, 24, 25)
def flatten(attributes: Attributes) -> Body:
    """To two dimensions: those before `axis`, and the others."""
    axis = attributes.get("axis", 1)

    def run(x: Tensor) -> Tensor:
        before = x.shape[:axis]  # a negative axis counts from the end, as a slice does
        rows = before.numel()
        return x.reshape(rows, -1 if rows else x.shape[axis:].numel())

    return run


@operator("Einsum", 12)
def einsum(attributes: Attributes) -> Body:
    equation = attributes["equation"].replace(" ", "")
    return lambda *operands: torch.einsum(equation, *operands)


@operator("Trilu", 14, static=(1,))
def trilu(attributes: Attributes) -> Body:
    part = torch.triu if attributes.get("upper", 1) else torch.tril

    def run(x: Tensor, diagonal: Tensor | list[int] | int | None = None) -> Tensor:
        offset = diagonal[0] if isinstance(diagonal, list) else diagonal
        return part(x, int(offset) if offset is not None else 0)

    return run


@operator("GatherElements", 11, 13)
def gather_elements(attributes: Attributes) -> Body:
    axis = attributes.get("axis", 0)
    return lambda x, indices: torch.gather(x, axis, indices.long() % x.shape[axis])


@operator("GatherND", 11, 12, 13)
def gather_nd(attributes: Attributes) -> Body:
    batch = attributes.get("batch_dims", 0)

    def run(x: Tensor, indices: Tensor) -> Tensor:
        leading = x.shape[:batch]
        flat = x.reshape(leading.numel(), *x.shape[batch:])
        rows = indices.long().reshape(leading.numel(), -1, indices.shape[-1])
        places = torch.arange(len(flat), device=x.device)[:, None]
        found = flat[(places, *rows.unbind(-1))]
        return found.reshape(*indices.shape[:-1], *x.shape[batch + indices.shape[-1] :])

    return run


@operator("ScatterND", 11, 13, 16, 18)
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
        named = {"mul": "prod", "max": "amax", "min": "amin"}[reduction]
        into = x.reshape(-1, inner.numel())
        index = rows.reshape(-1, 1).expand(-1, inner.numel())
        return into.scatter_reduce(0, index, updates.reshape(-1, inner.numel()), named).reshape(x.shape)

    return run


@operator("TopK", 10, 11, 24, static=(1,))
def top_k(attributes: Attributes) -> Body:
    """Sorted; of equal values the first ones come first."""
    axis, largest = attributes.get("axis", -1), bool(attributes.get("largest", 1))

    def run(x: Tensor, k: Tensor | list[int]) -> tuple[Tensor, Tensor]:
        values, indices = torch.sort(x, stable=True, dim=axis, descending=largest)
        return values.narrow(axis, 0, int(k[0])), indices.narrow(axis, 0, int(k[0]))

    return run
