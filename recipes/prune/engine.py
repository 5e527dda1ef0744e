"""From a classifier and images to a pruned ONNX file.

The way: images -> model inputs -> how much each layer gives up -> block by block: the smallest weights out, what is
left trained to answer as the float block does -> float tensors -> a copy of the original graph -> onnxruntime.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from converters import writeback
from converters.classifier import Classifier
from converters.conversion import to_torch
from converters.edits import BIAS, Edit, TensorEdit
from converters.torch_module import Layer, TorchClassifier
from recipes.account import Compression, LayerAccount, account_layer, share_of_zeros
from recipes.checkpoint import Checkpoint
from recipes.devices import choose_precision
from recipes.images import ImageSet
from recipes.least_squares import compensate, settled_layers
from recipes.objective import BlockError, Objective
from recipes.patterns import WholeChannels
from recipes.progress import Progress, Silent, Task
from recipes.prune import choice
from recipes.prune.goal import PROVENANCE, Goal
from recipes.prune.masks import Choose, PrunedWeight
from recipes.prune.settings import PruneSettings
from recipes.reconstruct import (
    Changes,
    LearnedTensor,
    Loop,
    Reconstruction,
    Stretch,
    block_error,
    learned_biases,
    reconstruct,
    run_batched,
    walk_blocks,
)
from recipes.resumable import Walk
from recipes.slopes import Slopes
from recipes.workpiece import Result, begin, model_inputs, sample_for_proof


def check_goal(classifier: Classifier, settings: PruneSettings, goal: Goal) -> None:
    """Raise MixMixError where the model cannot come to the goal, whatever the images."""
    choice.check_goal(to_torch(writeback.prepare_for_pruning(classifier)), settings, goal)


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
    made = goal.to_json(images, seed, macs_left=result.macs_left, settings=settings.changed())
    facts = {PROVENANCE: made, **(provenance or {})}
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
    removal = choice.choose(module, inputs, settings, goal, checkpoint, progress)
    generator = torch.Generator().manual_seed(seed)
    run = _Run(module, inputs, settings, removal.choices, generator, checkpoint, progress)
    run.reconstruct_all()
    layers = run.layer_accounts(removal.reasons)
    before = share_of_zeros([_as_it_was(module, layer) for layer in module.layers()])
    if not isinstance(goal.pattern, WholeChannels) and share_of_zeros(layers) <= before:
        progress.say(f"{before:.2%} of the weights of {classifier.path} are zero already: there was nothing to remove")
    sample = sample_for_proof(prepared, inputs)
    return Result(
        prepared=prepared,
        edits=_edits(module, run.tensors(), removal.cut),
        sample=sample,
        logits=run.logits(sample),
        blocks=run.walk.account,
        layers=layers,
        macs_left=removal.macs_left,
        checkpoint=checkpoint,
    )


def _as_it_was(module: TorchClassifier, layer: Layer) -> LayerAccount:
    return account_layer(layer.name, module.constant(layer.weight), module.constant(layer.weight))


def _edits(module: TorchClassifier, tensors: Mapping[str, Tensor], cut: choice.Cut) -> list[Edit]:
    """What to write: the cuts, and the changed tensors of the layers that they leave whole."""
    found = list(cut(tensors))
    done = {(edit.output, edit.index) for edit in found if isinstance(edit, TensorEdit)}
    for layer in module.layers():
        for name, index in ((layer.weight, layer.operand), (layer.bias, BIAS)):
            if name is not None and name in tensors and (layer.output, index) not in done:
                found.append(TensorEdit(layer.output, index, tensors[name].cpu().numpy()))
    return found


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
        progress: Progress,
    ) -> None:
        self.module, self.inputs, self.settings = module, inputs, settings
        self.generator, self.progress = generator, progress
        self.weights = {
            layer.weight: PrunedWeight(module.constant(layer.weight), choices[layer.output], settings)
            for layer in module.layers()
            if layer.output in choices
        }
        self.biases = learned_biases(module, settings.bias_rate)
        self.changes = Changes((self.weights, self.biases), {})
        self.settled = settled_layers(module, settings) if settings.compensate else set()
        """Outputs of the layers whose weights make up for those taken out."""
        self.slopes = Slopes(module, settings, progress)
        self.walk = Walk(checkpoint, {"weights": self.weights, "biases": self.biases}, generator)

    def reconstruct_all(self) -> None:
        """Go through the blocks that an interrupted run has not done; afterwards every change is hard."""
        steps = max(self.settings.mask_steps + self.settings.steps, 1)
        self.walk.resume(self.progress)
        with self.walk.kept(), self.progress.task("reconstructing", len(self.module.layers()) * steps) as task:
            stretches = walk_blocks(self.module, self.inputs, self.changes, self.settings)
            for stretch in self.walk.through(stretches, lambda s: task.advance(len(s.block.layers) * steps)):
                if stretch.block.layers:
                    self._reconstruct(stretch, task)

    def _reconstruct(self, stretch: Stretch, task: Task) -> None:
        settings, layers = self.settings, stretch.block.layers
        weights = {layer.weight: self.weights[layer.weight] for layer in layers if layer.weight in self.weights}
        changed = weights | {layer.bias: self.biases[layer.bias] for layer in layers if layer.bias is not None}

        steps = settings.mask_steps + settings.steps
        objective = self.slopes.objective(stretch, steps)

        def error(objective: Objective) -> BlockError:
            return block_error(stretch.segment, stretch.changed_inputs, objective, changed, {}, settings.batch)

        before = now = error(objective)
        operable = [layer for layer in layers if layer.weight in weights and layer.output in self.settled]
        for layer in operable:
            weight = self.weights[layer.weight]
            bias = self.biases[layer.bias] if layer.bias is not None else None
            compensate(self.module, layer, stretch, self.changes, self.settings, weight, bias)
        if operable:
            now = error(objective.of_output)
        rate = min(now.output, 1.0) ** settings.rate_power
        for weight in weights.values():
            weight.soften()
        self._train(stretch, objective, changed, settings.mask_steps, before, rate, task)
        for weight in weights.values():
            weight.absorb()
            weight.freeze()
        self._train(stretch, objective, changed, settings.steps, before, rate, task)
        for weight in weights.values():
            weight.harden()
        if not steps:
            task.advance(len(layers))
        self.walk.account.append((stretch.block.name, Reconstruction(before.output, error(objective.of_output).output)))

    def _train(
        self,
        stretch: Stretch,
        objective: Objective,
        changed: Mapping[str, PrunedWeight | LearnedTensor],
        steps: int,
        plain: BlockError,
        rate: float,
        task: Task,
    ) -> None:
        share, name = len(stretch.block.layers), stretch.block.name
        reconstruct(
            stretch.segment,
            stretch.float_inputs,
            stretch.changed_inputs,
            objective,
            changed,
            {},
            Loop(
                steps,
                self.settings.minibatch(stretch.changed_inputs.values()),
                self.settings.input_drop,
                rate,
                choose_precision(self.settings.precision, stretch.block.layers, self.module.device),
            ),
            plain,
            self.generator,
            lambda done, loss: task.advance(share * done, None if math.isnan(loss) else f"{name}: loss {loss:.3f}"),
        )

    def tensors(self) -> dict[str, Tensor]:
        """Everything that has changed, by initializer name."""
        biases = self.biases if self.settings.bias_rate or self.settled else {}
        return {name: change.tensor() for table in (self.weights, biases) for name, change in table.items()}

    def logits(self, inputs: Tensor) -> Tensor:
        """Logits of the pruned model in torch."""
        whole = self.module.whole
        return run_batched(whole, {self.module.input_name: inputs}, self.settings.batch, **self.changes.of(whole))

    def layer_accounts(self, reasons: Mapping[str, str]) -> list[LayerAccount]:
        tensors = self.tensors()
        return [
            account_layer(layer.name, original, tensors.get(layer.weight, original), whole=reasons.get(layer.output))
            for layer in self.module.layers()
            for original in [self.module.constant(layer.weight)]
        ]
