"""From a classifier and images to a quantized ONNX file.

The way: images -> model inputs -> placement of bits -> block by block: float input and output, input through the
blocks quantized so far, reconstruction, hard rounding -> edits -> a copy of the original graph -> onnxruntime.
Because a block has one input value and one output value, two tensors are all that is kept between blocks.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import converters.writeback as writeback
from converters.classifier import Classifier
from converters.errors import MixMixError
from converters.targets import MAX_BITS, MIN_BITS
from converters.torch_module import Layer, Segment, TorchClassifier
from recipes.account import Compression, LayerAccount, account_layer
from recipes.blocks import Block
from recipes.images import ImageSet
from recipes.progress import Progress, Silent, Task
from recipes.quantize.compensate import moments
from recipes.quantize.plan import LayerPlan, plan_bits
from recipes.quantize.quantizers import QuantizedActivation, QuantizedWeight
from recipes.quantize.settings import QuantizeSettings
from recipes.reconstruct import (
    Changes,
    DropMasks,
    LearnedTensor,
    Loop,
    Reconstruction,
    Stretch,
    block_error,
    reconstruct,
    run_batched,
    walk_blocks,
)
from recipes.workpiece import WRITTEN_TOLERANCE, Result, begin, model_inputs, sample_for_proof

ACTIVATION_SAMPLE = 1 << 20  # elements that an activation's range is searched on
FLIP_TOLERANCE = 0.05
"""Largest relative difference of the written file where activations are quantized: float noise may move a value over a
rounding boundary by a whole step."""


def check_bits(bits: int, act_bits: int | None) -> None:
    """Raise MixMixError for widths that cannot be written."""
    if not MIN_BITS <= bits <= MAX_BITS:
        raise MixMixError(f"--bits {bits} cannot be used: choose {MIN_BITS} to {MAX_BITS} bits for weights")
    if act_bits is not None and not 2 <= act_bits <= MAX_BITS:
        raise MixMixError(f"--act-bits {act_bits} cannot be used: choose 2 to {MAX_BITS} bits for activations")


def output_path(model: Path, bits: int, act_bits: int | None) -> Path:
    """`model.w4.onnx`, or `model.w4a8.onnx` with activation bits, beside the input."""
    return model.with_suffix(f".w{bits}{'' if act_bits is None else f'a{act_bits}'}.onnx")


def quantize(
    classifier: Classifier,
    images: ImageSet,
    output: Path,
    settings: QuantizeSettings,
    bits: int,
    act_bits: int | None = None,
    *,
    seed: int = 0,
    device: torch.device | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    provenance: Mapping[str, str] | None = None,
) -> Compression:
    """Quantize `classifier` on `images` and write it to `output`.

    Raises MixMixError for bits, images or an output that cannot be used, before any long work starts.
    """
    started = time.perf_counter()
    progress = progress or Silent()
    check_bits(bits, act_bits)
    prepared = writeback.prepare_for_quantization(classifier, four_bit=bits <= 4)
    module = begin(prepared, output, device, overwrite=overwrite)
    run = _Run(module, images, settings, bits, act_bits, seed)
    run.place(progress)
    run.reconstruct_all(progress)
    sample = sample_for_proof(prepared, run.inputs)
    result = Result(
        prepared=prepared,
        edits=run.edits(),
        sample=sample,
        logits=run.fake_quantized(sample),
        blocks=run.account,
        layers=run.layer_accounts(),
        bits=bits,
        act_bits=act_bits,
        tolerance=WRITTEN_TOLERANCE if act_bits is None else FLIP_TOLERANCE,
    )
    asked = {"bits": bits, "act_bits": act_bits, "images": len(images), "seed": seed}
    facts = {"mixmix.quantize": json.dumps(asked), **(provenance or {})}
    return result.write(classifier, output, facts, started, overwrite=overwrite)


@dataclass(frozen=True)
class _Unit:
    """What is reconstructed at once: a stretch from one value to another with its layers."""

    name: str
    segment: Segment
    layers: tuple[Layer, ...]
    values: tuple[str, ...]
    """Values quantized within it, its input among them."""


class _Run:
    """One quantization in progress: the changes made so far, by initializer and value name."""

    def __init__(
        self,
        module: TorchClassifier,
        images: ImageSet,
        settings: QuantizeSettings,
        bits: int,
        act_bits: int | None,
        seed: int,
    ) -> None:
        self.module, self.settings, self.bits, self.act_bits = module, settings, bits, act_bits
        self.generator = torch.Generator().manual_seed(seed)
        self.inputs = model_inputs(module, images)
        self.weights: dict[str, QuantizedWeight] = {}
        self.biases: dict[str, LearnedTensor] = {}
        self.values: dict[str, QuantizedActivation] = {}
        self.changes = Changes((self.weights, self.biases), self.values)
        self.plans: list[LayerPlan] = []
        self.account: list[tuple[str, Reconstruction]] = []
        self.undecided: dict[str, float] = {}

    def place(self, progress: Progress) -> None:
        with progress.task("finding the layers that hurt most", len(self.module.layers())) as task:
            self.plans = plan_bits(
                self.module, self.inputs, self.bits, self.act_bits, self.settings, lambda: task.advance()
            )
        for plan in self.plans:
            layer = plan.layer
            self.weights[layer.weight] = QuantizedWeight(
                self.module.constant(layer.weight), layer.axis, plan.bits, self.settings
            )
        hurting = sorted(
            (plan.snr, plan.layer.name) for plan in self.plans if plan.snr is not None and plan.kept(self.bits)
        )
        if hurting:
            worst = ", ".join(f"{name} ({snr:.1f} dB)" for snr, name in hurting[:3])
            progress.say(
                f"{len(hurting)} layers that hurt most are kept at {self.settings.sensitive_bits} bits, first {worst}"
            )

    def reconstruct_all(self, progress: Progress) -> None:
        """Go through the blocks; afterwards every change is hard."""
        steps = self.settings.steps if self.settings.unit != "none" else 0
        with progress.task("reconstructing", len(self.plans) * max(steps, 1)) as task:
            for stretch in walk_blocks(self.module, self.inputs, self.changes, self.settings):
                self._calibrate(stretch.block, stretch.changed_input)
                units = self._units(stretch)
                share = len(stretch.block.layers) / len(units)
                for unit in units:
                    self._reconstruct(unit, stretch, steps, share, task)

    def _units(self, stretch: Stretch) -> list[_Unit]:
        """The block itself, or one unit a layer."""
        block = stretch.block
        quantized = self._quantized_values(block)
        if self.settings.unit == "layer":
            return [
                _Unit(
                    layer.name,
                    self.module.segment([layer.input], [layer.output]),
                    (layer,),
                    (layer.input,) if layer.input in quantized else (),
                )
                for layer in block.layers
            ]
        return [_Unit(block.name, stretch.segment, block.layers, tuple(quantized))]

    def _quantized_values(self, block: Block) -> dict[str, int]:
        """Values to quantize in the block and their bits: the inputs of its layers, the widest where layers share."""
        inside = {layer.output for layer in block.layers}
        found: dict[str, int] = {}
        for plan in self.plans:
            if plan.layer.output in inside and plan.act_bits is not None:
                found[plan.layer.input] = max(found.get(plan.layer.input, 0), plan.act_bits)
        return found

    def _calibrate(self, block: Block, changed_stream: Tensor) -> None:
        """Search the ranges of the block's activations, in order, on its input as the blocks before leave it."""
        for name, bits in self._quantized_values(block).items():
            if name == block.input:
                sample = changed_stream
            else:
                before = self.module.segment([block.input], [name])
                sample = run_batched(before, changed_stream, self.settings.batch, **self.changes.of(before))
            stride = max(1, sample.numel() // ACTIVATION_SAMPLE)
            if stride > 1:
                stride |= 1  # odd, so that it does not run along one column of an image
            self.values[name] = QuantizedActivation(sample.flatten()[::stride], bits, self.settings)

    def _reconstruct(self, unit: _Unit, stretch: Stretch, steps: int, share: float, task: Task) -> None:
        """Settle one unit, which counts as `share` layers of progress."""
        settings, batch = self.settings, self.settings.batch
        start = unit.segment.inputs[0]
        if unit.segment is stretch.segment:
            float_input, changed_input, target = stretch.float_input, stretch.changed_input, stretch.target
        else:
            before = self.module.segment([stretch.block.input], [start])
            float_input = run_batched(before, stretch.float_input, batch)
            transforms = {name: value for name, value in self.values.items() if name != start}
            changes = self.changes.of(before) | {"transforms": transforms}
            changed_input = run_batched(before, stretch.changed_input, batch, **changes)
            target = run_batched(unit.segment, float_input, batch)
        weights: dict[str, QuantizedWeight | LearnedTensor] = {}
        for layer in unit.layers:
            weights[layer.weight] = self.weights[layer.weight]
            if layer.bias is not None:
                self.biases[layer.bias] = LearnedTensor.bias(self.module.constant(layer.bias), settings.bias_rate)
                weights[layer.bias] = self.biases[layer.bias]
        values = {name: self.values[name] for name in unit.values}
        nearest = error = block_error(unit.segment, changed_input, target, weights, values, batch)
        if settings.compensate:
            for layer in unit.layers:
                self._compensate(layer, stretch)
            error = block_error(unit.segment, changed_input, target, weights, values, batch)
        if steps:
            for weight in weights.values():
                if isinstance(weight, QuantizedWeight):
                    weight.learn()
            for value in values.values():
                value.drop = DropMasks(settings.activation_drop, self.generator) if settings.activation_drop else None
        reconstruct(
            unit.segment,
            float_input,
            changed_input,
            target,
            weights,
            values,
            Loop(steps, settings.minibatch(changed_input), settings.input_drop),
            error,
            self.generator,
            lambda done, loss: task.advance(
                share * done, None if math.isnan(loss) else f"{unit.name}: loss {loss:.3f}"
            ),
        )
        if not steps:
            task.advance(share)
        for layer in unit.layers:
            self.undecided[layer.weight] = self.weights[layer.weight].undecided()
            self.weights[layer.weight].harden()
        for value in values.values():
            value.harden()
        self._snap_biases(unit.layers)
        after = block_error(unit.segment, changed_input, target, weights, values, batch)
        self.account.append((unit.name, Reconstruction(nearest, after)))

    def _compensate(self, layer: Layer, stretch: Stretch) -> None:
        """Round one layer with compensation, behind the layers before it as they are now."""
        before = self.module.segment([stretch.block.input], [layer.input])
        changes, parts = self.changes.of(before), []
        for x, how in ((stretch.float_input, {}), (stretch.changed_input, changes)):
            batches = [run_batched(before, part, self.settings.batch, **how) for part in x.split(self.settings.batch)]
            places = self.settings.compensate_places
            parts.append(torch.cat([self.module.operand_vectors(layer, part, places) for part in batches], 1))
        shift = self.weights[layer.weight].compensate(moments(*parts), layer.groups)
        if layer.bias is not None:
            self.biases[layer.bias].value += shift

    def _snap_biases(self, layers: Sequence[Layer]) -> None:
        """Bring biases of fully quantized layers to whole multiples of input scale times weight scale.

        Integer kernels add the bias to products on that grid, and onnxruntime rounds it so when it fuses; at 4 bits the
        grid is coarse enough to be felt, so the simulation and the file have it too.
        """
        for layer in layers:
            if layer.bias is not None and layer.input in self.values:
                grid = self.values[layer.input].scale * self.weights[layer.weight].scale.flatten()
                bias = self.biases[layer.bias]
                bias.value = torch.round(bias.value / grid) * grid

    def fake_quantized(self, inputs: Tensor) -> Tensor:
        """Logits of the quantized model in torch."""
        return run_batched(self.module.whole, inputs, self.settings.batch, **self.changes.of(self.module.whole))

    def edits(self) -> list[writeback.Edit]:
        """What to write into the graph."""
        found: list[writeback.Edit] = []
        for plan in self.plans:
            layer, weight = plan.layer, self.weights[plan.layer.weight]
            found.append(
                writeback.WeightEdit(
                    output=layer.output,
                    values=weight.integers().cpu().numpy().astype("int32"),
                    scale=weight.current_scale().flatten().cpu().numpy(),
                    zero_point=weight.zero.flatten().cpu().numpy().astype("int32"),
                    axis=layer.axis,
                    bits=weight.bits,
                    index=layer.operand,
                )
            )
            if layer.bias in self.biases:
                bias = self.biases[layer.bias].tensor().cpu()
                if not torch.equal(bias, self.module.constant(layer.bias).cpu()):
                    found.append(writeback.TensorEdit(layer.output, writeback.BIAS, bias.numpy()))
        for name, value in self.values.items():
            found.append(writeback.ActivationEdit(name, float(value.scale), int(value.zero), value.bits))
        return found

    def layer_accounts(self) -> list[LayerAccount]:
        return [
            account_layer(
                plan.layer.name,
                self.module.constant(plan.layer.weight),
                self.weights[plan.layer.weight].tensor(),
                bits=plan.bits,
                act_bits=plan.act_bits,
                undecided=self.undecided[plan.layer.weight],
                reason=plan.reason,
            )
            for plan in self.plans
        ]
