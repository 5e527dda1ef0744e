"""What every recipe that writes a smaller model does before and after: one beginning, one proof."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from converters import writeback
from converters.classifier import Classifier
from converters.runtime import fits_protobuf
from converters.torch_module import TorchClassifier, to_torch
from recipes.images import ImageSet
from recipes.memory import keep_freed_memory

WRITTEN_TOLERANCE = 1e-4
"""Largest relative difference between a written file in onnxruntime and the changed model in torch."""


def begin(prepared: Classifier, output: Path, device: torch.device | None, *, overwrite: bool) -> TorchClassifier:
    """The module to change, once it is sure that `output` can be written. Raises MixMixError where it cannot."""
    writeback.ensure_writable(output, overwrite=overwrite)
    if not fits_protobuf(prepared.original):
        writeback.ensure_writable(writeback.data_beside(output), overwrite=overwrite)
    module = to_torch(prepared).to(device or torch.device("cpu"))
    if module.device.type == "cpu":
        keep_freed_memory()
    return module


def model_inputs(module: TorchClassifier, images: ImageSet) -> Tensor:
    """The images as the model takes them [N, ...], on its device, in the memory order that convolutions are fast in."""
    as_stored = module.classifier.as_stored
    inputs = torch.cat([as_stored(module.spec.to_input(part)) for part in images.pixels.split(64)])
    return inputs.contiguous(memory_format=torch.channels_last).to(module.device)


def sample_for_proof(prepared: Classifier, inputs: Tensor) -> Tensor:
    """The first inputs, two batches of what the file takes."""
    return inputs[: 2 * (prepared.fixed_batch or 4)]


def proof(
    prepared: Classifier, sample: Tensor, logits: Tensor, tolerance: float = WRITTEN_TOLERANCE
) -> writeback.Proof:
    """That a file gives `logits` [N, classes] on `sample` [N, ...]."""
    return writeback.Proof(
        sample.cpu().contiguous().numpy(), logits.cpu().numpy(), prepared.fixed_batch or 4, tolerance
    )
