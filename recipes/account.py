"""What a recipe that writes a smaller model reports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from converters.input_spec import InputSpec
from converters.kernels import Fusion
from converters.targets import MAX_BITS, TARGETS
from recipes.budget import Spending
from recipes.reconstruct import Reconstruction

LEAST_POWER = 1e-12  # a layer of zeros has no relative error


@dataclass(frozen=True)
class LayerAccount:
    """What became of one layer. `bits` and `act_bits` are None where they are float."""

    name: str
    weights: int
    """How many the layer had."""
    bits: int | None
    act_bits: int | None
    sparsity: float
    """Share of the weights that are zero."""
    error: float
    """Relative squared error of the weight."""
    undecided: float
    """Share of roundings that training had not settled."""
    reason: str | None
    """Why it has other bits than was asked for."""
    whole: str | None = None
    """Why nothing was taken out of it, where something was to go."""


def account_layer(
    name: str,
    before: Tensor,
    after: Tensor,
    *,
    bits: int | None = None,
    act_bits: int | None = None,
    undecided: float = 0.0,
    reason: str | None = None,
    whole: str | None = None,
) -> LayerAccount:
    """The account of a layer whose weight was `before` and is `after`, of the same shape."""
    error = (after - before).square().sum() / before.square().sum().clamp_min(LEAST_POWER)
    sparsity = float((after == 0).float().mean())
    return LayerAccount(name, before.numel(), bits, act_bits, sparsity, float(error), undecided, reason, whole)


def share_of_zeros(layers: Sequence[LayerAccount]) -> float:
    """Share of the weights of all layers that are zero."""
    return sum(layer.sparsity * layer.weights for layer in layers) / max(1, sum(layer.weights for layer in layers))


@dataclass(frozen=True)
class Compression:
    """The result: where, what, and how well. `blocks` are errors of the blocks' outputs, by name, in order."""

    input: Path
    output: Path
    spec: InputSpec
    bits: int | None
    act_bits: int | None
    sparsity: float
    """Share of the weights of all layers that are zero or gone."""
    blocks: list[tuple[str, Reconstruction]]
    layers: list[LayerAccount]
    size_before: int
    size_after: int
    seconds: float
    written_difference: float
    """Largest relative difference between the file's logits in onnxruntime and the computed ones."""
    macs_left: float = 1.0
    """Share of the multiplications that the file still makes: less than 1 where whole channels are gone."""
    fusion: Fusion | None = None
    """What runs in integers, where activations are quantized and the file is for this machine."""
    target: str | None = None
    """The runtime that a quantized file is for."""
    spending: Spending | None = None
    """Of the budget of bits, where that was what was asked for."""

    @property
    def runs_elsewhere(self) -> bool:
        """Whether the file is for another device than the processor that it is timed on."""
        return self.target is not None and TARGETS[self.target].elsewhere

    @property
    def likely_slow_because(self) -> str | None:
        """Why the file may be slower than the float one; None where nothing is known that would make it so."""
        if all(layer.bits is None for layer in self.layers) or self.runs_elsewhere:
            return None
        way = "--act-bits 8" + " --target ort-cpu" * (self.target != "ort-cpu")
        asked = self.target == "ort-cpu" and self.act_bits == MAX_BITS
        if not asked and (self.fusion is None or not self.fusion.counted):
            return (
                f"integers are turned back into float on every run; with {way} onnxruntime runs in integers, from a"
                " file of 8-bit weights"
            )
        if self.fusion is not None and self.fusion.counted < self.fusion.layers:
            missing = self.fusion.layers - self.fusion.counted
            text = f"{missing} of {self.fusion.layers} layers do not run in integers"
            return text if asked else f"{text}; more do with {way}"
        return "integer kernels of this machine do not make up for quantizing what lies between them"

    @property
    def kept(self) -> list[LayerAccount]:
        """Layers whose weights have other bits than was asked for."""
        return [layer for layer in self.layers if self.bits is not None and layer.bits != self.bits]
