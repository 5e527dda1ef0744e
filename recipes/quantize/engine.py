"""From a classifier and images to a quantized ONNX file.

The way: images -> model inputs -> placement of bits -> block by block: float input and output, input through the
blocks quantized so far, reconstruction, hard rounding -> edits -> a copy of the original graph -> onnxruntime.
Because a block has one output, and mostly one input, two tensors are nearly all that is kept between blocks.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor

import converters.writeback as writeback
from converters.classifier import Classifier
from converters.conversion import FLIP_TOLERANCE
from converters.kernels import Forecast, Fusion, clipped_to, count_fusion, forecast
from converters.targets import PORTABLE, Target
from converters.torch_module import Layer, Segment, TorchClassifier
from converters.units import Rescaled, to_metadata
from recipes.account import Compression
from recipes.budget import Budget, Spending
from recipes.checkpoint import Checkpoint, State
from recipes.devices import choose_precision
from recipes.images import ImageSet
from recipes.least_squares import compensate, settled_layers
from recipes.memory import rows_like
from recipes.objective import Objective
from recipes.progress import Progress, Silent, Task
from recipes.quantize.activations import place_activations
from recipes.quantize.asked import check_bits, least_bits, what_was_asked
from recipes.quantize.equalise import FEW_BITS, equalise
from recipes.quantize.mixed import plan_mixed
from recipes.quantize.plan import Advance, LayerPlan, Noise, plan_bits, plan_values, quantized_weight
from recipes.quantize.primitives import spread
from recipes.quantize.quantizers import QuantizedActivation, QuantizedWeight
from recipes.quantize.settings import QuantizeSettings
from recipes.quantize.tables import Quantizers, file_size
from recipes.quantize.train import train_quantized
from recipes.ranks import ALONE, Ranks
from recipes.reconstruct import (
    DropMasks,
    FrozenValue,
    LearnedTensor,
    Loop,
    Reconstruction,
    Stretch,
    batches,
    block_error,
    learned_biases,
    reconstruct,
    rows_of,
    run_batched,
    walk_blocks,
)
from recipes.resumable import Walk
from recipes.slopes import Slopes
from recipes.workpiece import WRITTEN_TOLERANCE, Result, begin, model_inputs, sample_for_proof

ACTIVATION_SAMPLE = 1 << 20  # elements that an activation's range is searched on


def quantize(
    classifier: Classifier,
    images: ImageSet,
    output: Path,
    settings: QuantizeSettings,
    bits: int | Budget,
    act_bits: int | None = None,
    target: Target = PORTABLE,
    *,
    seed: int = 0,
    device: torch.device | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    provenance: Mapping[str, str] | None = None,
    ranks: Ranks = ALONE,
) -> Compression:
    """Quantize `classifier` on `images` and write it to `output`.

    Of several `ranks`, the first reconstructs and writes, and all train. Raises MixMixError for bits, images or an
    output that cannot be used, before any long work starts.
    """
    started = time.perf_counter()
    progress = progress or Silent()
    check_bits(bits, act_bits)
    prepared = writeback.prepare_for_quantization(classifier, target, least_bits(bits), act_bits)
    module = begin(prepared, output, device, overwrite=overwrite)
    units: list[Rescaled] = []
    if settings.equalise and act_bits is not None and act_bits <= FEW_BITS:
        edits, units = ranks.lead(lambda: equalise(module, model_inputs(module, images), settings))
        if edits:
            prepared = writeback.edited_classifier(prepared, edits)
            module = begin(prepared, output, device, overwrite=overwrite)
    asked = what_was_asked(settings, bits, act_bits, target, len(images), seed)
    said = {**asked, **to_metadata(units), **(provenance or {})}
    metadata = {**classifier.spec.to_metadata(), **said}
    facts = {"settings": settings.model_dump(), "bits": bits, "act_bits": act_bits, "target": target, "seed": seed}
    if isinstance(bits, Budget) and bits.kind == "size":
        facts["metadata"] = metadata  # which counts in the file's size
    checkpoint = Checkpoint(output, "quantize", (module,), images, facts, progress.say)
    run = _Run(module, images, settings, bits, act_bits, target, seed, checkpoint, metadata, ranks, progress)
    run.place()
    run.reconstruct_all()
    run.train()
    sample = sample_for_proof(prepared, run.inputs)
    logits = run.fake_quantized(sample)
    result = Result(
        prepared=prepared,
        edits=run.quantizers.edits(),
        sample=sample,
        logits=logits,
        quantized=run.quantizers.quantized(),
        blocks=run.walk.account,
        layers=run.quantizers.layer_accounts(),
        bits=None if isinstance(bits, Budget) else bits,
        act_bits=act_bits,
        tolerance=WRITTEN_TOLERANCE if act_bits is None else FLIP_TOLERANCE,
        checkpoint=checkpoint,
    )

    def write() -> Compression:
        written = result.write(classifier, output, said, started, overwrite=overwrite)
        return replace(written, fusion=run.fusion(output), target=target.name, spending=run.spent(written.size_after))

    return ranks.lead(write)


@dataclass(frozen=True)
class _Unit:
    """What is reconstructed at once: a stretch from one value to another with its layers."""

    name: str
    segment: Segment
    layers: tuple[Layer, ...]
    values: tuple[str, ...]
    """Values quantized within it, its input among them, whose steps are learned."""
    frozen: tuple[str, ...] = ()
    """Values whose steps an earlier unit has learned: its weights and biases are rounded by them."""


class _Run:
    """One quantization in progress: the changes made so far, by initializer and value name."""

    def __init__(
        self,
        module: TorchClassifier,
        images: ImageSet,
        settings: QuantizeSettings,
        bits: int | Budget,
        act_bits: int | None,
        target: Target,
        seed: int,
        checkpoint: Checkpoint,
        metadata: Mapping[str, str],
        ranks: Ranks,
        progress: Progress,
    ) -> None:
        self.module, self.settings, self.bits, self.act_bits = module, settings, bits, act_bits
        self.target, self.metadata, self.ranks, self.progress = target, metadata, ranks, progress
        self.generator = torch.Generator().manual_seed(seed)
        self.images, self.inputs = images, model_inputs(module, images)
        self.quantizers = Quantizers(module, target, learned_biases(module, settings.bias_rate))
        self.settled = settled_layers(module, settings) if settings.compensate else set()
        """Outputs of the layers that are rounded with compensation."""
        self.bounds = clipped_to(module)
        """What clipped values are within: a step that reaches further would represent what never occurs."""
        self.widths: dict[str, int] = {}
        """Bits of every value that is quantized, in order."""
        self.forecast: Forecast | None = None
        """Of what onnxruntime will run in integers, where activations are quantized for this machine."""
        self.spending: Spending | None = None
        """Of the budget, where there is one."""
        self.walk = Walk(checkpoint, self.quantizers.tables, self.generator, self._complete)
        self.slopes = Slopes(module, settings, progress)
        self._found: State | None = None
        self._learned: set[str] = set()
        """Values whose steps are learned in a unit that has been asked for."""

    def place(self) -> None:
        self.quantizers.plans = self.ranks.lead(self._plan)
        self.widths = plan_values(self.module, self.quantizers.plans, self.act_bits, self.target)
        for plan in self.quantizers.plans:
            layer = plan.layer
            weight = self.module.constant(layer.weight)
            self.quantizers.weights[layer.weight] = quantized_weight(
                weight, layer, plan.bits, plan.act_bits, self.target, self.settings
            )
        if self.settings.group_size:
            grouped = sum(weight.granularity.size > 0 for weight in self.quantizers.weights.values())
            self.progress.say(
                f"groups of {self.settings.group_size} inputs share a scale in {grouped} of"
                f" {len(self.quantizers.weights)} weights (those of up to 4 bits with more inputs than that, beside"
                " float activations)"
            )
        counts = Counter(plan.bits for plan in self.quantizers.plans)
        self.progress.say(f"layers by bits: {', '.join(f'{counts[bits]} at {bits}' for bits in sorted(counts))}")
        if self.act_bits is not None and not self.target.elsewhere:
            stored = {plan.layer.output: self.target.weight_container(plan.bits).bits for plan in self.quantizers.plans}
            self.forecast = forecast(self.module, self.widths, stored, biases=self.target.integer_kernels)
            self.progress.say(str(self.forecast))

    def _plan(self) -> list[LayerPlan]:
        def keep(name: str, count: int, measure: Callable[[Advance], Noise]) -> Noise:
            def measured() -> Noise:
                with self.progress.task(f"measuring what each {name} does", count) as task:
                    return measure(task.advance)

            return self.walk.checkpoint.measured(name, measured)

        common = (self.act_bits, self.target, self.settings)
        of_layers, of_inputs = partial(keep, "layer"), partial(keep, "input")
        if not isinstance(self.bits, Budget):
            plans = plan_bits(self.module, self.inputs, self.bits, *common, of_layers)
        else:
            size = partial(
                file_size,
                self.module,
                act_bits=self.act_bits,
                target=self.target,
                settings=self.settings,
                metadata=self.metadata,
            )
            ask = (self.module, self.inputs, self.bits, *common, size, of_layers, of_inputs)
            plans, self.spending = plan_mixed(*ask)
            if self.bits.kind == "bops":  # which counts the bits of inputs, and has chosen them
                return plans
        return place_activations(self.module, self.inputs, plans, *common, of_inputs)

    def reconstruct_all(self) -> None:
        """Settle every change, in the first process for all of them: on a GPU, no two would come to the same."""
        if self.ranks.leads:
            self._go_through_blocks()
        if self.ranks.count > 1:
            self._found, state = self.ranks.share((self._found, self.walk.state().cpu()))
            if not self.ranks.leads:
                self.walk.restore(state)

    def _go_through_blocks(self) -> None:
        """Go through the blocks that an interrupted run has not done; afterwards every change is hard."""
        settings, steps = self.settings, self.settings.steps
        self._found = self.walk.resume(self.progress)
        total = len(self.quantizers.plans) * max(steps, 1)
        with self.walk.kept(), self.progress.task("reconstructing", total) as task:
            stretches = walk_blocks(self.module, self.inputs, self.quantizers.changes, settings)

            def passed(stretch: Stretch) -> None:
                self._units(stretch)
                task.advance(len(stretch.block.layers) * max(steps, 1))

            for stretch in self.walk.through(stretches, passed):
                units = self._units(stretch)
                self._calibrate(stretch)
                for unit in units:
                    share = len(stretch.block.layers) / len(units)
                    self._reconstruct(unit, stretch, steps, share, task)

    def _complete(self, found: State) -> None:
        """Quantizers of the values that an interrupted run has calibrated."""
        for name, bits in self.widths.items():
            if f"values|scale|{name}" in found.tensors:
                self.quantizers.values[name] = self._activation(name, torch.zeros(1, device=self.module.device), bits)

    def train(self) -> None:
        """Train all changes together, where the settings ask for it."""
        steps = self.settings.train_steps
        if not steps:
            return
        found = self._found if self._found is not None and "step" in self._found.numbers else None
        with self.progress.task("training the whole network", steps) as task:
            train_quantized(
                self.module,
                self.images,
                self.quantizers,
                self.settings,
                self.generator,
                task,
                self.walk.checkpoint,
                found,
                self.walk.state(),
                self.ranks,
            )
        self.quantizers.snap_biases(self.module.layers())
        self._measure_again()

    def _measure_again(self) -> None:
        """Errors of the blocks as training has left them; by block, whatever the units were."""
        before = dict(self.walk.account)
        account = []
        for stretch in walk_blocks(self.module, self.inputs, self.quantizers.changes, self.settings):
            found, how = stretch.segment, self.quantizers.changes.of(stretch.segment)
            outputs = batches(found, stretch.changed_inputs, self.settings.batch, **how)
            error = Objective(stretch.target).error(outputs, self.settings.batch).output
            name = stretch.block.name
            if not stretch.block.layers and name not in before:
                continue
            account.append((name, Reconstruction(before[name].before if name in before else math.nan, error)))
        self.walk.account = account

    def _units(self, stretch: Stretch) -> list[_Unit]:
        """The block itself, or one unit a layer where each can stand alone; to be asked of every block once, in order.

        A value is learned in the first unit that has it, and stays so.
        """
        block = stretch.block
        quantized = self._quantized_values(stretch)
        if self.settings.unit != "layer" or not self._alone.issuperset(layer.output for layer in block.layers):
            learned, frozen = (
                tuple(name for name in quantized if (name in self._learned) == before) for before in (False, True)
            )
            self._learned.update(learned)
            unit = _Unit(block.name, stretch.segment, block.layers, learned, frozen)
            return [unit] if block.layers or learned else []
        units = []
        for layer in block.layers:
            values = (layer.input,) if layer.input in quantized else ()
            learned, frozen = (values, ()) if layer.input not in self._learned else ((), values)
            units.append(
                _Unit(layer.name, self.module.segment([layer.input], [layer.output]), (layer,), learned, frozen)
            )
            self._learned.update(learned)
        return units

    @cached_property
    def _alone(self) -> set[str]:
        """Outputs of the layers that read and write a row for each image, and not windows or tokens of all images."""
        layers = self.module.layers()
        return {layer.output for layer in layers if self.module.with_rows.issuperset((layer.input, layer.output))}

    def _quantized_values(self, stretch: Stretch) -> dict[str, int]:
        """Values to quantize in the block and their bits, in order; its output is of the blocks that read it."""
        inside = {*stretch.block.inputs} | {name for step in stretch.segment.steps for name in step.outputs}
        inside.discard(stretch.block.output)
        return {name: bits for name, bits in self.widths.items() if name in inside}

    def _calibrate(self, stretch: Stretch) -> None:
        """Search the ranges of the block's activations, in order, on its inputs as the blocks before leave them.

        Each is computed from those before it that it hangs on, which are kept for so long: a block may have many.
        What a block before has read has its range.
        """
        inputs, count = stretch.block.inputs, rows_of(stretch.changed_inputs)
        quantized = {
            name: bits for name, bits in self._quantized_values(stretch).items() if name not in self.quantizers.values
        }
        names = [*inputs, *(name for name in quantized if name not in inputs)]
        after = self._between(names, len(inputs))
        needed_last = {name: name for name in quantized}
        needed_last |= {name: reader for reader in quantized if reader in after for name in after[reader].inputs}
        spans = [(names.index(name), names.index(needed_last.get(name, name))) for name in names]
        at_once = max(sum(first <= index <= last for first, last in spans) for index in range(len(names)))
        known = {name: list(x.split(self.settings.batch)) for name, x in stretch.changed_inputs.items()}
        for name, bits in quantized.items():
            if name in after:
                known[name] = self._parts(after[name], known, self.settings.cache_limit / at_once)
            parts = enumerate(known[name])
            batch = self.settings.batch
            sample = torch.cat([spread(part, count, ACTIVATION_SAMPLE, index * batch) for index, part in parts])
            self.quantizers.values[name] = self._activation(name, sample.to(self.module.device), bits)
            for done in [other for other in known if needed_last.get(other, name) == name]:
                del known[done]

    def _between(self, names: Sequence[str], given: int) -> dict[str, Segment]:
        """For every value but the first `given`, how it is computed from those before it that it hangs on."""
        found = {}
        for index, name in enumerate(names[given:], given):
            steps = self.module.segment(names[:index], [name]).steps
            read = {operand for step in steps for operand in step.inputs}
            found[name] = self.module.segment([other for other in names[:index] if other in read], [name])
        return found

    @torch.no_grad()
    def _parts(self, segment: Segment, known: Mapping[str, Sequence[Tensor]], limit: float) -> list[Tensor]:
        """The segment's only output, batch by batch; on disk where it takes more than `limit` gigabytes as a whole."""
        found, how = [], self.quantizers.changes.of(segment)
        limit /= len(known[segment.inputs[0]])
        for parts in zip(*(known[name] for name in segment.inputs), strict=True):
            given = {name: part.to(self.module.device) for name, part in zip(segment.inputs, parts, strict=True)}
            part = segment(given, **how)[segment.outputs[0]]
            found.append(rows_like(part, len(part), limit).copy_(part))
        return found

    def _activation(self, name: str, sample: Tensor, bits: int) -> QuantizedActivation:
        """A quantizer for a value, its range searched on `sample`."""
        bounds = self.bounds.get(name, (-math.inf, math.inf))
        return QuantizedActivation(sample, bits, self.settings, self.target.symmetric_activations, bounds)

    def _reconstruct(self, unit: _Unit, stretch: Stretch, steps: int, share: float, task: Task) -> None:
        """Settle one unit, which counts as `share` layers of progress."""
        settings, batch = self.settings, self.settings.batch
        start = unit.segment.inputs[0]
        if unit.segment is stretch.segment:
            float_inputs, changed_inputs = stretch.float_inputs, stretch.changed_inputs
            objective = self.slopes.objective(stretch, steps)
        else:
            before = self.module.segment(stretch.block.inputs, [start])
            limit = settings.cache_limit
            float_inputs = {start: run_batched(before, stretch.float_inputs, batch, limit)}
            inside = {name: value for name, value in self.quantizers.values.items() if name != start}
            parameters = self.quantizers.changes.of(before)["parameters"]
            changed = run_batched(
                before, stretch.changed_inputs, batch, limit, parameters=parameters, transforms=inside
            )
            changed_inputs = {start: changed}
            objective = Objective(run_batched(unit.segment, float_inputs, batch, limit))
        weights: dict[str, QuantizedWeight | LearnedTensor] = {}
        for layer in unit.layers:
            weights[layer.weight] = self.quantizers.weights[layer.weight]
            if layer.bias is not None:
                weights[layer.bias] = self.quantizers.biases[layer.bias]
        values = {name: self.quantizers.values[name] for name in unit.values}
        transforms = values | {name: FrozenValue(self.quantizers.values[name]) for name in unit.frozen}
        nearest = plain = block_error(unit.segment, changed_inputs, objective, weights, transforms, batch)
        if self.settled:
            for layer in unit.layers:
                if layer.output in self.settled:
                    chosen, bias = self.quantizers.weights[layer.weight], self.quantizers.bias(layer)
                    compensate(self.module, layer, stretch, self.quantizers.changes, settings, chosen, bias)
            plain = block_error(unit.segment, changed_inputs, objective, weights, transforms, batch)
        if steps:
            for weight in weights.values():
                if isinstance(weight, QuantizedWeight):
                    weight.learn()
            for value in values.values():
                value.drop = DropMasks(settings.activation_drop, self.generator) if settings.activation_drop else None
        reconstruct(
            unit.segment,
            float_inputs,
            changed_inputs,
            objective,
            weights,
            transforms,
            Loop(
                steps,
                settings.minibatch(changed_inputs.values()),
                settings.input_drop,
                precision=choose_precision(settings.precision, unit.layers, self.module.device),
            ),
            plain,
            self.generator,
            lambda done, loss: task.advance(
                share * done, None if math.isnan(loss) else f"{unit.name}: loss {loss:.3f}"
            ),
        )
        if not steps:
            task.advance(share)
        for layer in unit.layers:
            self.quantizers.weights[layer.weight].harden()
        for value in values.values():
            value.harden()
        self.quantizers.snap_biases(unit.layers)
        after = block_error(unit.segment, changed_inputs, objective.of_output, weights, transforms, batch)
        self.walk.account.append((unit.name, Reconstruction(nearest.output, after.output)))

    def spent(self, size: int) -> Spending | None:
        """What the budget was spent on, now that the file is there and has `size` bytes."""
        if self.spending is None or self.spending.budget.kind != "size":
            return self.spending
        return replace(self.spending, spent=size)

    def fake_quantized(self, inputs: Tensor) -> Tensor:
        """Logits of the quantized model in torch."""
        whole = self.module.whole
        given = {self.module.input_name: inputs}
        return run_batched(whole, given, self.settings.batch, **self.quantizers.changes.of(whole))

    def fusion(self, path: Path) -> Fusion | None:
        """What the written file runs in integers, where that was forecast."""
        return None if self.forecast is None else count_fusion(path, self.forecast)
