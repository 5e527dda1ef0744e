"""From torch modules to files: the legacy exporter with BatchNorm kept or folded, and the default one, which folds."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

import torch
from torch import nn
from torch.onnx import TrainingMode

from converters.errors import MixMixError
from converters.files import read_model
from converters.input_spec import InputSpec
from converters.writeback import TEMPORARY, ensure_writable, save


def write_kept(module: nn.Module, example: torch.Tensor, path: Path, spec: InputSpec) -> None:
    """Export with BatchNorm kept, any batch, and write it with its input spec once onnxruntime has loaded it.

    `example` is a batch of inputs. Raises MixMixError where the exporter fails or the file cannot be written.
    """
    ensure_writable(path, overwrite=True)
    with tempfile.TemporaryDirectory(prefix=TEMPORARY) as folder:
        exported = Path(folder) / path.name
        try:
            export_kept(module, example, exported)
        except Exception as error:  # whatever an exporter runs into
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise MixMixError(f"{path.stem} could not be exported ({reason}): please report it") from error
        save(read_model(exported).model, path, spec.to_metadata(), overwrite=True)


def export_kept(model: nn.Module, example: torch.Tensor, path: Path, opset: int = 17) -> None:
    """Legacy exporter, nothing folded, any batch."""
    _export_legacy(model, example, path, opset, keep=True)


def export_legacy(model: nn.Module, example: torch.Tensor, path: Path, opset: int = 17) -> None:
    """Legacy exporter as it is used most: BatchNorm and constants folded, any batch."""
    _export_legacy(model, example, path, opset, keep=False)


def _export_legacy(model: nn.Module, example: torch.Tensor, path: Path, opset: int, *, keep: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            (example,),
            path,
            dynamo=False,
            opset_version=opset,
            training=TrainingMode.PRESERVE if keep else TrainingMode.EVAL,
            do_constant_folding=not keep,
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
