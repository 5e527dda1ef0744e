"""Operators that give, take or change sizes: shapes, slices, joins, padding, and tensors made from sizes."""

from __future__ import annotations

import math

import onnx
import torch
import torch.nn.functional as F
from torch import Tensor

from converters.ops.elementwise import TORCH_TYPES
from converters.ops.layers import torch_pads
from converters.ops.registry import OUTPUTS, Attributes, Body, numbers, operator

Static = Tensor | list[int]
"""An operand of sizes, axes or bounds: computed, or constant."""


@operator("Shape")
def shape(attributes: Attributes) -> Body:
    chosen = slice(attributes.get("start", 0), attributes.get("end"))
    return lambda x: torch.tensor(x.shape[chosen], dtype=torch.int64, device=x.device)


@operator("Size")
def size(_attributes: Attributes) -> Body:
    return lambda x: torch.tensor(x.numel(), device=x.device)


@operator("Reshape", static=(1,))
def reshape(attributes: Attributes) -> Body:
    allow_zero = bool(attributes.get("allowzero", 0))

    def run(x: Tensor, shape: Static) -> Tensor:
        sizes = numbers(shape)
        if not allow_zero:
            sizes = [x.shape[axis] if size == 0 else size for axis, size in enumerate(sizes)]
        return x.reshape(sizes)

    return run


@operator("Flatten")
def flatten(attributes: Attributes) -> Body:
    """To two dimensions: those before `axis`, and the others."""
    axis = attributes.get("axis", 1)

    def run(x: Tensor) -> Tensor:
        before = x.shape[:axis]  # a negative axis counts from the end, as a slice does
        rows = before.numel()
        return x.reshape(rows, -1 if rows else x.shape[axis:].numel())

    return run


@operator("Squeeze", static=(1,))
def squeeze(attributes: Attributes) -> Body:
    """Without axes, every axis of size 1. Axes are an attribute before opset 13."""

    def run(x: Tensor, axes: Static | None = None) -> Tensor:
        listed = attributes.get("axes") if axes is None else numbers(axes)
        return x.squeeze() if listed is None else x.squeeze(tuple(listed))

    return run


@operator("Unsqueeze", static=(1,))
def unsqueeze(attributes: Attributes) -> Body:
    """Axes are those of the result, and an attribute before opset 13."""

    def run(x: Tensor, axes: Static | None = None) -> Tensor:
        listed = attributes["axes"] if axes is None else numbers(axes)
        for axis in sorted(axis % (x.dim() + len(listed)) for axis in listed):
            x = x.unsqueeze(axis)
        return x

    return run


@operator("Transpose")
def transpose(attributes: Attributes) -> Body:
    order = attributes.get("perm")
    return lambda x: x.permute(order if order is not None else tuple(reversed(range(x.dim()))))


@operator("Expand", static=(1,))
def expand(_attributes: Attributes) -> Body:
    """A size of 1, on either side, gives way to the other."""
    return lambda x, shape: x.expand(torch.broadcast_shapes(x.shape, tuple(numbers(shape))))


@operator("Tile", 6, 13, static=(1,))
def tile(_attributes: Attributes) -> Body:
    return lambda x, repeats: x.repeat(numbers(repeats))


@operator("Concat")
def concat(attributes: Attributes) -> Body:
    """More than the standard's: on the other axes, an operand of size 1 is expanded to the size of the others.

    A file exported with a batch of 1 holds its class token as a constant [1, 1, D], and any batch is run here.
    """
    axis = attributes["axis"]

    def run(*operands: Tensor) -> Tensor:
        at = axis % operands[0].dim()
        rests = {(*x.shape[:at], *x.shape[at + 1 :]) for x in operands}
        if len(rests) > 1:
            common = torch.broadcast_shapes(*rests)
            operands = tuple(x.expand(*common[:at], x.shape[at], *common[at:]) for x in operands)
        return torch.cat(operands, at)

    return run


@operator("Split", static=(1,))
def split(attributes: Attributes) -> Body:
    """In given sizes (an attribute before opset 13), or in equal parts, of which the last may be the smaller."""
    axis = attributes.get("axis", 0)

    def run(x: Tensor, sizes: Static | None = None) -> tuple[Tensor, ...]:
        listed = attributes.get("split") if sizes is None else numbers(sizes)
        if listed is not None:
            return torch.split(x, listed, axis)
        parts = attributes["num_outputs"] if "num_outputs" in attributes else attributes[OUTPUTS]
        return torch.split(x, -(-x.shape[axis] // parts), axis)

    return run


ALL = (2**31 - 1, 2**63 - 1)
"""Ends of a slice that mean the last element, or with a negative step the first."""


def _cut(x: Tensor, axis: int, start: int, end: int, step: int) -> Tensor:
    """A slice of one axis; unlike Python's, one that runs backwards from before the beginning takes the first."""
    size, backwards = x.shape[axis], step < 0
    low, high = (-1, size - 1) if backwards else (0, size)
    first = min(max(start + size * (start < 0), 0), high)
    last = min(max(end + size * (end < 0), low), high) if end not in ALL else low if backwards else high
    places = range(first, last, step)[:: -1 if backwards else 1]
    chosen = slice(places[0], places[-1] + 1, places.step) if places else slice(0)
    cut = x[(slice(None),) * axis + (chosen,)]
    return cut.flip(axis) if backwards else cut


@operator("Slice", static=(1, 2, 3, 4))
def slice_(attributes: Attributes) -> Body:
    """Starts, ends and axes are attributes before opset 10, where there are no steps."""

    def run(
        x: Tensor,
        starts: Static | None = None,
        ends: Static | None = None,
        axes: Static | None = None,
        steps: Static | None = None,
    ) -> Tensor:
        first = attributes["starts"] if starts is None else numbers(starts)
        last = attributes["ends"] if ends is None else numbers(ends)
        along = attributes.get("axes", range(len(first))) if axes is None else numbers(axes)
        step = [1] * len(first) if steps is None else numbers(steps)
        for axis, *bounds in zip(along, first, last, step, strict=True):
            x = _cut(x, axis % x.dim(), *bounds)
        return x

    return run


def _source_index(size: int, before: int, after: int, mode: str) -> Tensor:
    """Which elements of an axis of `size` stand where after padding in a mode that repeats what is there."""
    places = torch.arange(-before, size + after)
    if mode == "edge" or size == 1:
        return places.clamp(0, size - 1)
    if mode == "wrap":
        return places % size
    period = 2 * (size - 1)
    return (size - 1) - ((places % period) - (size - 1)).abs()


@operator("Pad", static=(1, 2, 3))
def pad(attributes: Attributes) -> Body:
    """Pads and value are attributes before opset 11; axes come with opset 18."""
    mode = attributes.get("mode", "constant")

    def run(
        x: Tensor,
        pads: Static | None = None,
        value: Tensor | list[float] | float | None = None,
        axes: Static | None = None,
    ) -> Tensor:
        amounts = attributes["pads"] if pads is None else numbers(pads)
        value = attributes.get("value", 0.0) if value is None else value
        listed = [axis % x.dim() for axis in numbers(axes)] if axes is not None else list(range(x.dim()))
        full = [0] * (2 * x.dim())
        for index, axis in enumerate(listed):
            full[axis], full[axis + x.dim()] = amounts[index], amounts[index + len(listed)]
        if mode == "constant":
            return F.pad(x, torch_pads(full), value=float(value[0] if isinstance(value, list) else value))
        for axis in range(x.dim()):
            before, after = full[axis], full[axis + x.dim()]
            if before or after:
                x = x.index_select(axis, _source_index(x.shape[axis], before, after, mode).to(x.device))
        return x

    return run


@operator("Constant")
def constant(attributes: Attributes) -> Body:
    (value,) = (value for name, value in attributes.items() if name != OUTPUTS)
    tensor = torch.as_tensor(value)
    return lambda: tensor


@operator("ConstantOfShape", static=(0,))
def constant_of_shape(attributes: Attributes) -> Body:
    value = attributes.get("value", torch.zeros(1))

    def run(shape: Static) -> Tensor:
        device = shape.device if isinstance(shape, Tensor) else None
        return torch.full(numbers(shape), value.item(), dtype=value.dtype, device=device)

    return run


@operator("Range")
def range_(_attributes: Attributes) -> Body:
    """Computed in the operands' own type, which a Python number would not tell."""

    def run(start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
        count = max(0, math.ceil((limit.item() - start.item()) / delta.item()))
        return start + delta * torch.arange(count, dtype=start.dtype, device=start.device)

    return run


@operator("EyeLike")
def eye_like(attributes: Attributes) -> Body:
    """Ones on one diagonal."""
    diagonal, wanted = attributes.get("k", 0), TORCH_TYPES.get(attributes.get("dtype", onnx.TensorProto.UNDEFINED))

    def run(x: Tensor) -> Tensor:
        rows, columns = (torch.arange(side, device=x.device) for side in x.shape)
        return (columns - rows[:, None] == diagonal).to(wanted or x.dtype)

    return run
