"""How well a file's conversion holds: against onnxruntime, in its gradient, at other batch sizes, weight by weight."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from converters import graphs
from converters.classifier import Classifier
from converters.conversion import relative_difference, to_torch
from converters.load import load_classifier
from converters.passes import LAYERS
from converters.torch_module import TorchClassifier
from recipes.synth.procedural import dead_leaves

BATCH = 8
LARGEST = 1e-4
"""Largest relative difference from onnxruntime that holds."""


@dataclass(frozen=True)
class Conformance:
    """What `measure` found of one file."""

    opset: int
    difference: float
    """Largest one of the logits of one image, relative to the largest logit."""
    batch_difference: float
    """The same of eight images at once."""
    gradient: bool
    """Whether it is finite and reaches every channel of the image."""
    mapped: int
    """Weights of the file that are a layer's, bit for bit."""
    weights: int
    """Constant weights of Conv, Gemm and MatMul in the file."""
    batchnorms: int
    """BatchNormalization with statistics that is left."""
    seconds: float
    """Load and conversion, the converter's own check against onnxruntime included."""

    @property
    def holds(self) -> bool:
        close = self.difference < LARGEST and self.batch_difference < LARGEST  # not of NaN
        return close and self.gradient and self.mapped == self.weights


def measure(path: Path, seed: int = 1) -> Conformance:
    """Load, convert and compare the file at `path` on dead leaves. Raises MixMixError where it cannot be converted."""
    started = time.perf_counter()
    classifier = load_classifier(path)
    module = to_torch(classifier)
    seconds = time.perf_counter() - started
    x = _images(classifier, seed)
    expected = _expected(classifier, x)
    with torch.no_grad():
        one, eight = module(x[:1]).numpy(), module(x).numpy()
    mapped, weights = mapped_weights(classifier, module)
    return Conformance(
        opset=classifier.opset,
        difference=relative_difference(one, expected[:1]),
        batch_difference=relative_difference(eight, expected),
        gradient=gradient_reaches(module, x[:1]),
        mapped=mapped,
        weights=weights,
        batchnorms=len(module.batchnorms()),
        seconds=seconds,
    )


def _images(classifier: Classifier, seed: int) -> torch.Tensor:
    spec = classifier.spec
    return classifier.as_stored(spec.to_input(_leaves(spec.channel_count, spec.size, seed))).contiguous()


@cache
def _leaves(channels: int, size: tuple[int, int], seed: int) -> torch.Tensor:
    return dead_leaves(BATCH, channels, size, torch.Generator().manual_seed(seed))


def _expected(classifier: Classifier, x: torch.Tensor) -> np.ndarray:
    """Logits [8, classes] by onnxruntime, in the batches that the file takes."""
    logits = classifier.session(optimise=False).run_in_batches(x.numpy(), classifier.fixed_batch or BATCH)
    return logits.reshape(BATCH, -1).astype(np.float32)


def gradient_reaches(module: TorchClassifier, x: torch.Tensor) -> bool:
    """Whether the logits' gradient is finite and not zero in each channel of `x`."""
    image = x.clone().requires_grad_(True)
    module(image).square().sum().backward()
    if image.grad is None or not image.grad.isfinite().all():
        return False
    channels = 1 if module.spec.layout == "NCHW" else 3
    return bool((image.grad.abs().movedim(channels, 0).flatten(1).amax(1) > 0).all())


def mapped_weights(classifier: Classifier, module: TorchClassifier) -> tuple[int, int]:
    """How many constant weights of the file are those of a layer of the module, bit for bit, and how many there are.

    A weight is what a Conv, Gemm or MatMul behind the image reads, through whatever hides it; the layer is that of the
    same output.
    """
    seen = {graphs.image_input(classifier.original.graph)}
    layers = {layer.output: layer for layer in module.layers()}
    mapped = total = 0
    for node in classifier.original.graph:
        if seen.isdisjoint(node.inputs):
            continue
        seen.update(node.outputs)
        if node.op_type not in LAYERS:
            continue
        first, second = (_stored(value) for value in node.inputs[:2])
        weight = first if second is None else second
        if weight is None:
            continue
        total += 1
        layer = layers.get(str(node.outputs[0].name))
        mapped += layer is not None and np.array_equal(weight, module.constant(layer.weight).numpy())
    return mapped, total


def _stored(value: ir.Value | None) -> np.ndarray | None:
    """What a value is in the file, as float32, through Identity, Cast and Transpose; None where it is computed."""
    constant = graphs.constant_behind(value)
    if constant is not None:
        return graphs.to_numpy(constant).astype(np.float32)
    node = value.producer() if value is not None else None
    if node is None or node.op_type not in ("Identity", "Cast", "Transpose"):
        return None
    stored = _stored(node.inputs[0])
    return stored.transpose(graphs.ints(node, "perm")) if stored is not None and node.op_type == "Transpose" else stored
