"""QuantizeLinear, DequantizeLinear, and the Truncate of resized bytes as straight-through functions.

Quantize: q = clamp(round(x / s) + z, low, high), a float tensor that holds whole numbers. Dequantize: (q - z) s. The
gradient passes through the rounding as if it were not there and is cut by the clamp, so a model that is quantized
already can be inverted and trained on. A scale s and zero point z serve the whole tensor, one index of an axis, or a
block of indices on it.
"""

from __future__ import annotations

import onnx
import torch
from torch import Tensor

from converters.ops.elementwise import TORCH_TYPES
from converters.ops.registry import Attributes, Body, operator
from converters.precision import OWN_DOMAIN

KINDS = dict(onnx.TensorProto.DataType.items())
RANGES = {
    KINDS[sign + f"INT{bits}"]: (low, low + 2**bits - 1)
    for bits in (2, 4, 8, 16)
    for sign, low in (("", -(2 ** (bits - 1))), ("U", 0))
    if f"INT{bits}" in KINDS
}
"""What each type of `output_dtype` can hold."""


def _spread(parameter: Tensor, x: Tensor, axis: int, block: int) -> Tensor:
    """A scale or zero point in a shape that broadcasts with x.

    x [A, B]: a parameter [1] or [] -> []; [B] on axis 1 -> [1, B]; [A, ceil(B / block)] on axis 1 -> [A, B].
    """
    if block:
        return parameter.repeat_interleave(block, axis).narrow(axis, 0, x.shape[axis])
    if parameter.numel() == 1:
        return parameter.reshape(())
    return parameter.view([-1 if other == axis % x.dim() else 1 for other in range(x.dim())])


@operator("QuantizeLinear")
def quantize_linear(attributes: Attributes) -> Body:
    axis, block, kind = attributes.get("axis", 1), attributes.get("block_size", 0), attributes.get("output_dtype", 0)
    if kind and kind not in RANGES:
        raise NotImplementedError(f"quantization to {onnx.TensorProto.DataType.Name(kind)} is not of whole numbers")

    def run(x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        limits = torch.iinfo(torch.uint8 if zero is None else zero.dtype)
        low, high = RANGES[kind] if kind else (limits.min, limits.max)
        exact = x.to(scale.dtype) / _spread(scale, x, axis, block)
        # what rounding adds is a constant to the gradient; of infinity it is nothing, not NaN
        q = exact + (exact.round() - exact).detach().nan_to_num()
        if zero is not None:
            q = q + _spread(zero.to(scale.dtype), x, axis, block)
        q = torch.where(q < low, low, q)  # a clamp, but the gradient passes at the limits, with any torch
        return torch.where(q > high, high, q)

    return run


@operator("Truncate", 1, domain=OWN_DOMAIN)
def truncate(_attributes: Attributes) -> Body:
    """Whole numbers towards 0; the gradient passes as if it did nothing."""
    return lambda x: x + (x.trunc() - x).detach()


@operator("DequantizeLinear")
def dequantize_linear(attributes: Attributes) -> Body:
    """Of a QuantizeLinear's floats, or of integers."""
    axis, block, kind = attributes.get("axis", 1), attributes.get("block_size", 0), attributes.get("output_dtype", 0)

    def run(q: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        real = q.to(scale.dtype)
        if zero is not None:
            real = real - _spread(zero.to(scale.dtype), q, axis, block)
        real = real * _spread(scale, q, axis, block)
        return real.to(TORCH_TYPES[kind]) if kind else real

    return run
