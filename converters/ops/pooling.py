"""Pooling with everything its attributes can say; onnxruntime's result is the reference."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from converters.ops.layers import same_pads, torch_pads
from converters.ops.registry import Attributes, Body, operator

POOLS: dict[int, Any] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


@operator("AveragePool", 1, 7, 10, 11, 19, 22)
def average_pool(attributes: Attributes) -> Body:
    """Sum over the window, divided by the number of elements that count.

    Those are the elements of the input and, with `count_include_pad`, the explicit padding; never what `ceil_mode` adds
    at the end. Dilated windows are not supported.
    """
    kernel: list[int] = attributes["kernel_shape"]
    rank = len(kernel)
    strides: list[int] = attributes.get("strides", [1] * rank)
    if any(dilation != 1 for dilation in attributes.get("dilations", [])):
        raise NotImplementedError("dilated average pooling")
    auto_pad, ceil = attributes.get("auto_pad", "NOTSET"), bool(attributes.get("ceil_mode", 0))

    def pads_for(sizes: tuple[int, ...]) -> list[int]:
        if auto_pad in ("SAME_UPPER", "SAME_LOWER"):
            return same_pads(sizes, kernel, strides, [1] * rank, upper=auto_pad == "SAME_UPPER")
        return [0] * 2 * rank if auto_pad == "VALID" else list(attributes.get("pads", [0] * 2 * rank))

    def extra(size: int, before: int, after: int, k: int, stride: int) -> int:
        """How far the last window of ceil_mode reaches past the padded end."""
        room = size + before + after - k
        last = -(-room // stride) if ceil else room // stride
        if ceil and last * stride >= size + before:  # a window must begin inside the input or its begin padding
            last -= 1
        return max(0, last * stride + k - (size + before + after))

    def run(x: Tensor) -> Tensor:
        sizes = tuple(x.shape[2:])
        pads = pads_for(sizes)
        begins, ends = pads[:rank], pads[rank:]
        beyond = [extra(*entry) for entry in zip(sizes, begins, ends, kernel, strides, strict=True)]
        counted = torch.ones((1, 1, *sizes), dtype=x.dtype, device=x.device)
        counted = F.pad(counted, torch_pads(pads), value=float(bool(attributes.get("count_include_pad", 0))))
        counted = F.pad(counted, torch_pads([0] * rank + beyond))
        whole = F.pad(x, torch_pads(begins + [end + more for end, more in zip(ends, beyond, strict=True)]))
        pool = POOLS[rank]
        return pool(whole, kernel, strides) / pool(counted, kernel, strides)

    return run


@operator("GlobalAveragePool", 1, 22)
def global_average_pool(_attributes: Attributes) -> Body:
    return lambda x: x.mean(tuple(range(2, x.dim())), keepdim=True)


@operator("GlobalMaxPool", 1, 22)
def global_max_pool(_attributes: Attributes) -> Body:
    return lambda x: torch.amax(x, tuple(range(2, x.dim())), True)
