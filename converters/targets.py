"""What a quantized file is made of: which integer type holds how many bits, and the opset and IR that it needs."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_ir as ir

MIN_BITS, MAX_BITS = 2, 8
INT4_OPSET, INT4_IR = 21, 10  # onnxruntime 1.19
INT8_PER_CHANNEL_OPSET, INT8_PER_CHANNEL_IR = 13, 7
PLAIN_OPSET, PLAIN_IR = 13, 7  # float models: from here on Split, Squeeze and ReduceSum take their sizes as operands


@dataclass(frozen=True)
class Container:
    """An integer type of the file: its range, and the opset and IR that first have it in DequantizeLinear."""

    dtype: ir.DataType
    numpy: np.dtype
    low: int
    high: int
    opset: int
    ir_version: int


INT4 = Container(ir.DataType.INT4, np.dtype(ml_dtypes.int4), -8, 7, INT4_OPSET, INT4_IR)
INT8 = Container(ir.DataType.INT8, np.dtype(np.int8), -128, 127, INT8_PER_CHANNEL_OPSET, INT8_PER_CHANNEL_IR)
UINT8 = Container(ir.DataType.UINT8, np.dtype(np.uint8), 0, 255, INT8_PER_CHANNEL_OPSET, INT8_PER_CHANNEL_IR)


def weight_container(bits: int) -> Container:
    """The signed type that holds weights of `bits` bits: INT4 up to 4, INT8 up to 8.

    Raises ValueError for a width that neither holds.
    """
    if not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"{bits} bits: weights have {MIN_BITS} to {MAX_BITS}")
    return INT4 if bits <= 4 else INT8


ACTIVATIONS = UINT8
"""What holds activations of up to 8 bits, behind a Clip where they have fewer. A 4-bit type would be no gain, as
activations are not stored, and onnxruntime 1.31 does not load it everywhere: it fails to fuse Clip into QuantizeLinear
to UINT4, and makes a QLinearConv of 8-bit weights and UINT4 activations that it then rejects."""
