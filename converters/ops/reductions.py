"""Operators that go along axes: sums and their kin, softmax, what is largest, running sums."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from converters.ops.registry import Attributes, Body, numbers, operator

Reduction = Callable[[Tensor, list[int], bool], Tensor]
"""Of a tensor, over axes, keeping them or not."""


def _sum(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return x.sum(axes, keep, dtype=x.dtype)


def _product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted((axis % x.dim() for axis in axes), reverse=True):
        x = x.prod(axis, keep, dtype=x.dtype)
    return x


def _itself(x: Tensor) -> Tensor:
    return x


REDUCTIONS: dict[str, tuple[Reduction, Callable[[Tensor], Tensor]]] = {
    "ReduceL1": (lambda x, axes, keep: _sum(x.abs(), axes, keep), torch.abs),
    "ReduceL2": (lambda x, axes, keep: torch.linalg.vector_norm(x, 2, axes, keep), torch.abs),
    "ReduceLogSum": (lambda x, axes, keep: _sum(x, axes, keep).log(), torch.log),
    "ReduceLogSumExp": (torch.logsumexp, _itself),
    "ReduceMax": (torch.amax, _itself),
    "ReduceMean": (torch.mean, _itself),
    "ReduceMin": (torch.amin, _itself),
    "ReduceProd": (_product, _itself),
    "ReduceSum": (_sum, _itself),
    "ReduceSumSquare": (lambda x, axes, keep: _sum(x.square(), axes, keep), torch.square),
}
"""The reduction, and what is left of it when it goes over no axis at all."""


def _reduction(name: str) -> Callable[[Attributes], Body]:
    reduce, elementwise = REDUCTIONS[name]

    def build(attributes: Attributes) -> Body:
        """Axes are an operand from opset 18 on (of ReduceSum, 13); none mean all, or none."""
        keep = bool(attributes.get("keepdims", 1))
        empty_is_all = not attributes.get("noop_with_empty_axes", 0)

        def run(x: Tensor, axes: Tensor | list[int] | None = None) -> Tensor:
            listed = numbers(axes) if axes is not None else list(attributes.get("axes", []))
            if not listed and not empty_is_all:
                return elementwise(x)
            return reduce(x, listed or list(range(x.dim())), keep)

        return run

    return build


for _name in REDUCTIONS:
    operator(_name, static=(1,))(_reduction(_name))


def _hardmax(x: Tensor, axis: int) -> Tensor:
    return torch.zeros_like(x).scatter(axis, x.argmax(axis, keepdim=True), 1)


SOFTMAXES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "Softmax": F.softmax,
    "LogSoftmax": F.log_softmax,
    "Hardmax": _hardmax,
}


def _along_one_axis(function: Callable[[Tensor, int], Tensor]) -> Callable[[Attributes], Body]:
    def build(attributes: Attributes) -> Body:
        axis = attributes.get("axis", -1)
        return lambda x: function(x, axis)

    return build


def _along_all_from_axis(function: Callable[[Tensor, int], Tensor]) -> Callable[[Attributes], Body]:
    def build(attributes: Attributes) -> Body:
        """Before opset 13, over all axes from `axis` on taken together."""
        axis = attributes.get("axis", 1)
        return lambda x: function(x.reshape(x.shape[:axis].numel(), -1), 1).reshape(x.shape)

    return build


for _name, _softmax in SOFTMAXES.items():
    operator(_name, 1, 11)(_along_all_from_axis(_softmax))
    operator(_name, 13)(_along_one_axis(_softmax))


def _extreme(largest: Callable[..., Tensor]) -> Callable[[Attributes], Body]:
    def build(attributes: Attributes) -> Body:
        """Of equal values the first one, or with `select_last_index` the last."""
        axis, keep = attributes.get("axis", 0), bool(attributes.get("keepdims", 1))
        if attributes.get("select_last_index", 0):
            return lambda x: x.shape[axis] - 1 - largest(x.flip(axis), axis, keep)
        return lambda x: largest(x, axis, keep)

    return build


operator("ArgMax")(_extreme(torch.argmax))
operator("ArgMin")(_extreme(torch.argmin))


@operator("TopK", static=(1,))
def top_k(attributes: Attributes) -> Body:
    """Sorted; of equal values the first ones come first. Before opset 10, k is an attribute."""
    axis, largest = attributes.get("axis", -1), bool(attributes.get("largest", 1))

    def run(x: Tensor, k: Tensor | list[int] | None = None) -> tuple[Tensor, Tensor]:
        count = attributes["k"] if k is None else int(k[0])
        values, indices = torch.sort(x, stable=True, dim=axis, descending=largest)
        return values.narrow(axis, 0, count), indices.narrow(axis, 0, count)

    return run


@operator("CumSum", static=(1,))
def cumsum(attributes: Attributes) -> Body:
    exclusive, reverse = attributes.get("exclusive", 0), attributes.get("reverse", 0)

    def run(x: Tensor, along: Tensor | list[int] | int) -> Tensor:
        (axis,) = numbers(along)
        x = x.flip(axis) if reverse else x
        if exclusive:
            nothing = torch.zeros_like(x.narrow(axis, 0, 1))
            x = torch.cat([nothing, x.narrow(axis, 0, x.shape[axis] - 1)], axis)
        total = x.cumsum(axis, dtype=x.dtype)
        return total.flip(axis) if reverse else total

    return run
