"""How models become files here, beside `converters.export`: folded, by the legacy and by the default exporter."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import nn


def export_legacy(model: nn.Module, example: torch.Tensor, path: Path, opset: int = 17) -> None:
    """Legacy exporter as it is used most: BatchNorm and constants folded, any batch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            (example,),
            path,
            dynamo=False,
            opset_version=opset,
            input_names=["image"],
            output_names=["logits"],
            dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}},
        )


def export_folded(model: nn.Module, example: torch.Tensor, path: Path, opset: int | None = None) -> None:
    """Default exporter: BatchNorm folded into the convolutions, any batch."""
    _export_default(model, example, path, opset, optimise=True)


def export_plain(model: nn.Module, example: torch.Tensor, path: Path, opset: int | None = None) -> None:
    """Default exporter without its optimiser: CastLike, Expand, computed Pad and all, any batch."""
    _export_default(model, example, path, opset, optimise=False)


def _export_default(model: nn.Module, example: torch.Tensor, path: Path, opset: int | None, *, optimise: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            (example,),
            path,
            dynamo=True,
            opset_version=opset,
            external_data=False,
            optimize=optimise,
            verbose=False,
            input_names=["image"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
