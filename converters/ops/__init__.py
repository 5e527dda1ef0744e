"""The operators of the standard that classifiers use, each one function for every version from opset 7 to 25.

`registry.find` is the one look-up: our table first, onnx2torch's second.
"""

from converters.ops import (  # noqa: F401  (importing fills the table)
    arrangement,
    attention,
    elementwise,
    layers,
    normalisation,
    pooling,
    quantization,
    reductions,
    resize,
    shapes,
)
