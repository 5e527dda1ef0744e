"""Operators with weights: the weight stays an operand.

onnx2torch moves weights into modules, sometimes transposed or scaled. Here Conv, Gemm and BatchNormalization take them
as operands under the name and in the layout of the file, so a changed weight is passed in by name and goes back to
the file as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from converters.errors import UnsupportedOperatorError
from converters.ops.registry import Attributes, Body, numbers, operator

CONVOLUTIONS: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}

TRANSPOSED: dict[int, Any] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def same_pads(
    sizes: Sequence[int], kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int], *, upper: bool
) -> list[int]:
    """ONNX `pads` (all begins, then all ends) of auto_pad SAME_UPPER or SAME_LOWER for one input size."""
    begins, ends = [], []
    for size, k, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        total = max((-(-size // stride) - 1) * stride + (k - 1) * dilation + 1 - size, 0)
        small = total // 2
        begins.append(small if upper else total - small)
        ends.append(total - small if upper else small)
    return begins + ends


def torch_pads(pads: Sequence[int]) -> list[int]:
    """ONNX order (begins, then ends, first axis first) to torch.nn.functional.pad's (pairs, last axis first)."""
    rank = len(pads) // 2
    return [pads[axis + side * rank] for axis in reversed(range(rank)) for side in (0, 1)]


def convolution_geometry(
    attributes: Attributes, sizes: Sequence[int], kernel: Sequence[int]
) -> tuple[list[int], list[int], list[int]]:
    """Strides, dilations and ONNX pads of a convolution for one input size."""
    rank = len(kernel)
    strides, dilations = attributes.get("strides", [1] * rank), attributes.get("dilations", [1] * rank)
    auto_pad = attributes.get("auto_pad", "NOTSET")
    if auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        return strides, dilations, same_pads(sizes, kernel, strides, dilations, upper=auto_pad == "SAME_UPPER")
    return strides, dilations, [0] * 2 * rank if auto_pad == "VALID" else attributes.get("pads", [0] * 2 * rank)


@operator("Conv")
def conv(attributes: Attributes) -> Body:
    groups = attributes.get("group", 1)

    def run(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        rank = weight.dim() - 2
        strides, dilations, pads = convolution_geometry(attributes, x.shape[2:], weight.shape[2:])
        if pads[:rank] != pads[rank:]:
            x, pads = F.pad(x, torch_pads(pads)), [0] * 2 * rank
        geometry = (tuple(strides), tuple(pads[:rank]), tuple(dilations), groups)
        if groups > 1 and x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            # depthwise ones of 5x5, or with stride 2, take 3 to 7 times as long in bfloat16 there (torch 2.14)
            with torch.autocast("cpu", enabled=False):
                operands = [operand if operand is None else operand.float() for operand in (x, weight, bias)]
                return CONVOLUTIONS[rank](*operands, *geometry)
        return CONVOLUTIONS[rank](x, weight, bias, *geometry)

    return run


@operator("ConvTranspose")
def conv_transpose(attributes: Attributes) -> Body:
    """The full transpose, cropped by the pads; with `output_shape`, by the pads that give it."""
    groups = attributes.get("group", 1)

    def run(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        rank = weight.dim() - 2
        ones = [1] * rank
        strides, dilations = attributes.get("strides", ones), attributes.get("dilations", ones)
        more = attributes.get("output_padding", [0] * rank)
        y = TRANSPOSED[rank](x, weight, bias, tuple(strides), 0, tuple(more), groups, tuple(dilations))
        auto_pad, wanted = attributes.get("auto_pad", "NOTSET"), attributes.get("output_shape")
        begins = list(attributes.get("pads", [0] * 2 * rank))[:rank]
        ends = list(attributes.get("pads", [0] * 2 * rank))[rank:]
        if wanted is None and auto_pad in ("SAME_UPPER", "SAME_LOWER"):
            wanted = [size * stride for size, stride in zip(x.shape[2:], strides, strict=True)]
        if wanted is not None:
            total = [have - want for have, want in zip(y.shape[2:], wanted[-rank:], strict=True)]
            small, large = [amount // 2 for amount in total], [amount - amount // 2 for amount in total]
            begins, ends = (small, large) if auto_pad == "SAME_UPPER" else (large, small)
        return F.pad(y, [-amount for amount in torch_pads(begins + ends)])

    return run


@operator("Col2Im", static=(1, 2))
def col2im(attributes: Attributes) -> Body:
    """Columns [N, C * block, L] summed into an image of two dimensions; pads are cut off at the end."""

    def run(columns: Tensor, image: Tensor | list[int], block: Tensor | list[int]) -> Tensor:
        sides, kernel = numbers(image), numbers(block)
        if len(sides) != 2:
            raise UnsupportedOperatorError(f"Col2Im with {len(sides)} dimensions cannot be converted")
        pads = attributes.get("pads", [0] * 4)
        padded = [side + pads[axis] + pads[axis + 2] for axis, side in enumerate(sides)]
        dilations, strides = attributes.get("dilations", [1, 1]), attributes.get("strides", [1, 1])
        whole = F.fold(columns, tuple(padded), tuple(kernel), tuple(dilations), 0, tuple(strides))
        return F.pad(whole, [-amount for amount in torch_pads(pads)])

    return run


@operator("MatMul")
def matmul(_attributes: Attributes) -> Body:
    return torch.matmul


@operator("Gemm")
def gemm(attributes: Attributes) -> Body:
    alpha, beta = attributes.get("alpha", 1.0), attributes.get("beta", 1.0)

    def run(a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
        a = a.T if attributes.get("transA", 0) else a
        b = b.T if attributes.get("transB", 0) else b
        if c is None:
            return alpha * (a @ b) if alpha != 1 else a @ b
        return torch.addmm(c, a, b, beta=beta, alpha=alpha)

    return run


class _Line:
    """What BatchNormalization multiplies with and adds, kept until one of the tensors that it comes from is another.

    A tensor is another where something was written into it by torch, but not through `Tensor.data` or shared memory.
    """

    def __init__(self, epsilon: float) -> None:
        self.epsilon = epsilon
        self._kept: tuple[list[tuple[Tensor, int]], tuple[Tensor, Tensor]] | None = None

    def __call__(self, *operands: Tensor) -> tuple[Tensor, Tensor]:
        if torch.is_inference_mode_enabled() or any(x.requires_grad or x.is_inference() for x in operands):
            return self._computed(*operands)
        kept = self._kept
        if kept is not None and all(
            x is known and x._version == version for x, (known, version) in zip(operands, kept[0], strict=True)
        ):
            return kept[1]
        line = self._computed(*operands)
        self._kept = [(x, x._version) for x in operands], line
        return line

    def _computed(self, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        slope = scale * torch.rsqrt(variance + self.epsilon)
        return slope, bias - mean * slope


@operator("BatchNormalization")
def batch_normalization(attributes: Attributes) -> Body:
    """Inference form at every version: exports that keep BatchNorm trainable are used with their stored statistics."""
    epsilon = attributes.get("epsilon", 1e-5)
    line = _Line(epsilon)

    def run(x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        if scale.dim() == 1:  # as one multiplication and addition: its gradient is a third of F.batch_norm's work
            shape = (1, -1, *[1] * (x.dim() - 2))
            slope, offset = line(scale, bias, mean, variance)
            return torch.addcmul(offset.view(shape).to(x.dtype), x, slope.view(shape).to(x.dtype))
        return (x - mean) * torch.rsqrt(variance + epsilon) * scale + bias  # one entry a place: opset 7, spatial=0

    return run
