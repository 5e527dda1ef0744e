"""Quantization-aware training: the whole quantized network taught by the float one, from where reconstruction left it.

    loss = T^2 KL(float || quantized) + features * mean over blocks of ||y~ - y||^2 / ||y||^2

The second term is the intermediate-feature loss of the paper's appendix (B.3) on the outputs of blocks, relative to
their power, so that one weight serves all of them. Weights are trained straight through their rounding, in units of
their scale; scales, biases and activation steps are trained along. BatchNorm is folded into the weights before, so that
its statistics are frozen from the first step (the appendix freezes them late, as updating them moves the activations).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from converters.torch_module import TorchClassifier
from recipes.augment import Augmentation
from recipes.blocks import find_blocks
from recipes.checkpoint import Checkpoint, State
from recipes.images import ImageSet
from recipes.progress import Task
from recipes.quantize.settings import QuantizeSettings
from recipes.quantize.tables import Quantizers
from recipes.ranks import Part, Ranks
from recipes.reconstruct import Change
from recipes.training import Training, divergence, train
from recipes.workpiece import to_inputs


def train_quantized(
    module: TorchClassifier,
    images: ImageSet,
    quantizers: Quantizers,
    settings: QuantizeSettings,
    generator: torch.Generator,
    task: Task,
    checkpoint: Checkpoint,
    found: State | None,
    before: State,
    ranks: Ranks,
) -> None:
    """Train all `quantizers` together on `images`, in place; afterwards they are hard again.

    `found` is what an interrupted run has left in `checkpoint` while it trained, `before` the state that all began
    from; all `ranks` train alike. Raises MixMixError when training diverges.
    """
    weights, biases, values = quantizers.weights, quantizers.biases, quantizers.values
    for weight in weights.values():
        weight.learn_freely()
    outputs = [block.output for block in find_blocks(module, settings.max_chain)]
    taps = list(dict.fromkeys([*outputs, module.logits_name]))
    segment = module.segment([module.input_name], taps)
    changes = quantizers.changes

    def loss_of(pixels: Tensor, part: Part) -> Tensor:
        x = {module.input_name: to_inputs(module, pixels)}
        with torch.no_grad():
            expected = segment(x)
        actual = segment(x, **changes.of(segment))
        student, teacher = (part.join(found[module.logits_name]) for found in (actual, expected))
        loss = divergence(student, teacher, settings.train_temperature)
        if settings.train_features:
            names = [name for name in outputs if name != module.logits_name]
            if names:
                loss = loss + settings.train_features * _relative(actual, expected, names, part).mean()
        return loss

    everything: list[Change] = [*weights.values(), *biases.values(), *values.values()]
    groups = [
        replace(group, rate=settings.train_rate * group.rate) for change in everything for group in change.groups()
    ]
    how = Training(
        steps=settings.train_steps,
        batch=settings.train_batch,
        warmup=settings.train_warmup,
        mixing=settings.train_mixing,
        rate_key="train_rate",
        augmentation=Augmentation(
            flip=settings.train_flip,
            shift=settings.train_shift,
            jitter=settings.train_jitter,
            grayscale=settings.train_grayscale,
            blur=settings.train_blur,
        ),
        milestones=settings.train_milestones,
    )
    train(images, groups, loss_of, how, generator, task, checkpoint, found, before, ranks)
    for weight in weights.values():
        weight.harden()
    for value in values.values():
        value.harden()


def _relative(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], names: Sequence[str], part: Part) -> Tensor:
    """||y~ - y||^2 / ||y||^2 over the whole batch of the value of each name, [names]."""
    noise = torch.stack([(actual[name] - expected[name]).square().mean() for name in names])
    power = torch.stack([expected[name].square().mean() for name in names])
    noise, power = part.mean(torch.stack([noise, power]))
    return noise / power.clamp_min(1e-12)
