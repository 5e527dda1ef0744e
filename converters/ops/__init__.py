"""Operators that onnx2torch lacks, has at older versions only, or keeps its weights inside of.

`registry.find` is the one look-up: our table first, onnx2torch's second.
"""

from converters.ops import (  # noqa: F401  (importing fills the table)
    arrangement,
    attention,
    elementwise,
    layers,
    normalisation,
    pooling,
    resize,
    shapes,
)
