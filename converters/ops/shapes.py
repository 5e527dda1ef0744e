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


def _reduction(reduce: Callable[[Tensor, list[int], bool], Tensor]) -> Callable[[Attributes], Body]:
    def build(attributes: Attributes) -> Body:
        keep = bool(attributes.get("keepdims", 1))
        empty_is_all = not attributes.get("noop_with_empty_axes", 0)

        def run(x: Tensor, axes: Tensor | None = None) -> Tensor:
            listed = [int(axis) for axis in axes] if axes is not None else list(attributes.get("axes", []))
            if not listed and not empty_is_all:
                return x
            return reduce(x, listed or list(range(x.dim())), keep)

        return run

    return build


def _sum_square(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return x.square().sum(axes, keep)


for _name, _reduce, _versions in (
    ("ReduceMean", torch.mean, (18,)),
    ("ReduceMax", torch.amax, (18, 20)),
    ("ReduceMin", torch.amin, (18, 20)),
    ("ReduceSumSquare", _sum_square, (18,)),
    ("ReduceL2", lambda x, axes, keep: torch.linalg.vector_norm(x, 2, axes, keep), (1, 11, 13, 18)),
    ("ReduceL1", lambda x, axes, keep: torch.linalg.vector_norm(x, 1, axes, keep), (1, 11, 13, 18)),
):
    operator(_name, *_versions)(_reduction(_reduce))


@operator("Pad", 18, 19, 21, 23, 24, 25)
def pad(attributes: Attributes) -> Body:
    mode = attributes.get("mode", "constant")
    modes = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}

    def run(x: Tensor, pads: Tensor, value: Tensor | None = None, axes: Tensor | None = None) -> Tensor:
        listed = [int(axis) % x.dim() for axis in axes] if axes is not None else list(range(x.dim()))
        amounts = [int(amount) for amount in pads]
        full = [0] * (2 * x.dim())
        for index, axis in enumerate(listed):
            full[axis], full[axis + x.dim()] = amounts[index], amounts[index + len(listed)]
        if mode == "constant":
            return F.pad(x, torch_pads(full), value=float(value) if value is not None else 0.0)
        return F.pad(x, torch_pads(full)[: 2 * (x.dim() - 2)], mode=modes[mode])

    return run


@operator("Split", 13, 18)
def split(attributes: Attributes) -> Body:
    axis = attributes.get("axis", 0)

    def run(x: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, ...]:
        if sizes is not None:
            return torch.split(x, [int(size) for size in sizes], axis)
        parts = attributes["num_outputs"]
        return torch.split(x, -(-x.shape[axis] // parts), axis)

    return run


@operator("Reshape", 5, 13, 14, 19, 21, 23, 24, 25)
def reshape(attributes: Attributes) -> Body:
    allow_zero = bool(attributes.get("allowzero", 0))

    def run(x: Tensor, shape: Tensor) -> Tensor:
        sizes = [int(size) for size in shape]
        if not allow_zero:
            sizes = [x.shape[axis] if size == 0 else size for axis, size in enumerate(sizes)]
        return x.reshape(sizes)

    return run


@operator("Clip", 11, 12, 13)
def clip(_attributes: Attributes) -> Body:
    """Bounds may be left out, and may be computed."""

    def run(x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
        return torch.clamp(x, low, high) if low is not None or high is not None else x

    return run


@operator("CastLike", 15, 19, 21, 23, 24, 25)
def cast_like(_attributes: Attributes) -> Body:
    return lambda x, like: x.to(like.dtype)


@operator("Gelu", 20)
def gelu(attributes: Attributes) -> Body:
    return lambda x: F.gelu(x, approximate=attributes.get("approximate", "none"))


@operator("Cast", 6, 9, 13, 19, 21, 23, 24, 25)
def cast(attributes: Attributes) -> Body:
    wanted = torch.from_numpy(onnx.helper.tensor_dtype_to_np_dtype(attributes["to"]).type(0).reshape(1)).dtype
    return lambda x: x.to(wanted)


@operator("GlobalMaxPool", 1, 22)
def global_max_pool(_attributes: Attributes) -> Body:
    return lambda x: torch.amax(x, tuple(range(2, x.dim())), True)


@operator("Constant", 1, 9, 11, 12, 13, 19, 21, 23, 24, 25)
def constant(attributes: Attributes) -> Body:
    (value,) = attributes.values()
    tensor: Any = value.to_torch() if hasattr(value, "to_torch") else torch.tensor(value)
    return lambda: tensor
