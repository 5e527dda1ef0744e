"""Networks as torch's two exporters write them, of RGB images of 16 x 16 pixels and any number of them."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import nn

from converters.classifier import Classifier
from converters.load import load_classifier


def export(module: nn.Module, path: Path, *, dynamo: bool, opset: int | None = None) -> Classifier:
    """The network, in evaluation, written to `path` and loaded."""
    names = {"input_names": ["image"], "output_names": ["logits"], "opset_version": opset}
    image = torch.rand(2, 3, 16, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if dynamo:
            shapes = ({0: torch.export.Dim("batch")},)
            torch.onnx.export(module, (image,), path, dynamic_shapes=shapes, verbose=False, **names)
        else:
            axes = {"image": {0: "batch"}, "logits": {0: "batch"}}
            torch.onnx.export(module, (image,), path, dynamo=False, dynamic_axes=axes, **names)
    return load_classifier(path)
