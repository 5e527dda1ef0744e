"""Whether a written file computes what was computed, quantized value by quantized value.

Float noise moves some values over a boundary between two steps, and what a deep network of few bits makes of that can
be as large as a good part of the noise of quantization: its logits prove nothing. So each quantized value is computed
from onnxruntime's values of all others, which carries no difference on, and compared in steps of its own quantizer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from converters import graphs
from converters.conversion import TOLERANCE, relative_difference
from converters.errors import ConversionError
from converters.runtime import Session

MOST_APART = 1.5
"""Steps: float noise moves an element to the next one, and float arithmetic on both is not exact."""
SHARE = 1e-3
"""Largest share of all elements that may be a step apart; measured: 4e-5 (`benchmarks/exactness.py`)."""
SHARE_OF_ONE, FEW = 1e-2, 3
"""The same of one value's, where that is more than a few."""

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Quantized:
    """The quantized values of a computed model, by name."""

    steps: Mapping[str, float]
    """Step of each."""
    logits: str
    """Name of the logits in the computed model."""
    compute: Callable[[str, Floats, Mapping[str, Floats]], Floats]
    """A value, or the logits, from model inputs [N, ...] and all (other) quantized values."""


def hold(model: ir.Model, values: Mapping[str, str], logits: str, x: Floats, quantized: Quantized, path: Path) -> None:
    """Compare `model`, in onnxruntime without optimisations, on inputs `x` [N, ...], with what was computed.

    `values` are the names of the quantized values in the file, and `logits` that of its logits. Raises ConversionError
    naming a value that differs.
    """
    probe = model.clone()
    graphs.set_outputs(probe.graph, (*(values[name] for name in quantized.steps), logits))
    *found, answer = (np.asarray(v, np.float32) for v in Session(probe, optimise=False, name=str(path)).run(x))
    there = dict(zip(quantized.steps, found, strict=True))
    differing = 0
    for name, step in quantized.steps.items():
        apart = np.abs(quantized.compute(name, x, there) - there[name]) / step
        here = int((apart > MOST_APART - 1).sum())
        if not apart.max() < MOST_APART or here > max(FEW, SHARE_OF_ONE * apart.size):
            raise ConversionError(
                f"{path}: the written model differs from the computed one at value {name!r}, by up to"
                f" {apart.max():.0f} steps in {here / apart.size:.1%} of it: please report it"
            )
        differing += here
    share = differing / max(1, sum(value.size for value in there.values()))
    if share > SHARE:
        raise ConversionError(
            f"{path}: {share:.1%} of the quantized values of the written model are a step from the computed ones:"
            " please report it"
        )
    computed = quantized.compute(quantized.logits, x, there)
    difference = relative_difference(computed, answer.reshape(computed.shape))
    if not difference <= TOLERANCE:
        raise ConversionError(
            f"{path}: the last layers of the written model differ from the computed ones by {difference:.1e}: please"
            " report it"
        )
