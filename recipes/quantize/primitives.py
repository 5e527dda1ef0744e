"""Numeric primitives of uniform affine quantization: pure functions, tested against independent references.

    q = clip(round(x / s) + z, low, high)        x^ = (q - z) * s

`s` is the scale, `z` the integer zero point; [low, high] the integer range. Weights use the signed range of their bit
width, activations the unsigned one. Real zero is always exactly representable.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

STRETCH_LOW, STRETCH_HIGH = -0.1, 1.1  # rectified sigmoid (AdaRound, Nagel et al. 2020, eq. 23)
AT_ONCE = {"cpu": 1 << 16, "cuda": 1 << 24}
"""Elements that ranges are tried on at once, on a CPU for each thread: fewer calls for small tensors, and of large ones
what a cache holds (twice as fast on one core as all of 1000x1280). Of a GPU nothing was measured."""


def signed_range(bits: int) -> tuple[int, int]:
    """[-2^(b-1), 2^(b-1) - 1]."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def unsigned_range(bits: int) -> tuple[int, int]:
    """[0, 2^b - 1]."""
    return 0, 2**bits - 1


def spread(x: Tensor, count: int, most: int, first: int = 0) -> Tensor:
    """About `most` elements of `count` images, evenly spread: those in the batch `x` [n, ...] from image `first` on.

    The stride shares no factor with the size of an image, so that it runs along no row or column, and sees each image
    at other places.
    """
    size = x[0].numel()
    stride = max(1, size * count // most)
    while math.gcd(stride, size) > 1:
        stride += 1
    return x.flatten()[-first * size % stride :: stride]


def broadcast(values: Tensor, rank: int, axis: int) -> Tensor:
    """[C] to a shape that broadcasts along `axis`: ([8], rank 4, axis 0) -> [8, 1, 1, 1]."""
    return values.view([-1 if index == axis else 1 for index in range(rank)])


@dataclass(frozen=True)
class Granularity:
    """Which elements of a weight share a scale: all of an output channel, or `size` neighbours along its inputs.

    `axis` (0 or 1) is that of the output channels, the other of the two that of the inputs; `size` 0 is all of a
    channel. The last group of a channel may be smaller. ONNX calls the second blocked quantization (operator set 21).
    """

    shape: tuple[int, ...]
    axis: int
    size: int = 0

    @property
    def inputs(self) -> int:
        """The axis of the input channels."""
        return 1 - self.axis

    @property
    def scales(self) -> tuple[int, ...]:
        """The shape of one scale a row: of a weight [8, 40, 3, 3], [8, 1, 1, 1] or, in groups of 16, [8, 3, 3, 3]."""
        lengths = enumerate(self.shape)
        if not self.size:
            return tuple(length if axis == self.axis else 1 for axis, length in lengths)
        return tuple(-(-length // self.size) if axis == self.inputs else length for axis, length in lengths)

    def rows(self, weight: Tensor) -> Tensor:
        """The weight as [R, K]: what shares a scale in one row; groups that are too short end in zeros."""
        if not self.size:
            return weight.movedim(self.axis, 0).flatten(1)
        lanes = weight.movedim(self.inputs, -1)
        return F.pad(lanes, (0, -lanes.shape[-1] % self.size)).reshape(-1, self.size)

    def arrange(self, values: Tensor) -> Tensor:
        """One number a row [R] in the shape `scales`."""
        if not self.size:
            return values.view(self.scales)
        groups = self.scales[self.inputs]
        others = [length for axis, length in enumerate(self.shape) if axis != self.inputs]
        return values.view(*others, groups).movedim(-1, self.inputs)

    def expand(self, values: Tensor) -> Tensor:
        """Numbers in the shape `scales`, in one that broadcasts with the weight."""
        if not self.size:
            return values
        return values.repeat_interleave(self.size, self.inputs).narrow(self.inputs, 0, self.shape[self.inputs])


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
    """Integers (in x's float type) of x; scale and zero point broadcast against it. Rounds half to even, as ONNX."""
    return torch.clamp(torch.round(x / scale) + zero_point, low, high)


def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    return (q - zero_point) * scale


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
    """x rounded to the nearest representable real value."""
    return dequantize(quantize(x, scale, zero_point, low, high), scale, zero_point)


def mixed(quantized: Tensor, x: Tensor, floating: Tensor) -> Tensor:
    """`x`, which is finite, where `floating` is 1, `quantized` where it is 0; far faster on a CPU than torch.where."""
    return torch.lerp(quantized, x, floating)


class _FakeQuantize(torch.autograd.Function):
    """`fake_quantize` per tensor with the gradients of LSQ (Esser et al. 2020), where `floating` is not 1.

    With n = round(clip(x / s, low - z, high - z)), x^ = n s:  dx^/dx = 1 and dx^/ds = n - x / s where nothing is
    clipped, 0 and n where it is. One function instead of its parts, which are most of the time of training.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int, floating: Tensor | None
    ) -> Tensor:
        position = x / scale
        clipped = position.clamp(low - zero_point, high - zero_point)
        steps = torch.round(clipped)
        inside = clipped.eq_(position)
        by_scale = torch.addcmul(steps, inside, position, value=-1)
        out = steps.mul_(scale)
        if floating is not None:
            out = mixed(out, x, floating)
            inside = torch.maximum(inside, floating)
            by_scale.addcmul_(by_scale, floating, value=-1)
        ctx.save_for_backward(inside, by_scale)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        inside, by_scale = ctx.saved_tensors
        of_scale = (gradient * by_scale).sum() if ctx.needs_input_grad[1] else None
        return gradient * inside, of_scale, None, None, None, None


def fake_quantize_learned(
    x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int, floating: Tensor | None = None
) -> Tensor:
    """x with one scale (a number each for scale and zero point), both with gradients straight through the rounding.

    Elements where `floating`, in x's shape and type, is 1 stay as they are; elsewhere it is 0.
    """
    if torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad):
        found: Tensor = _FakeQuantize.apply(x, scale, zero_point, low, high, floating)
        return found
    quantized = fake_quantize(x, scale, zero_point, low, high)
    return quantized if floating is None else mixed(quantized, x, floating)


def round_straight_through(x: Tensor) -> Tensor:
    """Round with the gradient of the identity (Bengio et al. 2013)."""
    return x + (torch.round(x) - x).detach()


def affine_parameters(minimum: Tensor, maximum: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the range [minimum, maximum], widened to hold zero; shapes are kept.

    A range that is empty or only zero gets scale 1.
    """
    minimum, maximum = minimum.clamp(max=0), maximum.clamp(min=0)
    scale = (maximum - minimum) / (high - low)
    scale = torch.where(scale > torch.finfo(scale.dtype).tiny * high, scale, torch.ones_like(scale))
    return scale, torch.clamp(low - torch.round(minimum / scale), low, high)


def search_range(
    rows: Tensor, low: int, high: int, *, norm: float = 2.4, steps: int = 80, symmetric: bool = False
) -> tuple[Tensor, Tensor]:
    """Scale [R] and zero point [R] for each row of `rows` [R, K], by shrinking the range (BRECQ's L2.4 search).

    Tries the full range and `steps` - 1 uniform shrinks down to 1/`steps` of it, and keeps for each row the one with
    the least sum |x - x^|^norm. `symmetric` fixes the zero point at the middle (0 for a signed range).
    """
    shrinks = torch.tensor([[1 - step / steps] for step in range(steps)], dtype=rows.dtype, device=rows.device)
    found = [_search(part, shrinks, low, high, norm, symmetric) for part in rows.split(_at_once(rows[0]))]
    scale, zero = zip(*found, strict=True)
    return torch.cat(scale), torch.cat(zero)


def _at_once(x: Tensor) -> int:
    """How many tensors of x's size ranges are tried on at once."""
    workers = torch.get_num_threads() if x.device.type == "cpu" else 1
    return max(1, workers * AT_ONCE.get(x.device.type, AT_ONCE["cuda"]) // x.numel())


def _search(rows: Tensor, shrinks: Tensor, low: int, high: int, norm: float, symmetric: bool) -> tuple[Tensor, Tensor]:
    """`search_range` of so few rows that all of `shrinks` [S, 1] may be tried at once."""
    minimum, maximum = rows.amin(1), rows.amax(1)
    if symmetric:
        maximum = torch.maximum(maximum, -minimum)
        minimum = -maximum
    scale, zero = affine_parameters(minimum * shrinks, maximum * shrinks, low, high)  # [S, R]
    if symmetric:
        zero = torch.full_like(zero, (low + high + 1) // 2)
    errors = [
        (fake_quantize(rows, s[..., None], z[..., None], low, high) - rows).abs_().pow_(norm).sum(-1)
        for s, z in zip(*(each.split(_at_once(rows)) for each in (scale, zero)), strict=True)
    ]
    best = torch.cat(errors).argmin(0, keepdim=True)
    return scale.gather(0, best)[0], zero.gather(0, best)[0]


def rectified_sigmoid(v: Tensor) -> Tensor:
    """h(v) = clip(1.2 sigmoid(v) - 0.1, 0, 1): which way to round, between down (0) and up (1)."""
    return torch.clamp(torch.sigmoid(v) * (STRETCH_HIGH - STRETCH_LOW) + STRETCH_LOW, 0, 1)


def inverse_rectified_sigmoid(h: Tensor) -> Tensor:
    """The v with h(v) = h, for h in [0, 1]."""
    return torch.logit((h - STRETCH_LOW) / (STRETCH_HIGH - STRETCH_LOW))


def rounding_regulariser(h: Tensor, beta: float) -> Tensor:
    """Mean of 1 - |2h - 1|^beta: 0 where every h is 0 or 1, 1 where every h is 1/2 (seed, eq. 9)."""
    return (1 - (2 * h - 1).abs().pow(beta)).mean()
