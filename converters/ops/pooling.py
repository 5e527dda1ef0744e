"""Pooling with everything its attributes can say; onnxruntime's result is the reference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from converters.ops.layers import CONVOLUTIONS, same_pads, torch_pads
from converters.ops.registry import Attributes, Body, operator

POOLS: dict[int, Any] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
MAX_POOLS: dict[int, Any] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


@dataclass(frozen=True)
class Window:
    """The geometry of a pooling operator, from its attributes."""

    kernel: list[int]
    strides: list[int]
    dilations: list[int]
    auto_pad: str
    explicit: list[int]
    ceil: bool

    @classmethod
    def of(cls, attributes: Attributes) -> Window:
        kernel: list[int] = list(attributes["kernel_shape"])
        ones = [1] * len(kernel)
        return cls(
            kernel,
            list(attributes.get("strides", ones)),
            list(attributes.get("dilations", ones)),
            attributes.get("auto_pad", "NOTSET"),
            list(attributes.get("pads", [0] * 2 * len(kernel))),
            bool(attributes.get("ceil_mode", 0)),
        )

    @property
    def reach(self) -> list[int]:
        """Length of a window on each axis, gaps included."""
        return [(k - 1) * dilation + 1 for k, dilation in zip(self.kernel, self.dilations, strict=True)]

    def pads(self, sizes: Sequence[int]) -> list[int]:
        """ONNX pads for one input size, without what ceil_mode adds."""
        if self.auto_pad in ("SAME_UPPER", "SAME_LOWER"):
            upper = self.auto_pad == "SAME_UPPER"
            return same_pads(sizes, self.kernel, self.strides, self.dilations, upper=upper)
        return [0] * 2 * len(self.kernel) if self.auto_pad == "VALID" else self.explicit

    def beyond(self, sizes: Sequence[int]) -> list[int]:
        """How far the last window of ceil_mode reaches past the padded end of each axis."""
        pads, rank = self.pads(sizes), len(self.kernel)
        found = []
        for size, before, after, reach, stride in zip(
            sizes, pads[:rank], pads[rank:], self.reach, self.strides, strict=True
        ):
            room = size + before + after - reach
            last = -(-room // stride) if self.ceil else room // stride
            if self.ceil and last * stride >= size + before:  # it must begin inside the input or its begin padding
                last -= 1
            found.append(max(0, last * stride + reach - (size + before + after)))
        return found

    def all_pads(self, sizes: Sequence[int]) -> list[int]:
        """ONNX pads and what ceil_mode adds at the ends."""
        pads, rank = self.pads(sizes), len(self.kernel)
        return pads[:rank] + [end + more for end, more in zip(pads[rank:], self.beyond(sizes), strict=True)]

    def mean(self, whole: Tensor) -> Tensor:
        """Mean over each window of a tensor [N, C, ...] that is padded already."""
        if self.reach == self.kernel:
            return POOLS[len(self.kernel)](whole, self.kernel, self.strides)
        count, channels, *sizes = whole.shape
        each = torch.full((1, 1, *self.kernel), 1 / math.prod(self.kernel), dtype=whole.dtype, device=whole.device)
        flat = whole.reshape(count * channels, 1, *sizes)
        means = CONVOLUTIONS[len(self.kernel)](flat, each, None, self.strides, 0, self.dilations)
        return means.reshape(count, channels, *means.shape[2:])


@operator("AveragePool")
def average_pool(attributes: Attributes) -> Body:
    """Sum over the window, divided by the number of elements that count.

    Those are the elements of the input and, with `count_include_pad`, the explicit padding; never what `ceil_mode` adds
    at the end.
    """
    window = Window.of(attributes)
    padding_counts = float(bool(attributes.get("count_include_pad", 0)))

    def run(x: Tensor) -> Tensor:
        sizes = tuple(x.shape[2:])
        beyond = [0] * len(sizes) + window.beyond(sizes)
        counted = torch.ones((1, 1, *sizes), dtype=x.dtype, device=x.device)
        counted = F.pad(counted, torch_pads(window.pads(sizes)), value=padding_counts)
        counted = F.pad(counted, torch_pads(beyond))
        return window.mean(F.pad(x, torch_pads(window.all_pads(sizes)))) / window.mean(counted)

    return run


@operator("MaxPool")
def max_pool(attributes: Attributes) -> Body:
    """The first output; padding never wins."""
    window = Window.of(attributes)
    rank = len(window.kernel)
    pool = MAX_POOLS[rank]

    def run(x: Tensor) -> Tensor:
        sizes = tuple(x.shape[2:])
        pads = window.all_pads(sizes)
        even = pads[:rank] == pads[rank:] and all(2 * p <= k for p, k in zip(pads, window.kernel, strict=False))
        if not even:
            lowest = -math.inf if x.is_floating_point() else torch.iinfo(x.dtype).min
            x, pads = F.pad(x, torch_pads(pads), value=lowest), [0] * 2 * rank
        return pool(x, window.kernel, window.strides, pads[:rank], window.dilations)

    return run


@operator("LpPool")
def lp_pool(attributes: Attributes) -> Body:
    window, p = Window.of(attributes), attributes.get("p", 2)

    def run(x: Tensor) -> Tensor:
        whole = F.pad(x.abs() ** p, torch_pads(window.all_pads(tuple(x.shape[2:]))))
        return (window.mean(whole) * math.prod(window.kernel)) ** (1 / p)

    return run


@operator("GlobalLpPool")
def global_lp_pool(attributes: Attributes) -> Body:
    p = attributes.get("p", 2)
    return lambda x: torch.linalg.vector_norm(x, p, tuple(range(2, x.dim())), True)


@operator("GlobalAveragePool")
def global_average_pool(_attributes: Attributes) -> Body:
    return lambda x: x.mean(tuple(range(2, x.dim())), keepdim=True)


@operator("GlobalMaxPool")
def global_max_pool(_attributes: Attributes) -> Body:
    return lambda x: torch.amax(x, tuple(range(2, x.dim())), True)
