"""From torch modules to files that keep their BatchNorm."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from torch.onnx import TrainingMode

from converters.errors import MixMixError
from converters.files import read_model
from converters.input_spec import InputSpec
from converters.outputs import TEMPORARY, ensure_writable
from converters.writeback import save


def write_kept(
    module: nn.Module, example: torch.Tensor, path: Path, spec: InputSpec, facts: Mapping[str, str] | None = None
) -> None:
    """Export with BatchNorm kept, any batch; write it with input spec and `facts` once onnxruntime has loaded it.

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
        save(read_model(exported).model, path, spec.to_metadata() | dict(facts or {}), overwrite=True)


def export_kept(module: nn.Module, example: torch.Tensor, path: Path, opset: int = 17) -> None:
    """Legacy exporter, nothing folded, any batch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            (example,),
            path,
            dynamo=False,
            opset_version=opset,
            training=TrainingMode.PRESERVE,
            do_constant_folding=False,
            input_names=["image"],
            output_names=["logits"],
            dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}},
        )
