"""What is to go: weights or channels of each layer, by pattern, and why others stay."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from torch import Tensor

from converters.channel_cuts import Channels, LayerChannels
from converters.channels import find_channels
from converters.edits import Edit
from converters.errors import MixMixError
from converters.numbering import FIXED
from converters.torch_module import Layer, TorchClassifier
from recipes.checkpoint import Checkpoint
from recipes.patterns import NofM, Pattern, WholeChannels
from recipes.progress import Progress
from recipes.prune import shares
from recipes.prune.channels import ROUNDING, Limits, channel_harm, choose_channels, masks, no_harm, share_left
from recipes.prune.goal import LATENCY, Goal
from recipes.prune.latency import check_latency, choose_by_latency
from recipes.prune.masks import Choose
from recipes.prune.settings import PruneSettings

WANTED = "missed more than others"
"""Why a layer stays as it is that could give something up."""

Cut = Callable[[Mapping[str, Tensor]], Sequence[Edit]]
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
    macs_left: float = 1.0
    """Share of the multiplications that the file still makes."""


def _free_channels(module: TorchClassifier) -> Channels:
    """The model's channels. Raises MixMixError where none can be removed."""
    channels = find_channels(module)
    if not len(channels.numbers()):
        raise MixMixError(
            f"{module.classifier.path} has no channels that can be removed: choose the pattern unstructured"
        )
    return channels


def check_goal(module: TorchClassifier, settings: PruneSettings, goal: Goal) -> None:
    """Raise MixMixError where the model cannot come to the goal, whatever the images."""
    if isinstance(goal.pattern, WholeChannels):
        channels = _free_channels(module)
        left, limits = 1 - goal.sparsity, _limits(settings)
        if goal.unit == LATENCY:
            check_latency(module, channels, left, limits)
        else:
            choose_channels(module, channels, no_harm(channels), goal.unit, left, limits)
        return
    fitting = fitting_layers(module, goal.pattern)
    if not isinstance(goal.pattern, NofM):
        shares.check_reachable(fitting, goal.sparsity, settings, shares.zeros_of(module, fitting))
    elif not goal.everywhere:
        _part(module, fitting, goal.pattern, goal.sparsity)


def _limits(settings: PruneSettings) -> Limits:
    return Limits(settings.least_channels, settings.multiple)


def choose(
    module: TorchClassifier,
    inputs: Tensor,
    settings: PruneSettings,
    goal: Goal,
    checkpoint: Checkpoint,
    progress: Progress,
) -> Removal:
    """What goes, layer by layer; what was measured for it is kept in the checkpoint.

    Raises MixMixError where the model cannot come to the goal.
    """
    if isinstance(goal.pattern, WholeChannels):
        return _channels(module, inputs, settings, goal, checkpoint, progress)
    return _weights(module, goal.pattern, _shares(module, goal.pattern, inputs, settings, goal, checkpoint, progress))


def _channels(
    module: TorchClassifier,
    inputs: Tensor,
    settings: PruneSettings,
    goal: Goal,
    checkpoint: Checkpoint,
    progress: Progress,
) -> Removal:
    channels, limits, left = _free_channels(module), _limits(settings), 1 - goal.sparsity
    harm = channel_harm(module, channels, inputs, settings.batch)
    if goal.unit == LATENCY:  # another run would measure other times
        found = checkpoint.measured(
            "channels", lambda: choose_by_latency(module, channels, harm, left, limits, progress).tolist()
        )
        removed = np.array(found, np.int64)
    else:
        removed = choose_channels(module, channels, harm, goal.unit, left, limits)
    choices = masks(channels, removed)
    whole = [entry for entry in channels.layers if entry.layer.output not in choices]
    return Removal(
        choices,
        {entry.layer.output: WANTED if _has_channels(entry) else "no channels that can be removed" for entry in whole},
        lambda tensors: channels.edits(removed, tensors, module.constant),
        share_left(channels, removed),
    )


def _has_channels(entry: LayerChannels) -> bool:
    """Whether any channel of the layer could be removed, on either side of it."""
    sides = [entry.outputs, *([] if entry.inputs is None else [entry.inputs])]
    return any(bool((numbers != FIXED).any()) for numbers in sides)


def fitting_layers(module: TorchClassifier, pattern: Pattern) -> list[Layer]:
    """The layers that the pattern fits. Raises MixMixError where there is none."""
    fitting = [layer for layer in module.layers() if pattern.fits(layer)]
    if not fitting:
        raise MixMixError(
            f"{module.classifier.path} has no layer with constant weights that pattern {pattern.name} fits:"
            " choose another pattern"
        )
    return fitting


def _weights(module: TorchClassifier, pattern: Pattern, found: shares.Shares) -> Removal:
    choices: dict[str, list[Choose]] = {}
    reasons: dict[str, str] = {}
    for layer in module.layers():
        share = found.get(layer.output, 0.0)
        if share > 0:
            stages = pattern.by_stages(share)
            choices[layer.output] = [partial(stage.choose, layer=layer, share=part) for stage, part in stages]
        elif not pattern.fits(layer):
            reasons[layer.output] = f"{pattern.name} does not divide the input channels"
        elif isinstance(pattern, NofM):
            reasons[layer.output] = WANTED
        elif layer.output not in found:
            reasons[layer.output] = "first layer"
    return Removal(choices, reasons)


def _part(module: TorchClassifier, fitting: Sequence[Layer], pattern: NofM, sparsity: float) -> float:
    """What part of the weights of `fitting` has to go so that `sparsity` of all do.

    Raises MixMixError where the pattern cannot take so many.
    """
    part = sum(layer.parameters for layer in fitting) / sum(layer.parameters for layer in module.layers())
    if sparsity > pattern.share * part + ROUNDING:
        raise MixMixError(
            f"pattern {pattern.name} can remove at most {pattern.share * part:.1%} of the weights of this model, and"
            f" --sparsity {sparsity:g} is more: ask for less, or leave it out for every layer that the pattern fits"
        )
    return sparsity / part


def _shares(
    module: TorchClassifier,
    pattern: Pattern,
    inputs: Tensor,
    settings: PruneSettings,
    goal: Goal,
    checkpoint: Checkpoint,
    progress: Progress,
) -> shares.Shares:
    """What each of the layers that the pattern fits gives up."""
    layers = fitting_layers(module, pattern)

    def measured(sparsity: float) -> shares.Shares:
        def measure() -> shares.Shares:
            with progress.task("measuring what each layer can give up", len(module.layers())) as task:
                return shares.by_sensitivity(module, layers, inputs, pattern, sparsity, settings, task.advance)

        return checkpoint.measured("shares", measure)

    if isinstance(pattern, NofM):
        if goal.everywhere:
            return {layer.output: pattern.share for layer in layers}
        part = _part(module, layers, pattern, goal.sparsity)
        if part < pattern.share - ROUNDING:
            return measured(part)
        return {layer.output: pattern.share for layer in layers}
    match settings.allocation:
        case "uniform":
            return shares.uniform(layers, goal.sparsity, settings, shares.zeros_of(module, layers))
        case "global":
            return shares.by_threshold(module, layers, goal.sparsity, settings)
        case "sensitivity":
            shares.check_reachable(layers, goal.sparsity, settings, shares.zeros_of(module, layers))
            return measured(goal.sparsity)
