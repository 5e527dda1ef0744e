"""How much one layer's change alone does to the logits: what placements of bits and of sparsity are decided by."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from converters.torch_module import Layer, Segment, TorchClassifier, Transform
from recipes.blocks import Block, find_blocks
from recipes.reconstruct import Values, read_by, run_batched
from recipes.settings import LoopSettings


def noise_to_signal(reference: Tensor, other: Tensor) -> float:
    """The difference's power over the reference's."""
    return float((other - reference).double().square().sum() / reference.double().square().sum())


@dataclass(frozen=True)
class Before:
    """What is there before a layer's block in the float model, the block's inputs among it, for all images [N, ...]."""

    block: Block
    values: Values

    @property
    def read(self) -> Values:
        """The block's inputs."""
        return read_by([self.block], self.values)


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
        start = {name: x[:count].to(module.device) for name, x in before.values.items()}
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
        start = {name: x.to(module.device) for name, x in before.values.items()}
        within = module.segment(block.inputs, [block.output])
        there = [*block.inputs, *(name for step in within.steps for name in step.outputs if name != block.output)]
        wanted = [name for name in there if name in values and name not in found]
        for name, value in module.segment(block.inputs, wanted)(start).items():
            found[name] = [
                noise_to_signal(reference, rest(start, transforms={name: version})[module.logits_name])
                for version in versions(value)
            ]
            advance()
    return found


def _from_blocks(module: TorchClassifier, inputs: Tensor, settings: LoopSettings) -> Iterator[tuple[Before, Segment]]:
    """What is there before each block, and all that comes from there on, up to the logits."""
    values: Values = {module.input_name: inputs}
    blocks = find_blocks(module, settings.max_chain)
    for number, block in enumerate(blocks, 1):
        yield Before(block, values), module.segment(values, [module.logits_name])
        made = run_batched(module.segment(block.inputs, [block.output]), values, settings.batch, settings.cache_limit)
        values = read_by(blocks[number:], values) | {block.output: made}
