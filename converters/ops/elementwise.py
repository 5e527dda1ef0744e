"""Elementwise operators: arithmetic, comparisons, activations, casts. Operands broadcast as in numpy."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import onnx
import torch
import torch.nn.functional as F
from torch import Tensor

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
    onnx.TensorProto.UINT16: torch.uint16,
    onnx.TensorProto.UINT32: torch.uint32,
    onnx.TensorProto.UINT64: torch.uint64,
}


def _divide(a: Tensor, b: Tensor) -> Tensor:
    """Of integers, rounded towards zero."""
    return torch.div(a, b, rounding_mode=None if a.is_floating_point() else "trunc")


def _power(base: Tensor, exponent: Tensor) -> Tensor:
    """In the base's type."""
    return torch.pow(base, exponent).to(base.dtype)


def _prelu(x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x < 0, slope * x, x)


def _same(x: Tensor, *_: Tensor | None) -> Tensor:
    return x


def _of_any_number(function: Callable[[Tensor, Tensor], Tensor]) -> Body:
    return lambda *operands: functools.reduce(function, operands)


def _mean(*operands: Tensor) -> Tensor:
    return functools.reduce(torch.add, operands) / len(operands)


PLAIN: Mapping[str, Body] = {
    "Abs": torch.abs,
    "Acos": torch.acos,
    "Acosh": torch.acosh,
    "Add": torch.add,
    "And": torch.logical_and,
    "Asin": torch.asin,
    "Asinh": torch.asinh,
    "Atan": torch.atan,
    "Atanh": torch.atanh,
    "BitwiseAnd": torch.bitwise_and,
    "BitwiseNot": torch.bitwise_not,
    "BitwiseOr": torch.bitwise_or,
    "BitwiseXor": torch.bitwise_xor,
    "Ceil": torch.ceil,
    "Cos": torch.cos,
    "Cosh": torch.cosh,
    "Div": _divide,
    "Dropout": _same,  # inference form, whatever the seed, the ratio and the mode say
    "Equal": torch.eq,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "HardSwish": F.hardswish,
    "Identity": _same,
    "IsNaN": torch.isnan,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "Log": torch.log,
    "Max": _of_any_number(torch.maximum),
    "Mean": _mean,
    "Min": _of_any_number(torch.minimum),
    "Mish": F.mish,
    "Mul": torch.mul,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Or": torch.logical_or,
    "PRelu": _prelu,
    "Pow": _power,
    "Reciprocal": torch.reciprocal,
    "Relu": torch.relu,
    "Round": torch.round,  # halves to even
    "Sigmoid": torch.sigmoid,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Sinh": torch.sinh,
    "Softplus": F.softplus,
    "Softsign": F.softsign,
    "Sqrt": torch.sqrt,
    "Sub": torch.sub,
    "Sum": _of_any_number(torch.add),
    "Tan": torch.tan,
    "Tanh": torch.tanh,
    "Where": torch.where,
    "Xor": torch.logical_xor,
}
"""Operators without attributes that matter here."""


def _plain(function: Body) -> Callable[[Attributes], Body]:
    return lambda _attributes: function


for _name, _function in PLAIN.items():
    operator(_name)(_plain(_function))


def _with_alpha(function: Body, default: float) -> Callable[[Attributes], Body]:
    return lambda attributes: lambda x: function(x, attributes.get("alpha", default))


operator("LeakyRelu")(_with_alpha(F.leaky_relu, 0.01))
operator("Elu")(_with_alpha(F.elu, 1.0))
operator("Celu")(_with_alpha(F.celu, 1.0))


@operator("Selu")
def selu(attributes: Attributes) -> Body:
    alpha = attributes.get("alpha", 1.67326319217681884765625)
    gamma = attributes.get("gamma", 1.05070102214813232421875)
    return lambda x: gamma * F.elu(x, alpha)


@operator("Gelu")
def gelu(attributes: Attributes) -> Body:
    approximate = attributes.get("approximate", "none")
    return lambda x: F.gelu(x, approximate=approximate)


@operator("Swish")
def swish(attributes: Attributes) -> Body:
    alpha = attributes.get("alpha", 1.0)
    return lambda x: x * torch.sigmoid(alpha * x)


@operator("HardSigmoid")
def hard_sigmoid(attributes: Attributes) -> Body:
    slope, offset = attributes.get("alpha", 0.2), attributes.get("beta", 0.5)
    return lambda x: torch.clamp(slope * x + offset, 0, 1)


@operator("ThresholdedRelu")
def thresholded_relu(attributes: Attributes) -> Body:
    alpha = attributes.get("alpha", 1.0)
    return lambda x: F.threshold(x, alpha, 0.0)


@operator("Shrink")
def shrink(attributes: Attributes) -> Body:
    """Towards zero by `bias`; zero within `lambd`."""
    bias, limit = attributes.get("bias", 0.0), attributes.get("lambd", 0.5)
    return lambda x: torch.where(x.abs() > limit, x - bias * torch.sign(x), 0)


Bound = Tensor | float | list[float] | None


def _scalar(bound: Tensor | float | list[float]) -> Tensor | float:
    """The runtime takes bounds of shape [1] too."""
    return bound[0] if isinstance(bound, list) else bound


@operator("Clip", static=(1, 2))
def clip(attributes: Attributes) -> Body:
    """Bounds may be left out, may be computed, and were attributes before opset 11."""

    def run(x: Tensor, low: Bound = None, high: Bound = None) -> Tensor:
        low = attributes.get("min") if low is None else _scalar(low)
        high = attributes.get("max") if high is None else _scalar(high)
        if isinstance(low, float) and isinstance(high, float):
            if low < high and x.is_floating_point():
                return F.hardtanh(x, low, high)  # its gradient is one pass, a clamp's is four
            return torch.clamp(x, low, high)
        x = x if low is None else torch.clamp(x, min=low)
        return x if high is None else torch.clamp(x, max=high)

    return run


@operator("Mod")
def mod(attributes: Attributes) -> Body:
    """The remainder has the divisor's sign; with `fmod`, the dividend's."""
    return torch.fmod if attributes.get("fmod", 0) else torch.remainder


@operator("IsInf")
def is_inf(attributes: Attributes) -> Body:
    signs = [sign for sign, key in ((1, "detect_positive"), (-1, "detect_negative")) if attributes.get(key, 1)]

    def run(x: Tensor) -> Tensor:
        found = [x == sign * torch.inf for sign in signs]
        return functools.reduce(torch.logical_or, found, torch.zeros_like(x, dtype=torch.bool))

    return run


@operator("Cast")
def cast(attributes: Attributes) -> Body:
    wanted = TORCH_TYPES[attributes["to"]]
    return lambda x: x.to(wanted)


@operator("CastLike")
def cast_like(_attributes: Attributes) -> Body:
    return lambda x, like: x.to(like.dtype)
