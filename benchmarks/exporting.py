"""The two exports that matter here: BatchNorm kept, and what the default exporter makes of a model (folded)."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import nn


def export_kept(model: nn.Module, example: torch.Tensor, path: Path) -> None:
    """Legacy exporter, opset 17, nothing folded, any batch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            (example,),
            path,
            dynamo=False,
            opset_version=17,
            training=torch.onnx.TrainingMode.PRESERVE,
            do_constant_folding=False,
            input_names=["image"],
            output_names=["logits"],
            dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}},
        )


def export_folded(model: nn.Module, example: torch.Tensor, path: Path) -> None:
    """Default exporter: BatchNorm folded into the convolutions, any batch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            (example,),
            path,
            dynamo=True,
            external_data=False,
            input_names=["image"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
