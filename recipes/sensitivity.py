"""How much one layer's change alone does to the logits: what placements of bits and of sparsity are decided by."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from converters.torch_module import Layer, TorchClassifier
from recipes.blocks import Block, find_blocks
from recipes.reconstruct import LoopSettings, run_batched


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
    found, x = {}, inputs
    reference = module(inputs[:count])
    for block in find_blocks(module, settings.max_chain):
        before, start = Before(block, x), {block.input: x[:count].to(module.device)}
        rest = module.segment([block.input], [module.logits_name])
        for layer in block.layers:
            found[layer.output] = [
                noise_to_signal(reference, rest(start, version)[module.logits_name])
                for version in versions(layer, before)
            ]
            advance()
        x = run_batched(module.segment([block.input], [block.output]), x, settings.batch, settings.cache_limit)
    return found
