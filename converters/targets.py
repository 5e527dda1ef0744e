"""What a quantized file is made of, by the runtime that it is for.

Integer kernels ask for more than small numbers. Measured with onnxruntime 1.31 on one core of an AMD EPYC (AVX-512,
VNNI), a 3x3 convolution of 64 channels at 28x28 in float takes 0.35 ms; with INT8 weights of zero point 0 it takes
0.08, with UINT8 weights 0.19. A depthwise one takes 0.09 ms in float, 0.03 with zero point 0, and 1.33 where channels
have zero points of their own. Without VNNI, products of unsigned activations and full-range INT8 weights saturate;
weights of 7 bits do not.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np
import onnx_ir as ir

from converters.errors import MixMixError

MIN_BITS, MAX_BITS = 2, 8
WIDE = 16
"""The one width of activations above MAX_BITS."""
INT2_OPSET, INT2_IR = 25, 13  # onnxruntime 1.24
INT4_OPSET, INT4_IR = 21, 10  # onnxruntime 1.19
INT8_PER_CHANNEL_OPSET, INT8_PER_CHANNEL_IR = 13, 7
PLAIN_OPSET, PLAIN_IR = 13, 7  # float models: from here on Split, Squeeze and ReduceSum take their sizes as operands
INT32_LIMIT = 2**31 - 1
SAFE_BITS = 7
"""Widest weights whose products with 8-bit activations never saturate, whatever the processor."""


@dataclass(frozen=True)
class Container:
    """An integer type of the file: its range, and the opset and IR that first have it in DequantizeLinear."""

    dtype: ir.DataType
    numpy: np.dtype
    low: int
    high: int
    opset: int
    ir_version: int

    @property
    def bits(self) -> int:
        return self.dtype.bitwidth

    def bounds(self, bits: int) -> tuple[int, int]:
        """The range of `bits` bits in it: [-2^(b-1), 2^(b-1) - 1] where it is signed, else [0, 2^b - 1]."""
        low = -(2 ** (bits - 1)) if self.low < 0 else 0
        return low, low + 2**bits - 1


INT2 = Container(ir.DataType.INT2, np.dtype(ml_dtypes.int2), -2, 1, INT2_OPSET, INT2_IR)
INT4 = Container(ir.DataType.INT4, np.dtype(ml_dtypes.int4), -8, 7, INT4_OPSET, INT4_IR)
INT8 = Container(ir.DataType.INT8, np.dtype(np.int8), -128, 127, INT8_PER_CHANNEL_OPSET, INT8_PER_CHANNEL_IR)
UINT8 = Container(ir.DataType.UINT8, np.dtype(np.uint8), 0, 255, INT8_PER_CHANNEL_OPSET, INT8_PER_CHANNEL_IR)
UINT16 = Container(ir.DataType.UINT16, np.dtype(np.uint16), 0, 65535, INT4_OPSET, INT4_IR)
WEIGHT_CONTAINERS = {"int2": (INT2, INT4, INT8), "int4": (INT4, INT8), "int8": (INT8,)}
"""By the name of the narrowest: what weights may be stored in."""


@dataclass(frozen=True)
class Target:
    """How a runtime wants integers, and where.

    Activations of fewer bits than their container lie behind a Clip. A 4-bit type would be no gain for them, as they
    are not stored, and onnxruntime 1.31 does not load it everywhere: it fails to fuse Clip into QuantizeLinear to
    UINT4, and makes a QLinearConv of 8-bit weights and UINT4 activations that it then rejects.
    """

    name: str
    weights: tuple[Container, ...]
    """What weights may be stored in, the narrowest first."""
    activations: tuple[Container, ...]
    symmetric_weights: bool = False
    """Zero points of all weights are 0."""
    symmetric_activations: bool = False
    integer_kernels: bool = False
    """Everything between the layers is quantized that keeps integer kernels from following one another, and biases are
    integers."""
    saturates: bool = False
    """Products of full-range INT8 weights and UINT8 activations may saturate where the file runs."""

    @property
    def elsewhere(self) -> bool:
        """Whether the file is for another device than this machine's processor."""
        return self.name in ("ort-cuda", "tensorrt")

    def weight_container(self, bits: int) -> Container:
        """The narrowest that holds weights of `bits` bits. Raises ValueError for a width that none holds."""
        if not MIN_BITS <= bits <= MAX_BITS:
            raise ValueError(f"{bits} bits: weights have {MIN_BITS} to {MAX_BITS}")
        return next(container for container in self.weights if container.bits >= bits)

    def symmetric(self, bits: int, act_bits: int | None) -> bool:
        """Whether weights of `bits` bits have zero point 0, where their input has `act_bits`.

        Always where integer kernels may take them: onnxruntime's depthwise one is fifty times slower otherwise.
        """
        return self.symmetric_weights or (act_bits is not None and self.weight_container(bits).bits == MAX_BITS)

    def activation_container(self, bits: int) -> Container:
        """The narrowest that holds activations of `bits` bits. Raises MixMixError for a width that none holds."""
        for container in self.activations:
            if container.bits >= bits:
                return container
        raise MixMixError(
            f"--act-bits {bits} cannot be used with --target {self.name}, whose activations have up to"
            f" {self.activations[-1].bits} bits: ask for fewer"
        )

    def needs(self, bits: int, act_bits: int | None) -> tuple[int, int]:
        """The least opset and IR version of a file whose narrowest weights have `bits` bits."""
        used = [self.weight_container(bits), self.weight_container(MAX_BITS)]
        if act_bits is not None:
            used.append(self.activation_container(act_bits))
        return max(container.opset for container in used), max(container.ir_version for container in used)


PORTABLE = Target("portable", WEIGHT_CONTAINERS["int4"], (UINT8, UINT16), saturates=True)
"""The smallest file that onnxruntime 1.19 and later read, whose products in integers saturate on no processor."""
TARGETS = {
    target.name: target
    for target in (
        PORTABLE,
        Target("ort-cpu", (INT8,), (UINT8,), symmetric_weights=True, integer_kernels=True, saturates=True),
        Target("ort-cuda", (INT8,), (UINT8,), symmetric_weights=True),
        Target("tensorrt", (INT8,), (INT8,), symmetric_weights=True, symmetric_activations=True),
    )
}


def choose_target(name: str, container: str | None = None, act_bits: int | None = None) -> Target:
    """The target of that name; `container` (a key of WEIGHT_CONTAINERS) overrides what weights are stored in.

    Where activations stay in float nothing runs in integers, so that onnxruntime gets the smallest file. Raises
    MixMixError for a combination that the runtime does not load.
    """
    target = TARGETS[name]
    if act_bits is None and name.startswith("ort"):
        target = replace(PORTABLE, name=name)
    if container is not None:
        target = replace(target, weights=WEIGHT_CONTAINERS[container])
    if name == "tensorrt" and act_bits not in (None, MAX_BITS):
        raise MixMixError(f"--act-bits {act_bits} cannot be used with --target tensorrt, which runs 8 bits: use 8")
    if act_bits is not None:
        target.activation_container(act_bits)
        if container == "int2":
            raise MixMixError(
                "--weight-container int2 cannot be used with --act-bits, as onnxruntime does not load such a file: use"
                " int4, or leave the activations in float"
            )
    return target
