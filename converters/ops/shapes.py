"""Operators whose newer versions take attributes as operands: reductions, Pad, Split, Reshape, Clip, casts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx
import torch
import torch.nn.functional as F
from torch import Tensor

from converters.ops.layers import torch_pads
from converters.ops.registry import Attributes, Body, operator

TORCH_TYPES = {
    onnx.TensorProto.FLOAT: torch.float32,
    onnx.TensorProto.FLOAT16: torch.float16,
    onnx.TensorProto.BFLOAT16: torch.bfloat16,
    onnx.TensorProto.DOUBLE: torch.float64,
    onnx.TensorProto.BOOL: torch.bool,
    onnx.TensorProto.INT8: torch.int8,
    onnx.TensorProto.INT16: torch.int16,
    onnx.TensorProto.INT32: torch.int32,
    onnx.TensorProto.INT64: torch.int64,
    onnx.TensorProto.UINT8: torch.uint8,
}


def numbers(operand: Tensor | list[int]) -> list[int]:
    """A static operand as integers, whether it was constant or had to be computed."""
    return operand if isinstance(operand, list) else [int(number) for number in operand]


def _reduction(
    reduce: Callable[[Tensor, list[int], bool], Tensor], elementwise: Callable[[Tensor], Tensor]
) -> Callable[[Attributes], Body]:
    """`elementwise` is what is left of the reduction when it goes over no axis at all."""

    def build(attributes: Attributes) -> Body:
        keep = bool(attributes.get("keepdims", 1))
        empty_is_all = not attributes.get("noop_with_empty_axes", 0)

        def run(x: Tensor, axes: Tensor | list[int] | None = None) -> Tensor:
            listed = numbers(axes) if axes is not None else list(attributes.get("axes", []))
            if not listed and not empty_is_all:
                return elementwise(x)
            return reduce(x, listed or list(range(x.dim())), keep)

        return run

    return build


def _sum_square(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return x.square().sum(axes, keep)


def _itself(x: Tensor) -> Tensor:
    return x


def _product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted((axis % x.dim() for axis in axes), reverse=True):
        x = x.prod(axis, keep)
    return x


for _name, _reduce, _elementwise, _versions in (
    ("ReduceMean", torch.mean, _itself, (18,)),
    ("ReduceMax", torch.amax, _itself, (18, 20)),
    ("ReduceMin", torch.amin, _itself, (18, 20)),
    ("ReduceSumSquare", _sum_square, torch.square, (18,)),
    ("ReduceProd", _product, _itself, (1, 11, 13, 18)),
    ("ReduceLogSumExp", torch.logsumexp, _itself, (1, 11, 13, 18)),
    ("ReduceL2", lambda x, axes, keep: torch.linalg.vector_norm(x, 2, axes, keep), torch.abs, (1, 11, 13, 18)),
    ("ReduceL1", lambda x, axes, keep: torch.linalg.vector_norm(x, 1, axes, keep), torch.abs, (1, 11, 13, 18)),
):
    operator(_name, *_versions, static=(1,))(_reduction(_reduce, _elementwise))


def _source_index(size: int, before: int, after: int, mode: str) -> Tensor:
    """Which elements of an axis of `size` stand where after padding in a mode that repeats what is there."""
    places = torch.arange(-before, size + after)
    if mode == "edge" or size == 1:
        return places.clamp(0, size - 1)
    if mode == "wrap":
        return places % size
    period = 2 * (size - 1)
    return (size - 1) - ((places % period) - (size - 1)).abs()


@operator("Pad", 18, 19, 21, 23, 24, 25, static=(1, 2, 3))
def pad(attributes: Attributes) -> Body:
    mode = attributes.get("mode", "constant")

    def run(
        x: Tensor,
        pads: Tensor | list[int],
        value: Tensor | list[float] | float | None = None,
        axes: Tensor | list[int] | None = None,
    ) -> Tensor:
        listed = [axis % x.dim() for axis in numbers(axes)] if axes is not None else list(range(x.dim()))
        amounts = numbers(pads)
        full = [0] * (2 * x.dim())
        for index, axis in enumerate(listed):
            full[axis], full[axis + x.dim()] = amounts[index], amounts[index + len(listed)]
        if mode == "constant":
            filler = value[0] if isinstance(value, list) else value
            return F.pad(x, torch_pads(full), value=float(filler) if filler is not None else 0.0)
        for axis in range(x.dim()):
            before, after = full[axis], full[axis + x.dim()]
            if before or after:
                x = x.index_select(axis, _source_index(x.shape[axis], before, after, mode).to(x.device))
        return x

    return run


@operator("Split", 18, static=(1,))
def split(attributes: Attributes) -> Body:
    axis = attributes.get("axis", 0)

    def run(x: Tensor, sizes: Tensor | list[int] | None = None) -> tuple[Tensor, ...]:
        if sizes is not None:
            return torch.split(x, numbers(sizes), axis)
        parts = attributes["num_outputs"]
        return torch.split(x, -(-x.shape[axis] // parts), axis)

    return run


@operator("Reshape", 5, 13, 14, 19, 21, 23, 24, 25, static=(1,))
def reshape(attributes: Attributes) -> Body:
    allow_zero = bool(attributes.get("allowzero", 0))

    def run(x: Tensor, shape: Tensor | list[int]) -> Tensor:
        sizes = numbers(shape)
        if not allow_zero:
            sizes = [x.shape[axis] if size == 0 else size for axis, size in enumerate(sizes)]
        return x.reshape(sizes)

    return run


@operator("Clip", 11, 12, 13, static=(1, 2))
def clip(_attributes: Attributes) -> Body:
    """Bounds may be left out, and may be computed."""

    def run(x: Tensor, low: Tensor | float | None = None, high: Tensor | float | None = None) -> Tensor:
        if isinstance(low, float) and isinstance(high, float):
            return torch.clamp(x, low, high)
        x = x if low is None else torch.clamp(x, min=low)
        return x if high is None else torch.clamp(x, max=high)

    return run


@operator("CastLike", 15, 19, 21, 23, 24, 25)
def cast_like(_attributes: Attributes) -> Body:
    return lambda x, like: x.to(like.dtype)


@operator("Gelu", 20)
def gelu(attributes: Attributes) -> Body:
    return lambda x: F.gelu(x, approximate=attributes.get("approximate", "none"))


@operator("Cast", 6, 9, 13, 19, 21, 23, 24, 25)
def cast(attributes: Attributes) -> Body:
    wanted = TORCH_TYPES[attributes["to"]]
    return lambda x: x.to(wanted)


@operator("Constant", 1, 9, 11, 12, 13, 19, 21, 23, 24, 25)
def constant(attributes: Attributes) -> Body:
    (value,) = attributes.values()
    tensor: Any = value.to_torch() if hasattr(value, "to_torch") else torch.tensor(value)
    return lambda: tensor
