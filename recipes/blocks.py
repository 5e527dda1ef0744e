"""Reconstruction blocks, found from the graph alone.

A value is a *cut* when every path from the image to the logits goes through it. Between two neighbouring cuts lies
either one node, or a stretch with branches: a residual, inverted-residual, dense or squeeze-excite unit, whatever its
class was called. Blocks are such stretches; nodes without weights join the block before them, and runs of single
layers are joined up to `max_chain`, as in an inverted residual without a shortcut.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from converters.torch_module import Layer, Step, TorchClassifier


@dataclass(frozen=True)
class Block:
    """What lies between the values `input` and `output`, through both of which all paths go."""

    input: str
    output: str
    layers: tuple[Layer, ...]
    branches: bool

    @property
    def name(self) -> str:
        return self.layers[0].name if len(self.layers) == 1 else f"{self.layers[0].name} to {self.layers[-1].name}"


def find_cuts(steps: Sequence[Step], input_name: str, output_name: str) -> list[tuple[int, str]]:
    """(number of steps before it, value) for every cut, from the input to the output, in order."""
    last_read: dict[str, int] = {}
    for index, step in enumerate(steps):
        for name in step.inputs:
            last_read[name] = index
    last_read[output_name] = len(steps)
    live = {input_name}
    cuts = [(0, input_name)]
    for index, step in enumerate(steps):
        live |= {name for name in step.outputs if last_read.get(name, -1) > index}
        live -= {name for name in step.inputs if last_read.get(name, -1) == index}
        if len(live) == 1:
            cuts.append((index + 1, next(iter(live))))
    return cuts


def find_blocks(module: TorchClassifier, max_chain: int = 3) -> list[Block]:
    """Blocks that tile the way from the image to the logits, in order, each with at least one weighted layer."""
    steps = module.whole.steps
    layers = {layer.output: layer for layer in module.layers()}
    cuts = find_cuts(steps, module.input_name, module.logits_name)
    blocks: list[Block] = []
    pending = module.input_name  # where weightless stretches before the first layer began
    for (start, before), (end, after) in itertools.pairwise(cuts):
        inside = tuple(layers[name] for step in steps[start:end] for name in step.outputs if name in layers)
        branches = end - start > 1
        if not inside and blocks:
            blocks[-1] = Block(blocks[-1].input, after, blocks[-1].layers, blocks[-1].branches)
        elif inside:
            chains = blocks and not branches and not blocks[-1].branches
            if chains and len(blocks[-1].layers) + len(inside) <= max_chain:
                blocks[-1] = Block(blocks[-1].input, after, blocks[-1].layers + inside, False)
            else:
                blocks.append(Block(before if blocks else pending, after, inside, branches))
    return blocks
