"""From a classifier and images to a pruned ONNX file.

The way: images -> model inputs -> how much each layer gives up -> block by block: the smallest weights out, what is
left trained to answer as the float block does -> float tensors -> a copy of the original graph -> onnxruntime.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from converters import writeback
from converters.channel_cuts import Channels
from converters.channels import find_channels
from converters.classifier import Classifier
from converters.errors import MixMixError
from converters.torch_module import Layer, TorchClassifier, to_torch
from recipes.account import Compression, LayerAccount, account_layer
from recipes.checkpoint import Checkpoint
from recipes.images import ImageSet
from recipes.least_squares import settled_layers, shift_bias, stretch_moments
from recipes.patterns import CHANNEL, NofM, Pattern, Unstructured, WholeChannels, parse_n_of_m
from recipes.progress import Progress, Silent, Task
from recipes.prune import shares
from recipes.prune.channels import ChannelBudget, channel_harm, choose_channels, masks, no_harm
from recipes.prune.masks import Choose, PrunedWeight
from recipes.prune.settings import PruneSettings
from recipes.reconstruct import (
    Changes,
    LearnedTensor,
    Loop,
    Reconstruction,
    Stretch,
    block_error,
    reconstruct,
    run_batched,
    walk_blocks,
)
from recipes.resumable import Walk
from recipes.workpiece import Result, begin, model_inputs, sample_for_proof

PROVENANCE = "mixmix.prune"
"""Metadata key of a pruned file."""


@dataclass(frozen=True)
class Goal:
    """What is asked for: the pattern, and the share of all layers' weights to remove."""

    pattern: Pattern | WholeChannels
    sparsity: float
    """For whole channels: 1 less the share of the weights, or of the multiplications (`unit`), that is left."""
    unit: str = "weights"

    def to_json(self, images: ImageSet, seed: int) -> str:
        """What the file's metadata says under PROVENANCE."""
        return json.dumps(
            {
                "pattern": self.pattern.name,
                "sparsity": self.sparsity,
                "of": self.unit,
                "images": len(images),
                "seed": seed,
            }
        )


def make_goal(pattern: str, sparsity: float | None, macs: float | None = None) -> Goal:
    """The goal of `--pattern`, `--sparsity` and `--macs`. Raises MixMixError for what cannot be meant."""
    if macs is not None:
        if pattern != CHANNEL:
            raise MixMixError(
                f"--macs is a budget for whole channels, not for pattern {pattern}: use --pattern channel"
            )
        if sparsity is not None:
            raise MixMixError("--macs says how much is to be left, instead of --sparsity: leave one of them out")
        if not 0 < macs < 1:
            raise MixMixError(f"--macs {macs:g} cannot be used: choose the share to leave, above 0 and below 1")
        return Goal(WholeChannels(), 1 - macs, "macs")
    if pattern in ("unstructured", CHANNEL):
        if sparsity is None:
            other = ", or --macs, such as 0.5 of the multiplications" if pattern == CHANNEL else ""
            raise MixMixError(f"how much to remove is not said: give --sparsity, such as 0.5{other}")
        if not 0 < sparsity < 1:
            raise MixMixError(f"--sparsity {sparsity:g} cannot be used: choose a share above 0 and below 1")
        return Goal(Unstructured() if pattern == "unstructured" else WholeChannels(), sparsity)
    n_of_m = parse_n_of_m(pattern)
    if sparsity is not None and not math.isclose(sparsity, n_of_m.share):
        raise MixMixError(f"--pattern {pattern} removes {n_of_m.share:g}, not {sparsity:g}: leave --sparsity out")
    return Goal(n_of_m, n_of_m.share)


def output_path(model: Path, goal: Goal, bits: int | None = None) -> Path:
    """`model.s50.onnx`, `model.2of4.onnx` or `model.c50.onnx`, beside the input; `model.s50.w4.onnx` with bits."""
    pattern = goal.pattern
    letter = "c" if isinstance(pattern, WholeChannels) else "s"
    suffix = f"{pattern.n}of{pattern.m}" if isinstance(pattern, NofM) else f"{letter}{round(100 * goal.sparsity, 6):g}"
    return model.with_suffix(f".{suffix}{'' if bits is None else f'.w{bits}'}.onnx")


def check_goal(classifier: Classifier, settings: PruneSettings, goal: Goal) -> None:
    """Raise MixMixError where the model cannot come to the goal, whatever the images."""
    module = to_torch(writeback.prepare_for_pruning(classifier))
    if isinstance(goal.pattern, WholeChannels):
        channels = _free_channels(module)
        choose_channels(module, channels, no_harm(channels), _budget(settings, goal))
    else:
        layers = fitting_layers(module, goal.pattern)
        if not isinstance(goal.pattern, NofM):
            shares.check_reachable(layers, goal.sparsity, settings)


def prune(
    classifier: Classifier,
    images: ImageSet,
    output: Path,
    settings: PruneSettings,
    goal: Goal,
    *,
    seed: int = 0,
    device: torch.device | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    provenance: Mapping[str, str] | None = None,
) -> Compression:
    """Prune `classifier` on `images` and write it to `output`.

    Raises MixMixError for a goal, images or an output that cannot be used, before any long work starts.
    """
    started = time.perf_counter()
    result = prune_in_memory(
        classifier, images, output, settings, goal, seed=seed, device=device, overwrite=overwrite, progress=progress
    )
    facts = {PROVENANCE: goal.to_json(images, seed), **(provenance or {})}
    return result.write(classifier, output, facts, started, overwrite=overwrite)


def prune_in_memory(
    classifier: Classifier,
    images: ImageSet,
    output: Path,
    settings: PruneSettings,
    goal: Goal,
    *,
    seed: int = 0,
    device: torch.device | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Prune `classifier` and write no model; beside `output`, where it will go, lies the state of the run.

    Raises MixMixError for a goal, images or an output that cannot be used, before any long work starts.
    """
    progress = progress or Silent()
    prepared = writeback.prepare_for_pruning(classifier)
    module = begin(prepared, output, device, overwrite=overwrite)
    inputs = model_inputs(module, images)
    facts = {"settings": settings.model_dump(), "goal": goal.to_json(images, seed)}
    checkpoint = Checkpoint(output, "prune", (module,), images, facts, progress.say)
    if isinstance(goal.pattern, WholeChannels):  # which go is not trained, so all steps are the second stage's
        settings = settings.model_copy(update={"steps": settings.mask_steps + settings.steps, "mask_steps": 0})
        removal = _choose_channels(module, inputs, settings, goal)
    else:
        removal = choose_weights(module, inputs, settings, goal.pattern, goal.sparsity, checkpoint, progress)
    run = _Run(module, inputs, settings, removal.choices, torch.Generator().manual_seed(seed), checkpoint)
    run.reconstruct_all(progress)
    sample = sample_for_proof(prepared, inputs)
    return Result(
        prepared=prepared,
        edits=_edits(module, run.tensors(), removal.cut),
        sample=sample,
        logits=run.logits(sample),
        blocks=run.walk.account,
        layers=run.layer_accounts(removal.reasons),
        checkpoint=checkpoint,
    )


Cut = Callable[[Mapping[str, Tensor]], Sequence[writeback.Edit]]
"""Edits that make operands smaller, from the tensors that have changed by initializer name."""


@dataclass(frozen=True)
class Removal:
    """What is to go: how weights are chosen in each layer that is pruned, by its output, and why others are not.

    Choices are ever stricter, and the last is what was asked for.
    """

    choices: Mapping[str, Sequence[Choose]]
    reasons: Mapping[str, str]
    cut: Cut = lambda _: ()
    """What is cut out of the file; nothing where weights only become zero."""


def _edits(module: TorchClassifier, tensors: Mapping[str, Tensor], cut: Cut) -> list[writeback.Edit]:
    """What to write: the cuts, and the changed tensors of the layers that they leave whole."""
    found = list(cut(tensors))
    done = {(edit.output, edit.index) for edit in found if isinstance(edit, writeback.TensorEdit)}
    for layer in module.layers():
        for name, index in ((layer.weight, layer.operand), (layer.bias, writeback.BIAS)):
            if name is not None and name in tensors and (layer.output, index) not in done:
                found.append(writeback.TensorEdit(layer.output, index, tensors[name].cpu().numpy()))
    return found


def _free_channels(module: TorchClassifier) -> Channels:
    """The model's channels. Raises MixMixError where none can be removed."""
    channels = find_channels(module)
    if not len(channels.numbers()):
        raise MixMixError(
            f"{module.classifier.path} has no channels that can be removed: choose the pattern unstructured"
        )
    return channels


def _budget(settings: PruneSettings, goal: Goal) -> ChannelBudget:
    return ChannelBudget(goal.unit, 1 - goal.sparsity, settings.least_channels, settings.multiple)


def _choose_channels(module: TorchClassifier, inputs: Tensor, settings: PruneSettings, goal: Goal) -> Removal:
    channels = _free_channels(module)
    harm = channel_harm(module, channels, inputs, settings.batch)
    removed = choose_channels(module, channels, harm, _budget(settings, goal))
    choices = masks(channels, removed)
    whole = [entry.layer.output for entry in channels.layers if entry.layer.output not in choices]
    return Removal(
        choices,
        dict.fromkeys(whole, "its channels cannot be told apart"),
        lambda tensors: channels.edits(removed, tensors, module.constant),
    )


def fitting_layers(module: TorchClassifier, pattern: Pattern) -> list[Layer]:
    """The layers that the pattern fits. Raises MixMixError where there is none."""
    fitting = [layer for layer in module.layers() if pattern.fits(layer)]
    if not fitting:
        raise MixMixError(
            f"{module.classifier.path} has no layer with constant weights that pattern {pattern.name} fits:"
            " choose another pattern"
        )
    return fitting


def choose_weights(
    module: TorchClassifier,
    inputs: Tensor,
    settings: PruneSettings,
    pattern: Pattern,
    sparsity: float,
    checkpoint: Checkpoint,
    progress: Progress,
) -> Removal:
    """The smallest weights of each layer that the pattern fits.

    Raises MixMixError where the model has no layer that can be pruned so.
    """
    layers, fitting = module.layers(), fitting_layers(module, pattern)
    if isinstance(pattern, NofM):
        found = {layer.output: pattern.share for layer in fitting}
        reason = f"{pattern.name} does not divide its input channels"
    else:
        found = _shares(module, fitting, inputs, settings, sparsity, checkpoint, progress)
        reason = "first layer"
    by_output = {layer.output: layer for layer in layers}
    choices: dict[str, list[Choose]] = {
        name: [partial(stage.choose, layer=by_output[name], share=part) for stage, part in pattern.by_stages(share)]
        for name, share in found.items()
        if share > 0
    }
    return Removal(choices, {layer.output: reason for layer in layers if layer.output not in found})


def _shares(
    module: TorchClassifier,
    layers: Sequence[Layer],
    inputs: Tensor,
    settings: PruneSettings,
    sparsity: float,
    checkpoint: Checkpoint,
    progress: Progress,
) -> shares.Shares:
    def measure() -> shares.Shares:
        with progress.task("measuring what each layer can give up", len(layers)) as task:
            return shares.by_sensitivity(module, layers, inputs, sparsity, settings, lambda: task.advance())

    match settings.allocation:
        case "uniform":
            return shares.uniform(layers, sparsity, settings)
        case "global":
            return shares.by_threshold(module, layers, sparsity, settings)
        case "sensitivity":
            return checkpoint.measured("shares", measure)


class _Run:
    """One pruning in progress: the changes made so far, by initializer name."""

    def __init__(
        self,
        module: TorchClassifier,
        inputs: Tensor,
        settings: PruneSettings,
        choices: Mapping[str, Sequence[Choose]],
        generator: torch.Generator,
        checkpoint: Checkpoint,
    ) -> None:
        self.module, self.inputs, self.settings, self.generator = module, inputs, settings, generator
        self.weights = {
            layer.weight: PrunedWeight(module.constant(layer.weight), choices[layer.output], settings)
            for layer in module.layers()
            if layer.output in choices
        }
        self.biases = {
            layer.bias: LearnedTensor.bias(module.constant(layer.bias), settings.bias_rate)
            for layer in module.layers()
            if layer.bias is not None
        }
        self.changes = Changes((self.weights, self.biases), {})
        self.settled = settled_layers(module, settings) if settings.compensate else set()
        """Outputs of the layers whose weights make up for those taken out."""
        self.walk = Walk(checkpoint, {"weights": self.weights, "biases": self.biases}, generator)

    def reconstruct_all(self, progress: Progress) -> None:
        """Go through the blocks that an interrupted run has not done; afterwards every change is hard."""
        steps = max(self.settings.mask_steps + self.settings.steps, 1)
        self.walk.resume(progress)
        with self.walk.kept(), progress.task("reconstructing", len(self.module.layers()) * steps) as task:
            stretches = walk_blocks(self.module, self.inputs, self.changes, self.settings)
            for stretch in self.walk.through(stretches, lambda s: task.advance(len(s.block.layers) * steps)):
                self._reconstruct(stretch, task)

    def _reconstruct(self, stretch: Stretch, task: Task) -> None:
        settings, layers = self.settings, stretch.block.layers
        weights = {layer.weight: self.weights[layer.weight] for layer in layers if layer.weight in self.weights}
        changed = weights | {layer.bias: self.biases[layer.bias] for layer in layers if layer.bias is not None}

        def error() -> float:
            return block_error(stretch.segment, stretch.changed_input, stretch.target, changed, {}, settings.batch)

        before = now = error()
        operable = [layer for layer in layers if layer.weight in weights and layer.output in self.settled]
        for layer in operable:
            self._operate(layer, stretch)
        if operable:
            now = error()
        rate = min(now, 1.0) ** settings.rate_power
        for weight in weights.values():
            weight.soften()
        self._train(stretch, changed, settings.mask_steps, before, rate, task)
        for weight in weights.values():
            weight.absorb()
            weight.freeze()
        self._train(stretch, changed, settings.steps, before, rate, task)
        for weight in weights.values():
            weight.harden()
        if not settings.mask_steps + settings.steps:
            task.advance(len(layers))
        self.walk.account.append((stretch.block.name, Reconstruction(before, error())))

    def _operate(self, layer: Layer, stretch: Stretch) -> None:
        """Take the weights out of one layer, behind the layers before it as they are now."""
        found = stretch_moments(self.module, layer, stretch, self.changes, self.settings)
        shift = self.weights[layer.weight].operate(layer, found)
        if layer.bias is not None:
            shift_bias(self.module, layer, self.biases[layer.bias], shift)

    def _train(
        self,
        stretch: Stretch,
        changed: Mapping[str, PrunedWeight | LearnedTensor],
        steps: int,
        error: float,
        rate: float,
        task: Task,
    ) -> None:
        share, name = len(stretch.block.layers), stretch.block.name
        reconstruct(
            stretch.segment,
            stretch.float_input,
            stretch.changed_input,
            stretch.target,
            changed,
            {},
            Loop(steps, self.settings.minibatch(stretch.changed_input), self.settings.input_drop, rate),
            error,
            self.generator,
            lambda done, loss: task.advance(share * done, None if math.isnan(loss) else f"{name}: loss {loss:.3f}"),
        )

    def tensors(self) -> dict[str, Tensor]:
        """Everything that has changed, by initializer name."""
        biases = self.biases if self.settings.bias_rate or self.settled else {}
        return {name: change.tensor() for table in (self.weights, biases) for name, change in table.items()}

    def logits(self, inputs: Tensor) -> Tensor:
        """Logits of the pruned model in torch."""
        return run_batched(self.module.whole, inputs, self.settings.batch, **self.changes.of(self.module.whole))

    def layer_accounts(self, reasons: Mapping[str, str]) -> list[LayerAccount]:
        tensors = self.tensors()
        return [
            account_layer(layer.name, original, tensors.get(layer.weight, original), reason=reasons.get(layer.output))
            for layer in self.module.layers()
            for original in [self.module.constant(layer.weight)]
        ]
