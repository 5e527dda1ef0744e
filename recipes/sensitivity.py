"""How much one layer's change alone does to the logits: what placements of bits and of sparsity are decided by."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from converters.torch_module import Layer, TorchClassifier
from recipes.blocks import find_blocks


def noise_to_signal(reference: Tensor, other: Tensor) -> float:
    """The difference's power over the reference's."""
    return float((other - reference).double().square().sum() / reference.double().square().sum())


@torch.no_grad()
def logit_noise(
    module: TorchClassifier,
    inputs: Tensor,
    versions: Callable[[Layer], Iterable[Tensor]],
    max_chain: int,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Noise-to-signal ratios of the logits with each of `versions` of one layer's weight alone, by layer output.

    `inputs` [N, ...] are model inputs. What lies before a layer's block is computed once for the block.
    """
    found, x = {}, inputs
    reference = module(inputs)
    for block in find_blocks(module, max_chain):
        rest = module.segment([block.input], [module.logits_name])
        for layer in block.layers:
            found[layer.output] = [
                noise_to_signal(reference, rest({block.input: x}, {layer.weight: version})[module.logits_name])
                for version in versions(layer)
            ]
            advance()
        x = module.segment([block.input], [block.output])({block.input: x})[block.output]
    return found
