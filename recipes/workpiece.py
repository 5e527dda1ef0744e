"""What every recipe that writes a smaller model does before and after: one beginning, one proof, one ending."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from converters import writeback
from converters.classifier import Classifier
from converters.conversion import is_rounding, to_torch
from converters.edits import Edit, apply_edits
from converters.outputs import ensure_writable
from converters.runtime import fits_protobuf
from converters.steps import Quantized
from converters.torch_module import TorchClassifier
from recipes.account import Compression, LayerAccount, share_of_zeros
from recipes.checkpoint import Checkpoint
from recipes.images import ImageSet, named_in_errors
from recipes.memory import keep_freed_memory
from recipes.reconstruct import Reconstruction

WRITTEN_TOLERANCE = 1e-4
"""Largest relative difference between a written file in onnxruntime and the changed model in torch."""
PROOF_BATCH = 4  # images at once where the file takes any number


def begin(prepared: Classifier, output: Path, device: torch.device | None, *, overwrite: bool) -> TorchClassifier:
    """The module to change, once it is sure that `output` can be written. Raises MixMixError where it cannot."""
    ensure_writable(output, overwrite=overwrite)
    if not fits_protobuf(prepared.original):
        writeback.ensure_data_writable(output, overwrite=overwrite)
    module = to_torch(prepared).to(device or torch.device("cpu"))
    if module.device.type == "cpu":
        keep_freed_memory()
    else:  # convolutions in TF32 have 10 bits of mantissa: no proof against onnxruntime holds with them
        torch.backends.cudnn.allow_tf32 = False
    return module


def model_inputs(module: TorchClassifier, images: ImageSet) -> Tensor:
    """The images as the model takes them [N, ...], on its device, in the memory order that convolutions are fast in."""
    with named_in_errors(images):
        inputs = torch.cat([_stored(module, part) for part in images.pixels.split(64)])
    return inputs.contiguous(memory_format=torch.channels_last).to(module.device)


def to_inputs(module: TorchClassifier, pixels: Tensor) -> Tensor:
    """A batch of pixels [n, C, H, W] as the model takes it, on its device."""
    return _stored(module, pixels).contiguous(memory_format=torch.channels_last).to(module.device)


def _stored(module: TorchClassifier, pixels: Tensor) -> Tensor:
    return module.classifier.as_stored(module.spec.to_input(pixels))


def sample_for_proof(prepared: Classifier, inputs: Tensor) -> Tensor:
    """The first inputs, two batches of what the file takes."""
    return inputs[: 2 * (prepared.fixed_batch or PROOF_BATCH)]


@dataclass(frozen=True)
class Result:
    """A smaller model that is not written yet, and the account of it."""

    prepared: Classifier
    """The graph that `edits` are made in."""
    edits: Sequence[Edit]
    sample: Tensor
    logits: Tensor
    """What the file has to give on `sample`: those of the changed model in torch."""
    blocks: list[tuple[str, Reconstruction]]
    layers: list[LayerAccount]
    bits: int | None = None
    act_bits: int | None = None
    tolerance: float = WRITTEN_TOLERANCE
    quantized: Quantized | None = None
    """The activations that are quantized, which the file has to give where its logits differ by more."""
    macs_left: float = 1.0
    """Share of the multiplications that the file still makes."""
    checkpoint: Checkpoint | None = None
    """Removed when the file is written."""

    @property
    def sparsity(self) -> float:
        """Share of the weights of all layers that are zero or gone."""
        return share_of_zeros(self.layers)

    def classifier(self) -> Classifier:
        """The smaller model, to go on with before anything is written."""
        return writeback.edited_classifier(self.prepared, self.edits)

    def _is_rounding(self, difference: float) -> bool:
        """Judged by the model before its change: both make as much of the last digits."""
        return is_rounding(difference, to_torch(self.prepared, check=False), self.sample.cpu().contiguous())

    def write(
        self, source: Classifier, output: Path, facts: Mapping[str, str], started: float, *, overwrite: bool
    ) -> Compression:
        """Write it to `output` as what became of `source`, with `facts` for its metadata, once it is proved.

        `started` is when work on it began, by `time.perf_counter`.
        """
        model = apply_edits(self.prepared.original, self.edits)
        proof = writeback.Proof(
            inputs=self.sample.cpu().contiguous().numpy(),
            logits=self.logits.cpu().numpy(),
            batch=self.prepared.fixed_batch or PROOF_BATCH,
            tolerance=self.tolerance,
            quantized=self.quantized,
            is_rounding=self._is_rounding,
        )
        metadata = {**source.spec.to_metadata(), **facts}
        size, difference = writeback.save_proved(model, output, metadata, proof, overwrite=overwrite)
        if self.checkpoint is not None:
            self.checkpoint.remove()
        return Compression(
            input=source.path,
            output=output,
            spec=source.spec,
            bits=self.bits,
            act_bits=self.act_bits,
            sparsity=self.sparsity,
            blocks=self.blocks,
            layers=self.layers,
            size_before=source.size_bytes,
            size_after=size,
            seconds=time.perf_counter() - started,
            written_difference=difference,
            macs_left=self.macs_left,
        )
