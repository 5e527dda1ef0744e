"""How much one layer's change alone does to the logits: what placements of bits and of sparsity are decided by."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from converters.torch_module import Layer, Segment, TorchClassifier, Transform
from recipes.blocks import Block, find_blocks
from recipes.reconstruct import run_batched
from recipes.settings import LoopSettings


def noise_to_signal(reference: Tensor, other: Tensor) -> float:
    """The difference's power over the reference's."""
    return float((other - reference).double().square().sum() / reference.double().square().sum())


@dataclass(frozen=True)
class Before:
    """What a layer's block reads in the float model: the value, for all inputs [N, ...]."""

    block: Block
    x: Tensor


Versions = Callable[[Layer, Before], Iterable[Mapping[str, Tensor]]]
"""Changed tensors of a layer, by initializer name."""


@torch.no_grad()
def logit_noise(
    module: TorchClassifier,
    inputs: Tensor,
    versions: Versions,
    count: int,
    settings: LoopSettings,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Noise-to-signal ratios of the logits with each of `versions` of one layer alone, by layer output.

    `inputs` [N, ...] are model inputs, on the first `count` of which it is measured. What lies before a layer's block
    is computed once for the block.
    """
    found = {}
    reference = module(inputs[:count])
    for before, rest in _from_blocks(module, inputs, settings):
        start = {before.block.input: before.x[:count].to(module.device)}
        for layer in before.block.layers:
            found[layer.output] = [
                noise_to_signal(reference, rest(start, version)[module.logits_name])
                for version in versions(layer, before)
            ]
            advance()
    return found


@torch.no_grad()
def value_noise(
    module: TorchClassifier,
    inputs: Tensor,
    values: Collection[str],
    versions: Callable[[Tensor], Iterable[Transform]],
    settings: LoopSettings,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Noise-to-signal ratios of the logits with each of `versions` of one value alone, by the value's name.

    `versions` makes transforms of what the value is on model inputs [N, ...], on all of which it is measured.
    """
    found = {}
    reference = module(inputs)
    for before, rest in _from_blocks(module, inputs, settings):
        block = before.block
        start = {block.input: before.x.to(module.device)}
        within = module.segment([block.input], [block.output])
        made = [name for step in within.steps for name in step.outputs if name in values and name != block.output]
        wanted = [block.input] * (block.input in values) + made
        for name, value in module.segment([block.input], wanted)(start).items():
            found[name] = [
                noise_to_signal(reference, rest(start, transforms={name: version})[module.logits_name])
                for version in versions(value)
            ]
            advance()
    return found


def _from_blocks(module: TorchClassifier, inputs: Tensor, settings: LoopSettings) -> Iterator[tuple[Before, Segment]]:
    """What each block reads, and all that comes from there on, up to the logits."""
    x = inputs
    for block in find_blocks(module, settings.max_chain):
        yield Before(block, x), module.segment([block.input], [module.logits_name])
        x = run_batched(module.segment([block.input], [block.output]), x, settings.batch, settings.cache_limit)
